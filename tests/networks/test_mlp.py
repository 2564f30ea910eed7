"""The multilayer perceptron against its formula, and under torch's transformations."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sde_diffusion.networks.mlp import ACTIVATIONS, MLP


def inputs(data_shape=(2,), batch=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *data_shape, generator=generator, dtype=dtype)
    return x, torch.rand(batch, generator=generator, dtype=dtype)


@pytest.mark.parametrize("data_shape", [(2,), [7], (1, 4, 4), ()])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("embedding", [0, 8])
def test_shapes(data_shape, activation, embedding):
    network = MLP(data_shape, width=16, activation=activation, embedding=embedding)
    x, t = inputs(data_shape)
    assert network(x, t).shape == x.shape


@pytest.mark.parametrize(("data_shape", "shape"), [((2,), (5, 4)), ((3, 4, 2), (5, 4, 4, 2))])
def test_output_channels(data_shape, shape):
    output = MLP(data_shape, width=16, out_channels=4)(*inputs(data_shape))
    assert output.shape == shape
    assert (output.flatten(1).std(0) > 0).all()


def test_the_tutorial_network():
    torch.manual_seed(0)
    network = MLP((2,), width=128, depth=3, activation="relu", time_scale=1.0, embedding=0)
    x, t = inputs()
    h = torch.cat([x, t[:, None]], dim=1)
    weights = list(network.parameters())
    assert [tuple(weight.shape) for weight in weights[::2]] == [(128, 3), (128, 128), (128, 128), (2, 128)]
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        h = (h @ weight.T + bias).clamp(min=0)
    torch.testing.assert_close(network(x, t), h @ weights[-2].T + weights[-1])


@pytest.mark.parametrize("embedding", [0, 8])
def test_the_condition_is_added_to_the_first_layer(embedding):
    torch.manual_seed(0)
    network = MLP((2,), width=16, depth=2, embedding=embedding, classes=3, vector=4, time_scale=10.0)
    x, t = inputs()
    label, vector = torch.tensor([0, 1, 2, 3, 1]), torch.randn(5, 4)
    time = 10 * t[:, None] if embedding == 0 else network.time_features(t)
    h = torch.cat([x, time], dim=1) @ network.input.weight.T + network.input.bias
    h = h + network.condition.table.weight[label] + vector @ network.condition.linear.weight.T
    for layer in (network.layers[1], network.layers[3]):
        h = torch.nn.functional.silu(h) @ layer.weight.T + layer.bias
    torch.testing.assert_close(network(x, t, label, vector), h)


def test_time_label_and_vector_matter_and_none_is_the_null_one():
    torch.manual_seed(0)
    network = MLP((2,), classes=3, vector=2)
    x, t = inputs()
    label, vector = torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 2)
    output = network(x, t, label, vector)
    for other in (
        network(x, t + 0.1, label, vector),
        network(x, t, (label + 1) % 3, vector),
        network(x, t, label, vector + 0.5),
    ):
        assert ((other - output).abs().amax(dim=1) > 1e-4).all()
    null, zeros = torch.full((5,), 3), torch.zeros(5, 2)
    for given, meant in (((None, vector), (null, vector)), ((label, None), (label, zeros)), ((), (null, zeros))):
        torch.testing.assert_close(network(x, t, *given), network(x, t, *meant))
        assert not torch.allclose(network(x, t, *given), output)


def test_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    network, (x, t) = MLP((2,), classes=3, vector=2), inputs()
    network(x, t, torch.tensor([0, 1, 2, 3, 1]), torch.ones(5, 2)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_float64_agrees_with_float32():
    torch.manual_seed(0)
    network, (x, t) = MLP((2,)), inputs()
    single = network(x, t)
    double = network.double()(x.double(), t.double())
    assert double.dtype == torch.float64
    # The phase of up to 1000 radians is the largest error of float32.
    assert (single - double).norm() < 4 * 1000 * 2.0**-24 * double.norm()


def test_forward_and_reverse_derivatives_agree():
    torch.manual_seed(0)
    network = MLP((2,), classes=3).double()
    x, t = inputs(dtype=torch.float64)
    u, v = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pullback = torch.func.vjp(lambda x: network(x, t), x)[1]
    pushed = torch.func.jvp(lambda x: network(x, t), (x,), (v,))[1]
    torch.testing.assert_close((u * pushed).sum(), (pullback(u)[0] * v).sum())


def test_compiles_whole_and_once():
    network, counter = MLP((2,), classes=3, vector=2), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    x, t = inputs()
    label, vector = torch.tensor([0, 1, 2, 3, 1]), torch.ones(5, 2)
    for change in (0.0, 0.1, 0.2):
        given = (x + change, t - change, label, vector - change)
        torch.testing.assert_close(compiled(*given), network(*given), rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "step"}, "activation must be one of silu, relu, gelu, tanh; got 'step'"),
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"classes": -1}, "classes must be at least 0; got -1"),
        ({"vector": -1}, "vector must be at least 0; got -1"),
        ({"embedding": 2}, "embedding must be 0, or even and at least 4; got 2"),
        ({"embedding": 7}, "embedding must be 0, or even and at least 4; got 7"),
        ({"out_channels": 0}, "out_channels must be at least 1, for data with an axis; got 0"),
        ({"data_shape": (), "out_channels": 2}, "out_channels must be at least 1, for data with an axis; got 2"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MLP(**({"data_shape": (2,)} | options))


def test_bad_inputs_are_named():
    network, conditional = MLP((2,)), MLP((2,), classes=3, vector=4)
    x, t = inputs()
    with pytest.raises(ValueError, match=r"x must be \(B, \*data_shape\) with data_shape \(2,\); got \(5, 1\)"):
        network(x[:, :1], t)
    with pytest.raises(ValueError, match=r"t must be \(5,\), one time for each x; got \(\)"):
        network(x, t[0])
    with pytest.raises(ValueError, match="label must be None"):
        network(x, t, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"label must be \(5,\), one label for each x; got \(5, 1\)"):
        conditional(x, t, torch.zeros(5, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"vector must be \(5, 4\), a row for each x; got \(4,\)"):
        conditional(x, t, None, torch.zeros(4))
    with pytest.raises(ValueError, match="vector must be"):
        network(x, t, None, torch.zeros(5, 4))


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_named(label):
    x, t = inputs()
    with pytest.raises(RuntimeError, match=r"label must be in \[0, 3\], where 3 means no label"):
        MLP((2,), classes=3)(x, t, torch.full((5,), label))
