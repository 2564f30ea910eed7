"""The U-Net: its size, its shapes, its options, its errors, and how it behaves under torch's transformations.

That its layers are joined as those of DDPM and ADM is held against diffusers, in test_diffusers_unet.py.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from sde_diffusion.networks.blocks import SelfAttention, double, halve
from sde_diffusion.networks.unet import ImageInput, ImageOutput, UNet

SMALL: dict[str, Any] = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_resolutions": (4,),
}
FOURIER = {"time_features": "fourier", "time_scale": 1.0}
EVERYTHING = {
    "resampling": "fir",
    "progressive_input": "residual",
    "progressive_output": "skip",
    "project_resampled": True,
    "rescale": True,
    "scale_shift": True,
    "head_channels": 4,
    "up_attention": "last",
    "initialisation": "fan_average_small_attention",
    "classes": 3,
    "vector": 2,
    **FOURIER,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "shifted": {"resampling": "conv_shifted", "time_features": "transformer", "up_attention": "last"},
    "average": {"resampling": "average", "scale_shift": True, "head_channels": 4, "initialisation": "torch"},
    "fir": {"resampling": "fir", "project_resampled": True, "rescale": True, **FOURIER},
    "skips": {"resampling": "average", "progressive_input": "skip", "progressive_output": "skip", "norm_epsilon": 0.1},
    "residual": {"resampling": "average", "progressive_input": "residual", "channel_multipliers": (1, 2, 3)},
    "conditions": {"classes": 3, "vector": 2, "heads": 2, "groups": 2},
    "everything": EVERYTHING,
    "everything, three levels": EVERYTHING | {"channel_multipliers": (1, 2, 1), "attention_resolutions": (8, 2)},
}
SHAPES = [(2, 8), (1, 8, 8), (3, 8, 12), (2, 8, 4, 4)]

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
some_options = pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["default", "everything"])


def built(data_shape=(2, 8, 8), **options):
    torch.manual_seed(0)
    return UNet(data_shape, **(SMALL | options)).eval()


def randomised(data_shape=(2, 8, 8), **options):
    """A small network that is not the zero function."""
    network = built(data_shape, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(network, batch=3, dtype=torch.float32):
    """(x, t, label, vector) for a network, with None for what it does not take."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *network.data_shape, generator=generator, dtype=dtype)
    t = torch.rand(batch, generator=generator, dtype=dtype)
    label = torch.arange(batch) % (network.classes + 1) if network.classes else None
    vector = torch.randn(batch, network.vector, generator=generator, dtype=dtype) if network.vector else None
    return x, t, label, vector


def test_defaults_are_the_network_of_ddpm_for_cifar10():
    with torch.device("meta"):
        network = UNet((3, 32, 32))
    # The paper says 35.7 million; 35,746,307 is the size of its released checkpoint.
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    # At 16 x 16, two blocks on the way down and three on the way up, and the middle.
    assert sum(isinstance(module, SelfAttention) for module in network.modules()) == 6


@every_option
@pytest.mark.parametrize("data_shape", SHAPES, ids=str)
def test_it_starts_as_the_zero_function_and_learns_with_every_parameter(data_shape, options):
    network = built(data_shape, **options)
    x, *rest = inputs(network)
    assert torch.equal(network(x, *rest), torch.zeros_like(x))

    network = randomised(data_shape, **options)
    output = network(x, *rest)
    assert output.shape == x.shape
    assert output.isfinite().all()
    assert (output.flatten(1).std(1) > 0).all()
    output.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("data_shape", [(1, 8, 8), (2, 8, 12), (3, 8, 2), (5, 16, 8)])
@pytest.mark.parametrize("multipliers", [(2,), (1, 3), [1, 1]])
def test_shapes(data_shape, multipliers):
    network = randomised(data_shape, channel_multipliers=multipliers, attention_resolutions=[data_shape[1]])
    x, t, *_ = inputs(network)
    output = network(x, t)
    assert output.shape == x.shape
    assert output.isfinite().all()


@some_options
def test_output_channels(options):
    network = randomised(out_channels=4, **options)
    output = network(*inputs(network))
    assert output.shape == (3, 4, 8, 8)
    assert (output.flatten(2).std(2) > 0).all()


