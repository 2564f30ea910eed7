"""The U-Net: its size, its shapes, its errors, and how it behaves under torch's transformations."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sde_diffusion.networks.blocks import SelfAttention
from sde_diffusion.networks.unet import UNet

SMALL: dict[str, Any] = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_resolutions": (4,),
}


def randomised(data_shape=(2, 8, 8), **options):
    """A small network that is not the zero function."""
    torch.manual_seed(0)
    network = UNet(data_shape, **(SMALL | options)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(data_shape=(2, 8, 8), batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *data_shape, generator=generator, dtype=dtype)
    return x, torch.rand(batch, generator=generator, dtype=dtype)


def test_defaults_are_the_network_of_ddpm_for_cifar10():
    with torch.device("meta"):
        network = UNet((3, 32, 32))
    # The paper says 35.7 million; 35,746,307 is the size of its released checkpoint.
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    # At 16 x 16, two blocks on the way down and three on the way up, and the middle.
    assert sum(isinstance(module, SelfAttention) for module in network.modules()) == 6


@pytest.mark.parametrize("data_shape", [(1, 8, 8), (2, 8, 12), (3, 8, 2), (5, 16, 8)])
@pytest.mark.parametrize("multipliers", [(2,), (1, 3), [1, 1]])
def test_shapes(data_shape, multipliers):
    network = randomised(data_shape, channel_multipliers=multipliers, attention_resolutions=[data_shape[1]])
    x, t = inputs(data_shape)
    output = network(x, t)
    assert output.shape == x.shape
    assert output.isfinite().all()


def test_output_channels():
    x, t = inputs()
    output = randomised(out_channels=4)(x, t)
    assert output.shape == (3, 4, 8, 8)
    assert (output.flatten(2).std(2) > 0).all()


def test_starts_as_the_zero_function():
    x, t = inputs()
    assert torch.equal(UNet((2, 8, 8), **SMALL)(x, t), torch.zeros_like(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_shape": (2,)}, r"data_shape must be \(C, H, W\).*got \(2,\)"),
        ({"data_shape": (2, 8, 9)}, r"data_shape must be .* divisible by 2, for 2 levels; got \(2, 8, 9\)"),
        ({"data_shape": (0, 8, 8)}, r"data_shape must be"),
        ({"channel_multipliers": ()}, "channel_multipliers must name at least one level"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers must be at least 1; got 0"),
        ({"attention_resolutions": (4, 7)}, r"attention_resolutions must be among .*\[8, 4\].* got \[7\]"),
        ({"base_channels": 7}, "base_channels must be even and at least 4; got 7"),
        ({"heads": 3}, "heads must divide base_channels, 8; got 3"),
        ({"groups": 0}, "groups must divide base_channels, 8; got 0"),
        ({"blocks_per_level": 0}, "blocks_per_level must be at least 1; got 0"),
        ({"classes": -1}, "classes must be at least 0; got -1"),
        ({"out_channels": 0}, "out_channels must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**({"data_shape": (2, 8, 8)} | SMALL | options))


def test_bad_inputs_are_named():
    network, labelled = randomised(), randomised(classes=3)
    x, t = inputs()
    for bad in (x[0], x[:, :1], x[..., :4], x[..., None]):
        with pytest.raises(ValueError, match=r"x must be \(B, \*data_shape\) with data_shape \(2, 8, 8\)"):
            network(bad, t)
    for bad in (t[0], t[:2], t[:, None]):
        with pytest.raises(ValueError, match=r"t must be \(3,\)"):
            network(x, bad)
    with pytest.raises(ValueError, match="label must be None for a network built with classes=0"):
        network(x, t, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"label must be \(3,\), one label for each x; got \(1,\)"):
        labelled(x, t, torch.zeros(1, dtype=torch.int64))


def test_time_and_label_matter_and_none_is_the_null_label():
    network = randomised(classes=3)
    x, t = inputs()
    output = network(x, t, torch.tensor([0, 1, 2]))
    for other in (network(x, t + 0.1, torch.tensor([0, 1, 2])), network(x, t, torch.tensor([1, 2, 0]))):
        assert ((other - output).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
    torch.testing.assert_close(network(x, t), network(x, t, torch.full((3,), 3)))
    assert not torch.allclose(network(x, t), output)


def test_an_image_does_not_see_its_neighbours():
    network = randomised().double()
    x, t = inputs(dtype=torch.float64)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(x, t), alone, rtol=0, atol=1e-12)


def test_dropout_acts_in_training_only():
    network = randomised(dropout=0.5)
    x, t = inputs()
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.allclose(network(x, t), network(x, t))


def test_every_parameter_has_a_gradient():
    network = randomised(classes=3)
    x, t = inputs()
    network(x, t).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_image_inside_is_channels_last(channels, bfloat16):
    network = randomised((channels, 8, 8))
    seen = []

    def record(module, inputs, output):
        if output.ndim == 4:
            seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in network.modules():
        module.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        network(*inputs((channels, 8, 8)))
    assert len(seen) > 40
    assert all(seen)


def test_float64_agrees_with_float32():
    network, (x, t) = randomised(), inputs()
    single = network(x, t)
    double = network.double()(x.double(), t.double())
    assert double.dtype == torch.float64
    # The largest error of float32 is that of the phase, up to 1000 radians: 1000 * 2^-24 for each operation.
    assert (single - double).norm() < 4 * 1000 * 2.0**-24 * double.norm()
    # A change of t far below float32's resolution is seen.
    assert not torch.equal(network(x.double(), t.double() + 1e-10), double)


def test_bfloat16_autocast_is_close_and_has_finite_gradients():
    network, (x, t) = randomised(), inputs()
    exact = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x, t)
    # Some 40 operations in sequence, each with a relative rounding error of at most 2^-9.
    assert (output - exact).norm() < 40 * 2.0**-9 * exact.norm()
    output.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_compiles_whole_and_once():
    network, compilations = randomised(classes=3), []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    x, t = inputs()
    torch.testing.assert_close(compiled(x, t), network(x, t), rtol=0, atol=0)
    compiled(x + 1, t / 2)
    assert len(compilations) == 1


def test_compiled_gradients_are_those_of_eager():
    network, (x, t) = randomised(channel_multipliers=(1,), attention_resolutions=()), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (network, compiled):
        gradients.append(torch.autograd.grad(function(x, t).square().sum(), tuple(network.parameters())))
    torch.testing.assert_close(*gradients)


def test_reverse_and_forward_derivatives_agree_with_differences():
    network = randomised().double()
    x, t = inputs(dtype=torch.float64)
    u, v = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def function(x):
        return network(x, t)

    pullback = torch.func.vjp(function, x)[1]
    with sdpa_kernel(SDPBackend.MATH):
        output, pushed = torch.func.jvp(function, (x,), (v,))[:2]
    torch.testing.assert_close(output, function(x))
    torch.testing.assert_close((u * pushed).sum(), (pullback(u)[0] * v).sum(), rtol=1e-9, atol=0)
    # A central difference errs by h^2 times a third derivative and by 2^-53 / h.
    h = 1e-5
    torch.testing.assert_close(pushed, (function(x + h * v) - function(x - h * v)) / (2 * h), rtol=1e-5, atol=1e-7)


def test_weights_load_into_a_network_built_without_memory():
    network, (x, t) = randomised(classes=3), inputs()
    with torch.device("meta"):
        other = UNet((2, 8, 8), **SMALL, classes=3)
    other.to_empty(device=x.device).load_state_dict(network.state_dict())
    torch.testing.assert_close(other(x, t), network(x, t), rtol=0, atol=0)


def test_weights_are_contiguous():
    assert all(parameter.is_contiguous() for parameter in UNet((2, 8, 8), **SMALL).parameters())
