"""What a GPU user compiles is one graph, gives the eager result, and is not compiled again for another time."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sde_diffusion as sd
from sde_diffusion.losses import denoising_loss
from sde_diffusion.model import PREDICTIONS, VariancePrediction
from sde_diffusion.networks import UNet


def build(prediction, out_channels=1):
    torch._dynamo.reset()
    torch.manual_seed(0)
    options = {"base_channels": 4, "channel_multipliers": (1, 2), "attention_resolutions": (2,)}
    network = UNet((1, 4, 4), **options, out_channels=out_channels)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    learned = {"learned_variance": out_channels == 2}
    return sd.DiffusionModel(network, sd.VPSDE(), prediction, data_shape=(1, 4, 4), **learned)


@pytest.fixture
def model(request):
    return build(request.param)


@pytest.mark.parametrize("model", PREDICTIONS, indirect=True)
def test_predict_is_one_graph_and_equal_to_eager(model):
    assert_one_graph(model)


def test_a_learned_variance_comes_out_of_the_graph():
    model = build("v", out_channels=2)
    compiled, x, t = assert_one_graph(model)
    result, expected = compiled(x, t), model.predict(x, t)
    assert isinstance(result, VariancePrediction)
    torch.testing.assert_close(result.fraction, expected.fraction)
    assert expected.fraction.shape == x.shape
    assert (expected.fraction != 0.5).all()


def assert_one_graph(model):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.predict, backend=counter, fullgraph=True)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])):
        for got, expected in zip(compiled(x, t), model.predict(x, t), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1
    return compiled, x, t


@pytest.mark.parametrize("model", ["edm"], indirect=True)
@pytest.mark.parametrize("weighting", ["simple", "edm"])
def test_loss_is_one_graph_and_equal_to_eager(model, weighting):
    def loss(x0, t, noise):
        return denoising_loss(model, x0, t, noise, weighting).mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=generator)
    t = torch.rand(3, generator=generator)
    value = compiled(x0, t, noise)
    value.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = loss(x0, t, noise)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_likelihood_is_one_graph_for_each_number_of_probes_and_equal_to_eager(trace):
    model, counter = build("eps"), CompileCounterWithBackend("aot_eager")
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"trace": trace, "probes": 4, "steps": 2, "nodes": 2, "atol": float("inf"), "rows": 5}
    expected = sd.log_likelihood(model, x, **options)
    result = sd.log_likelihood(model, x, compile=counter, **options)
    # Float32, of a random network's 16 dimensions at a few nodes.
    torch.testing.assert_close(result.log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(result.std_error, expected.std_error, rtol=1e-3, atol=1e-5)
    assert torch.equal(result.nfe, expected.nfe)
    # Of two probes for the pilot, and of two blocks of 2 to 16.
    assert counter.frame_count == 1 if trace == "exact" else 1 <= counter.frame_count <= 5