@pytest.mark.parametrize(
    ("options", "heads"),
    [({}, [1, 1]), ({"heads": 2}, [2, 2]), ({"head_channels": 4}, [6, 4]), ({"head_channels": 8}, [3, 2])],
)
def test_heads_by_number_or_by_channels(options, heads):
    network = built(channel_multipliers=(1, 3, 2), **options)
    attentions = [stage.attention for stage in network.down if stage.attention] + [network.middle[0].attention]
    assert [attention.heads for attention in attentions] == heads


@pytest.mark.parametrize(("up_attention", "count"), [("every", 2), ("last", 1)])
def test_attention_on_the_way_up(up_attention, count):
    network = built(up_attention=up_attention)
    attends = [stage.attention is not None for stage in network.up]
    # Two blocks at 4 x 4, the doubling, two blocks at 8 x 8.
    assert attends == [count == 2, True, False, False, False]


def test_groups_and_epsilon_are_those_of_every_normalisation():
    network = built(groups=4, norm_epsilon=0.5, resampling="average", progressive_output="skip")
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) > 10
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(4, 0.5)}


def recorded(network, kind):
    """(input, output) of every convolution of the modules of that kind, filled by a call."""
    calls = []
    for module in network.modules():
        if isinstance(module, kind):
            module.conv.register_forward_hook(lambda layer, given, made: calls.append((given[0], made)))
    return calls


@pytest.mark.parametrize("resampling", ["average", "fir"])
def test_progressive_input_is_the_halved_image(resampling):
    network = randomised(channel_multipliers=(1, 1, 1), resampling=resampling, progressive_input="skip")
    calls, (x, t, *_) = recorded(network, ImageInput), inputs(network)
    network(x, t)
    half = halve(x, resampling)
    torch.testing.assert_close([image for image, _ in calls], [half, halve(half, resampling)], rtol=0, atol=0)


def test_progressive_input_of_a_residual_pyramid_is_the_sum_before():
    network = randomised(channel_multipliers=(1, 1, 1), resampling="fir", progressive_input="residual", rescale=True)
    calls, (x, t, *_) = recorded(network, ImageInput), inputs(network)
    features = []
    for stage in network.down:
        if stage.image is not None:
            stage.register_forward_hook(lambda layer, given, made: features.append(made))
    network(x, t)
    (first, halved), (second, _) = calls
    assert torch.equal(first, x)
    torch.testing.assert_close(second, (features[0] + halved) / 2**0.5)


