"""Networks by name."""

import pytest
import torch

from sde_diffusion import VPSDE, DiffusionModel
from sde_diffusion.model import PREDICTIONS
from sde_diffusion.networks import MLP, DiT, UNet, build_network

FIR = {
    "resampling": "fir",
    "time_features": "fourier",
    "time_scale": 4.0,
    "progressive_input": "residual",
    "progressive_output": "skip",
}


def test_builds_by_name_with_lists_or_tuples():
    for sequence in (list, tuple):
        network = build_network(
            "unet",
            sequence([1, 8, 8]),
            base_channels=8,
            channel_multipliers=sequence([1, 2]),
            attention_resolutions=sequence([4]),
        )
        assert isinstance(network, UNet)
        assert network.data_shape == (1, 8, 8)
    assert isinstance(build_network("mlp", (2,), width=8), MLP)
    assert isinstance(build_network("dit", [1, 8, 8], width=8, depth=1, heads=1), DiT)


def test_unknown_names_are_listed_with_the_known():
    with pytest.raises(ValueError, match="network must be one of dit, mlp, unet; got 'resnet'"):
        build_network("resnet", (2,))
    with pytest.raises(ValueError, match="unknown option channels of network 'mlp'; it has width, depth"):
        build_network("mlp", (2,), channels=8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {"base_channels": 4, "channel_multipliers": (1, 2), "attention_resolutions": ()}),
        ("unet", {"base_channels": 4, "channel_multipliers": (1, 2), "attention_resolutions": (), **FIR}),
        ("dit", {"width": 16, "depth": 1, "heads": 2}),
        ("mlp", {"width": 8}),
    ],
)
def test_every_network_goes_with_every_prediction(name, options, prediction):
    torch.manual_seed(0)
    network = build_network(name, (1, 8, 8), **options).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = DiffusionModel(network, VPSDE(), prediction, data_shape=(1, 8, 8))
    x, t = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x0, eps = model.predict(x, t)
    assert (eps - model.predict(x, t + 0.05).eps).abs().max() > 1e-6
    alpha, sigma = (value[:, None, None, None] for value in (model.sde.alpha(t), model.sde.sigma(t)))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=0, atol=1e-10)
