"""The multilayer perceptron against its formula, and under torch's transformations."""

import pytest
import torch

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


def test_time_and_label_matter_and_none_is_the_null_label():
    torch.manual_seed(0)
    network = MLP((2,), classes=3)
    x, t = inputs()
    label = torch.tensor([0, 1, 2, 0, 1])
    output = network(x, t, label)
    for other in (network(x, t + 0.1, label), network(x, t, (label + 1) % 3)):
        assert ((other - output).abs().amax(dim=1) > 1e-4).all()
    torch.testing.assert_close(network(x, t), network(x, t, torch.full((5,), 3)))
    assert not torch.allclose(network(x, t), output)


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
    network, compilations = MLP((2,), classes=3), []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    x, t = inputs()
    torch.testing.assert_close(compiled(x, t), network(x, t), rtol=0, atol=0)
    compiled(x + 1, t / 2)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "step"}, "activation must be one of silu, relu, gelu, tanh; got 'step'"),
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"classes": -1}, "classes must be at least 0; got -1"),
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
    network = MLP((2,))
    x, t = inputs()
    with pytest.raises(ValueError, match=r"x must be \(B, \*data_shape\) with data_shape \(2,\); got \(5, 1\)"):
        network(x[:, :1], t)
    with pytest.raises(ValueError, match=r"t must be \(5,\), one time for each x; got \(\)"):
        network(x, t[0])
    with pytest.raises(ValueError, match="label must be None"):
        network(x, t, torch.zeros(5, dtype=torch.int64))