@pytest.mark.parametrize("resampling", ["average", "fir"])
def test_progressive_output_is_the_sum_of_the_doubled_parts(resampling):
    network = randomised(channel_multipliers=(1, 1, 1), resampling=resampling, progressive_output="skip")
    calls, (x, t, *_) = recorded(network, ImageOutput), inputs(network)
    output = network(x, t)
    coarse, middle, fine = (part for _, part in calls)
    assert [part.shape[-1] for part in (coarse, middle, fine)] == [2, 4, 8]
    torch.testing.assert_close(output, fine + double(middle + double(coarse, resampling), resampling))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_shape": (2,)}, r"data_shape must be \(C, L\), \(C, H, W\) or \(C, D, H, W\).*got \(2,\)"),
        ({"data_shape": (2, 8, 8, 8, 8)}, r"data_shape must be .*; got \(2, 8, 8, 8, 8\)"),
        ({"data_shape": (2, 8, 9)}, r"data_shape must be .* divisible by 2, for 2 levels; got \(2, 8, 9\)"),
        ({"data_shape": (0, 8, 8)}, r"data_shape must be"),
        ({"channel_multipliers": ()}, "channel_multipliers must name at least one level"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers must be at least 1; got 0"),
        ({"channel_multipliers": (1, 1.5)}, "channel_multipliers must be whole; got 1.5"),
        ({"attention_resolutions": (4, 7)}, r"attention_resolutions must be among .*\[8, 4\].* got \[7\]"),
        ({"base_channels": 7}, "base_channels must be even and at least 4; got 7"),
        ({"base_channels": 2}, "base_channels must be even and at least 4; got 2"),
        ({"heads": 3}, "heads must divide the channels of every attention, 16; got 3"),
        ({"heads": 0}, "heads must divide the channels of every attention, 16; got 0"),
        ({"heads": 2, "head_channels": 4}, "heads must be left at 1 where head_channels is given; got 2"),
        ({"head_channels": 3}, "head_channels must divide the channels of every attention, 16; got 3"),
        ({"head_channels": 0}, "head_channels must divide the channels of every attention, 16; got 0"),
        (
            {"head_channels": 16, "attention_resolutions": (8,)},
            "head_channels must divide the channels of every attention, 8; got 16",
        ),
        ({"groups": 0}, "groups must divide base_channels, 8; got 0"),
        ({"groups": 16}, "groups must divide base_channels, 8; got 16"),
        ({"blocks_per_level": 0}, "blocks_per_level must be at least 1; got 0"),
        ({"classes": -1}, "classes must be at least 0; got -1"),
        ({"vector": -2}, "vector must be at least 0; got -2"),
        ({"out_channels": 0}, "out_channels must be at least 1; got 0"),
        ({"time_features": "random"}, "time_features must be one of ddpm, transformer, fourier; got 'random'"),
        ({"resampling": "max"}, "resampling must be one of conv, conv_shifted, average, fir; got 'max'"),
        ({"up_attention": "first"}, "up_attention must be one of every, last; got 'first'"),
        ({"progressive_input": "sum"}, "progressive_input must be one of none, skip, residual; got 'sum'"),
        ({"progressive_output": "residual"}, "progressive_output must be one of none, skip; got 'residual'"),
        ({"initialisation": "zero"}, "initialisation must be one of fan_average, .*torch; got 'zero'"),
        ({"progressive_input": "skip"}, "progressive_input must be none with resampling 'conv'; got 'skip'"),
        (
            {"progressive_output": "skip", "resampling": "conv_shifted"},
            "progressive_output must be none with resampling 'conv_shifted'; got 'skip'",
        ),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**({"data_shape": (2, 8, 8)} | SMALL | options))


def test_bad_inputs_are_named():
    network, conditional = randomised(), randomised(classes=3, vector=2)
    x, t, *_ = inputs(network)
    for bad in (x[0], x[:, :1], x[..., :4], x[..., None]):
        with pytest.raises(ValueError, match=r"x must be \(B, \*data_shape\) with data_shape \(2, 8, 8\)"):
            network(bad, t)
    for bad in (t[0], t[:2], t[:, None]):
        with pytest.raises(ValueError, match=r"t must be \(3,\)"):
            network(x, bad)
    with pytest.raises(ValueError, match="label must be None for a network built with classes=0"):
        network(x, t, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"label must be \(3,\), one label for each x; got \(1,\)"):
        conditional(x, t, torch.zeros(1, dtype=torch.int64))
    for bad in (torch.zeros(2), torch.zeros(3, 1), torch.zeros(1, 2), torch.zeros(3, 2, 1)):
        with pytest.raises(ValueError, match=r"vector must be \(3, 2\), a row for each x; got"):
            conditional(x, t, None, bad)
    with pytest.raises(ValueError, match="vector must be"):
        network(x, t, None, torch.zeros(3, 2))


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_named(label):
    network = randomised(classes=3)
    x, t, *_ = inputs(network)
    with pytest.raises(RuntimeError, match=r"label must be in \[0, 3\], where 3 means no label"):
        network(x, t, torch.tensor([0, label, 1]))


