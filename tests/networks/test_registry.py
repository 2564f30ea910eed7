"""Networks by name."""

import pytest

from sde_diffusion.networks import MLP, DiT, UNet, build_network


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