@pytest.mark.parametrize("scale_shift", [False, True])
def test_time_label_and_vector_matter_and_none_is_the_null_one(scale_shift):
    network = randomised(classes=3, vector=2, scale_shift=scale_shift)
    x, t, _, vector = inputs(network)
    label = torch.tensor([0, 1, 2])
    output = network(x, t, label, vector)
    for other in (
        network(x, t + 0.1, label, vector),
        network(x, t, label.roll(1), vector),
        network(x, t, label, vector + 0.5),
    ):
        assert ((other - output).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
    for given, meant in (
        ((None, vector), (torch.full((3,), 3), vector)),
        ((label, None), (label, torch.zeros(3, 2))),
        ((None, None), (torch.full((3,), 3), torch.zeros(3, 2))),
    ):
        torch.testing.assert_close(network(x, t, *given), network(x, t, *meant))
        assert not torch.allclose(network(x, t, *given), output)


@every_option
def test_an_image_does_not_see_its_neighbours(options):
    network = randomised(**options).double()
    given = inputs(network, dtype=torch.float64)
    rows = [tuple(None if value is None else value[i : i + 1] for value in given) for i in range(3)]
    alone = torch.cat([network(*row) for row in rows])
    torch.testing.assert_close(network(*given), alone, rtol=0, atol=1e-12)


def test_dropout_acts_in_training_only():
    network = randomised(dropout=0.5)
    x, t, *_ = inputs(network)
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.allclose(network(x, t), network(x, t))


@every_option
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_image_inside_is_channels_last(channels, bfloat16, options):
    network = randomised((channels, 8, 8), **options)
    seen = {}

    def record(name):
        def hook(module, given, made):
            seen[name] = [image for image in (*given, made) if isinstance(image, torch.Tensor) and image.ndim == 4]

        return hook

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(record(name))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        seen["output"] = [network(*inputs(network))]
    assert sum(map(len, seen.values())) > 80
    wrong = [
        name
        for name, tensors in seen.items()
        if not all(image.is_contiguous(memory_format=torch.channels_last) for image in tensors)
    ]
    assert not wrong


@every_option
@pytest.mark.parametrize("data_shape", [(1, 8, 8), (2, 8, 4, 4)], ids=str)
def test_weights_and_their_gradients_are_channels_last(data_shape, options):
    network = randomised(data_shape, **options)
    memory_format = torch.channels_last if len(data_shape) == 3 else torch.channels_last_3d
    weights = {name: weight for name, weight in network.named_parameters() if weight.ndim == len(data_shape) + 1}
    assert len(weights) > 10
    network(*inputs(network)).square().mean().backward()
    for name, weight in weights.items():
        assert weight.is_contiguous(memory_format=memory_format), name
        assert weight.grad.is_contiguous(memory_format=memory_format), name


@every_option
def test_float64_agrees_with_float32(options):
    network = randomised(**options)
    x, t, label, vector = inputs(network)
    single = network(x, t, label, vector)
    network.double()
    vector = None if vector is None else vector.double()
    exact = network(x.double(), t.double(), label, vector)
    assert exact.dtype == torch.float64
    # The largest error of float32 is that of the phase, up to 1000 radians: 1000 * 2^-24 for each operation.
    assert (single - exact).norm() < 4 * 1000 * 2.0**-24 * exact.norm()
    # A change of t far below float32's resolution is seen.
    assert not torch.equal(network(x.double(), t.double() + 1e-10, label, vector), exact)


@some_options
def test_bfloat16_autocast_is_close_and_so_are_its_loss_and_gradients(options):
    network = randomised(**options)
    given = inputs(network)
    outputs, losses, gradients = [], [], []
    for is_coarse in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_coarse):
            output = network(*given)
        loss = output.float().square().mean()
        loss.backward()
        outputs.append(output)
        losses.append(loss)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
        network.zero_grad()
    assert outputs[1].dtype == torch.bfloat16
    # Some 40 operations in sequence, and as many backwards, each with a relative rounding error of at most 2^-9. Of
    # independent errors the squares add up.
    once, both = (4 * count**0.5 * 2.0**-9 for count in (40, 80))
    assert (outputs[1] - outputs[0]).norm() < once * outputs[0].norm()
    assert abs(losses[1] / losses[0] - 1) < 2 * once
    assert (gradients[1] - gradients[0]).norm() < both * gradients[0].norm()


COMPILED = {
    "default": {"attention_resolutions": ()},
    "everything": EVERYTHING,
    "checkpointing": {"checkpointing": True, "channel_multipliers": (1,), "attention_resolutions": ()},
}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_compiles_whole_and_once_with_the_gradients_of_eager(options):
    # In float64, as an eager step computes some things again from others and so rounds in another place.
    network = randomised(**options).train().double()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    x, t, *condition = inputs(network, dtype=torch.float64)
    for change in (0.0, 0.1, 0.2):
        outputs = [function(x + change, t - change, *condition) for function in (network, compiled)]
        torch.testing.assert_close(*outputs)
        gradients = [torch.autograd.grad(output.square().sum(), tuple(network.parameters())) for output in outputs]
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_the_default_compiler_gives_the_output_and_gradients_of_eager(options):
    network = randomised(**options).train().double()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True)
    given = inputs(network, dtype=torch.float64)
    outputs = [function(*given) for function in (network, compiled)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(output.square().sum(), tuple(network.parameters())) for output in outputs]
    torch.testing.assert_close(*gradients)


def saved_bytes(network, given):
    """Bytes that autograd keeps of a call, without the parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers(), *given)}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*given)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@some_options
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_output_gradients_and_random_state(dropout, options):
    results = []
    for checkpointing in (False, True):
        network = randomised(dropout=dropout, checkpointing=checkpointing, **options).train()
        given = inputs(network)
        torch.manual_seed(3)
        output = network(*given)
        gradients = torch.autograd.grad(output.square().sum(), tuple(network.parameters()))
        results.append((output, gradients, torch.rand(4)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@some_options
def test_checkpointing_keeps_less_in_training(options):
    plain, thrifty = (randomised(checkpointing=flag, blocks_per_level=2, **options) for flag in (False, True))
    given = tuple(value for value in inputs(plain) if value is not None)
    assert saved_bytes(thrifty, given) == saved_bytes(plain, given)
    # Of each block its input; else also each of some ten images inside.
    assert saved_bytes(thrifty.train(), given) < 0.3 * saved_bytes(plain.train(), given)


DERIVED = {
    "default": {},
    "fir, progressive": {"resampling": "fir", "progressive_input": "residual", "progressive_output": "skip"},
    "everything": EVERYTHING,
}


def scalar_products(options):
    """(function of x, x, u, v) in float64."""
    network = randomised(**options).double()
    x, *rest = inputs(network, dtype=torch.float64)
    u, v = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (lambda x: network(x, *rest)), x, u, v


@pytest.mark.parametrize("options", DERIVED.values(), ids=DERIVED)
def test_reverse_and_forward_derivatives_agree_with_differences(options):
    function, x, u, v = scalar_products(options)
    pullback = torch.func.vjp(function, x)[1]
    with sdpa_kernel(SDPBackend.MATH):
        output, pushed = torch.func.jvp(function, (x,), (v,))[:2]
    torch.testing.assert_close(output, function(x))
    torch.testing.assert_close((u * pushed).sum(), (pullback(u)[0] * v).sum(), rtol=1e-9, atol=0)
    # A central difference errs by h^2 times a third derivative and by 2^-53 / h.
    h = 1e-5
    torch.testing.assert_close(pushed, (function(x + h * v) - function(x - h * v)) / (2 * h), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", DERIVED.values(), ids=DERIVED)
def test_the_divergence_of_a_probe_has_a_gradient(options):
    function, x, _, v = scalar_products(options)

    def probe(x):
        return (torch.func.vjp(function, x)[1](v)[0] * v).sum()

    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.func.grad(probe)(x)
        h = 1e-5
        difference = (probe(x + h * v) - probe(x - h * v)) / (2 * h)
        x.requires_grad_()
        product = torch.autograd.grad(function(x), x, v, create_graph=True)[0]
        again = torch.autograd.grad((product * v).sum(), x)[0]
    torch.testing.assert_close((gradient * v).sum(), difference, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again, gradient)


def test_fused_attention_has_no_second_derivative_on_a_cpu():
    # Which is why the tests above ask torch for its plain attention. It may come with another version of torch.
    function, x, _, v = scalar_products({})
    x.requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        product = torch.autograd.grad(function(x), x, v, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="not implemented"):
            torch.autograd.grad((product * v).sum(), x)
        with pytest.raises(RuntimeError, match="not been implemented"):
            torch.func.jvp(function, (x.detach(),), (v,))


def test_weights_load_into_a_network_built_without_memory():
    network = randomised(**EVERYTHING)
    with torch.device("meta"):
        other = UNet((2, 8, 8), **(SMALL | EVERYTHING))
    other.to_empty(device="cpu").load_state_dict(network.state_dict())
    given = inputs(network)
    torch.testing.assert_close(other(*given), network(*given), rtol=0, atol=0)
