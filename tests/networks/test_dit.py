"""The diffusion transformer: its published sizes, a peer's outputs, its shapes, and torch's transformations of it."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sde_diffusion.networks.dit import DiT, PositionEmbedding

SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
# Peebles & Xie 2023, table 4: parameters in millions, and Gflops with a multiply-add counted as one.
PAPER = {
    ("S", 8): (33, 0.36),
    ("S", 4): (33, 1.41),
    ("S", 2): (33, 6.06),
    ("B", 8): (131, 1.42),
    ("B", 4): (130, 5.56),
    ("B", 2): (130, 23.01),
    ("L", 8): (459, 5.01),
    ("L", 4): (458, 19.70),
    ("L", 2): (458, 80.71),
    ("XL", 8): (676, 7.39),
    ("XL", 4): (675, 29.05),
    ("XL", 2): (675, 118.64),
}


def randomised(data_shape=(2, 8, 8), **options):
    """A small network that is not the zero function."""
    torch.manual_seed(0)
    network = DiT(data_shape, **(SMALL | options)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(data_shape=(2, 8, 8), batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *data_shape, generator=generator, dtype=dtype)
    return x, torch.rand(batch, generator=generator, dtype=dtype)


def published_parameters(width, depth, patch, channels=4, out_channels=8, classes=1000):
    """Those of the authors' code, layer by layer, without its fixed position embedding."""

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    embeddings = linear(channels * patch**2, width) + linear(256, width) + linear(width, width) + (classes + 1) * width
    attention = linear(width, 3 * width) + linear(width, width)
    mlp = linear(width, 4 * width) + linear(4 * width, width)
    block = attention + mlp + linear(width, 6 * width)
    return embeddings + depth * block + linear(width, 2 * width) + linear(width, patch**2 * out_channels)


@pytest.mark.parametrize(("size", "patch"), list(PAPER))
def test_published_sizes(size, patch):
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        network = DiT((4, 32, 32), patch, width, depth, heads, classes=1000, out_channels=8)
        x, t, label = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.int64)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    millions, gflops = PAPER[size, patch]
    assert parameters == published_parameters(width, depth, patch)
    assert round(parameters / 1e6) == millions

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, t, label)
    # Each number of the paper is rounded to 0.01, and counts some operations besides products.
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.002, abs=0.005)


def test_exact_parameters():
    with torch.device("meta"):
        networks = [DiT((4, 32, 32), 2, *SIZES[size], classes=1000, out_channels=8) for size in SIZES]
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [32_865_056, 130_315_808, 457_840_672, 674_834_720]


class PublishedTimeFeatures(nn.Module):
    """The authors' cosines and sines of a time in steps; diffusers has other frequencies, and only in float32."""

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        phase = t.double()[:, None] * frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=1)


def peer_of(network):
    """diffusers' transformer with the weights of ours."""
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import get_2d_sincos_pos_embed
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    width, heads, depth = network.output.in_features, network.blocks[0].heads, len(network.blocks)
    height = network.data_shape[1]
    peer = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=network.data_shape[0],
        out_channels=network.out_channels,
        num_layers=depth,
        sample_size=height,
        patch_size=network.patch,
        num_embeds_ada_norm=network.classes,
        norm_eps=1e-6,
    ).eval()
    ours = network.state_dict()
    *modulations, last = range(0, (6 * depth + 2) * width, 6 * width)
    theirs = {}
    for kind in ("weight", "bias"):
        theirs[f"pos_embed.proj.{kind}"] = ours[f"patches.{kind}"]
        theirs[f"proj_out_1.{kind}"] = ours[f"modulation.{kind}"][last:]
        theirs[f"proj_out_2.{kind}"] = ours[f"output.{kind}"]
        for i, first in enumerate(modulations):
            block, own = f"transformer_blocks.{i}", f"blocks.{i}"
            theirs[f"{block}.norm1.linear.{kind}"] = ours[f"modulation.{kind}"][first : first + 6 * width]
            theirs[f"{block}.norm1.emb.timestep_embedder.linear_1.{kind}"] = ours[f"time_embedding.0.{kind}"]
            theirs[f"{block}.norm1.emb.timestep_embedder.linear_2.{kind}"] = ours[f"time_embedding.2.{kind}"]
            for name, part in zip("qkv", ours[f"{own}.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{block}.attn1.to_{name}.{kind}"] = part
            theirs[f"{block}.attn1.to_out.0.{kind}"] = ours[f"{own}.output.{kind}"]
            theirs[f"{block}.ff.net.0.proj.{kind}"] = ours[f"{own}.mlp.0.{kind}"]
            theirs[f"{block}.ff.net.2.{kind}"] = ours[f"{own}.mlp.2.{kind}"]
    sines, cosines = ours["time_embedding.0.weight"].chunk(2, dim=1)
    for i in range(depth):
        embedding = f"transformer_blocks.{i}.norm1.emb"
        theirs[f"{embedding}.timestep_embedder.linear_1.weight"] = torch.cat([cosines, sines], dim=1)
        theirs[f"{embedding}.class_embedder.embedding_table.weight"] = ours["condition.table.weight"]
    dtype = ours["output.weight"].dtype
    peer.to(dtype).load_state_dict(theirs)
    for block in peer.transformer_blocks:
        block.norm1.emb.time_proj = PublishedTimeFeatures()
    # The peer rounds it to float32.
    patches = height // network.patch
    peer.pos_embed.pos_embed = get_2d_sincos_pos_embed(width, patches, base_size=patches).to(dtype)[None]
    return peer


# In float32 the sinusoids of a late step are off by its rounding, and more.
@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"), [(torch.float32, (0, 3, 40), 1e-5), (torch.float64, (0, 500, 999), 1e-10)]
)
@pytest.mark.parametrize("patch", [2, 4])
def test_equals_diffusers(dtype, steps, tolerance, patch):
    network = randomised((3, 16, 16), patch=patch, width=24, heads=3, classes=10, out_channels=6, time_scale=1.0)
    network.to(dtype)
    x, _ = inputs((3, 16, 16), dtype=dtype)
    label = torch.tensor([3, 10, 0])
    with torch.no_grad():
        expected = peer_of(network)(x, torch.tensor(steps), label).sample
        output = network(x, torch.tensor(steps, dtype=dtype), label)
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


def test_starts_as_published():
    torch.manual_seed(0)
    network = DiT((4, 32, 32), width=96, depth=2, heads=2, classes=1000)

    def glorot(layer):
        fan_out, fan_in = layer.weight.flatten(1).shape
        return math.sqrt(2 / (fan_in + fan_out))

    block = network.blocks[1]
    linear = [network.patches, block.qkv, block.output, block.mlp[0], block.mlp[2]]
    normal = [network.time_embedding[0], network.time_embedding[2], network.condition.table]
    for layers, kurtosis, std in ((linear, 1.8, glorot), (normal, 3.0, lambda layer: 0.02)):
        for layer in layers:
            ratio = layer.weight.square().mean() / std(layer) ** 2
            # Its variance is (kurtosis - 1) / n: 1.8 for uniform and 3 for normal numbers.
            assert abs(ratio - 1) < 5 * math.sqrt((kurtosis - 1) / layer.weight.numel())
            if kurtosis == 1.8:
                assert layer.weight.abs().max() <= math.sqrt(3) * std(layer)
    for name, parameter in network.named_parameters():
        is_zero = name.endswith("bias") or name in ("modulation.weight", "output.weight")
        assert bool((parameter == 0).all()) == is_zero, name


def test_starts_as_the_zero_function():
    x, t = inputs()
    assert torch.equal(DiT((2, 8, 8), **SMALL)(x, t), torch.zeros_like(x))


def test_position_embedding_in_the_plane_is_the_published_one():
    table = PositionEmbedding((2, 5), 12).double().table
    # He et al. 2022: the column first, as its authors' code has it, and sines before cosines.
    frequencies = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    for row in range(2):
        for column in range(5):
            expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in frequencies]
            torch.testing.assert_close(table[5 * row + column].tolist(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 4)])
def test_positions_differ_and_outlive_a_cast_and_an_empty_copy(grid):
    position = PositionEmbedding(grid, 24)
    table = position.table
    assert table.shape == (math.prod(grid), 24)
    assert (torch.cdist(table, table) + torch.eye(len(table)) > 0.1).all()
    assert position.state_dict() == {}
    with torch.device("meta"):
        empty = PositionEmbedding(grid, 24)
    torch.testing.assert_close(empty.to_empty(device=table.device).table, table, rtol=0, atol=0)
    assert position.bfloat16().table.dtype == torch.bfloat16
    double = position.double().table
    assert double.dtype == torch.float64
    assert not torch.equal(double, double.float().double())
    torch.testing.assert_close(position.float().table, table, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("data_shape", "patch"),
    [((3, 8), 2), ((1, 12), 4), ((1, 8, 12), 4), ((2, 6, 3), 3), ((2, 4, 4), 1), ((3, 4, 4), 4), ((2, 2, 4, 6), 2)],
)
@pytest.mark.parametrize("out_channels", [None, 5])
def test_shapes(data_shape, patch, out_channels):
    network = randomised(data_shape, patch=patch, width=12, out_channels=out_channels)
    x, t = inputs(data_shape)
    output = network(x, t)
    assert output.shape == (3, out_channels or data_shape[0], *data_shape[1:])
    assert output.isfinite().all()
    # No place has been left out or filled twice.
    assert len(output[0].unique()) == output[0].numel()


class Numbered(nn.Module):
    """A last layer that numbers its outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, tokens):
        shape = (*tokens.shape[:2], self.outputs)
        return torch.arange(math.prod(shape)).reshape(shape)


@given(
    grid=st.lists(st.integers(1, 4), min_size=1, max_size=3), patch=st.integers(1, 3), out_channels=st.integers(1, 3)
)
def test_every_output_of_a_patch_has_its_place(grid, patch, out_channels):
    data_shape = (1, *(size * patch for size in grid))
    network = DiT(data_shape, patch, width=12, depth=1, heads=1, out_channels=out_channels)
    outputs = patch ** len(grid) * out_channels
    network.output = Numbered(outputs)
    output = network(*inputs(data_shape, batch=2))
    index = torch.meshgrid(*(torch.arange(size) for size in output.shape), indexing="ij")
    token = inside = torch.zeros_like(output)
    for size, place in zip(grid, index[2:], strict=True):
        token, inside = token * size + place // patch, inside * patch + place % patch
    expected = (index[0] * math.prod(grid) + token) * outputs + inside * out_channels + index[1]
    assert torch.equal(output, expected)


@pytest.mark.parametrize("data_shape", [(2, 12), (2, 8, 12), (2, 4, 4, 8)])
def test_without_blocks_a_patch_sees_itself_alone(data_shape):
    network = randomised(data_shape, width=12)
    nn.init.zeros_(network.modulation.weight)
    nn.init.zeros_(network.modulation.bias)
    x, t = inputs(data_shape, batch=1)
    changed = x.clone()
    # The second patch along every axis.
    changed[(0, 0, *[3] * (x.ndim - 2))] += 1
    is_changed = (network(x, t) != network(changed, t))[0]
    expected = torch.zeros_like(is_changed)
    expected[(slice(None), *[slice(2, 4)] * (x.ndim - 2))] = True
    assert torch.equal(is_changed, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_shape": (2,)}, r"data_shape must be \(C, L\), .* by 2, the patch; got \(2,\)"),
        ({"data_shape": ()}, r"data_shape must be .*; got \(\)"),
        ({"data_shape": (1, 2, 2, 2, 2)}, r"data_shape must be .*; got \(1, 2, 2, 2, 2\)"),
        ({"data_shape": (2, 8, 9)}, r"data_shape must be .* divisible by 2, the patch; got \(2, 8, 9\)"),
        ({"data_shape": (0, 8, 8)}, r"data_shape must be"),
        ({"data_shape": (1, 0, 8)}, r"data_shape must be"),
        ({"patch": 0}, "patch must be at least 1; got 0"),
        ({"patch": 3}, "data_shape must be .* divisible by 3, the patch"),
        ({"width": 18}, "width must be a multiple of 4, at least 8, for 2 axes; got 18"),
        ({"width": 4, "heads": 1}, "width must be a multiple of 4, at least 8, for 2 axes; got 4"),
        ({"width": 16, "data_shape": (1, 2, 2, 2)}, "width must be a multiple of 6, at least 12, for 3 axes; got 16"),
        ({"width": 0}, "width must be a multiple of 4"),
        ({"heads": 3}, "heads must divide width, 16; got 3"),
        ({"heads": 0}, "heads must be at least 1; got 0"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"mlp_ratio": 0.01}, "mlp_ratio must give at least one hidden unit for width 16; got 0.01"),
        ({"classes": -1}, "classes must be at least 0; got -1"),
        ({"vector": -1}, "vector must be at least 0; got -1"),
        ({"out_channels": 0}, "out_channels must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiT(**({"data_shape": (2, 8, 8)} | SMALL | options))


def test_bad_inputs_are_named():
    network, labelled = randomised(), randomised(classes=3, vector=4)
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
    with pytest.raises(ValueError, match=r"vector must be \(3, 4\)"):
        labelled(x, t, vector=torch.zeros(3, 5))


def test_time_and_conditions_matter_and_none_means_no_condition():
    network = randomised(classes=3, vector=4)
    x, t = inputs()
    label, vector = torch.tensor([0, 1, 2]), torch.ones(3, 4)
    output = network(x, t, label, vector)
    for other in (
        network(x, t + 0.1, label, vector),
        network(x, t, label.roll(1), vector),
        network(x, t, label, -vector),
    ):
        assert ((other - output).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
    torch.testing.assert_close(network(x, t, None, vector), network(x, t, torch.full((3,), 3), vector))
    torch.testing.assert_close(network(x, t, label), network(x, t, label, torch.zeros(3, 4)))
    assert not torch.allclose(network(x, t, None, vector), output)


def test_an_image_does_not_see_its_neighbours():
    network = randomised(classes=3).double()
    x, t = inputs(dtype=torch.float64)
    label = torch.tensor([0, 3, 1])
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(x, t, label), alone, rtol=0, atol=1e-12)


def test_every_parameter_has_a_gradient():
    network = randomised(classes=3, vector=2)
    x, t = inputs()
    network(x, t, None, torch.ones(3, 2)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("data_shape", [(1, 8), (1, 8, 8), (3, 8, 8), (3, 4, 4, 8)])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_tokens_lie_side_by_side_and_keep_their_digits(data_shape, bfloat16):
    network, seen = randomised(data_shape, width=24), []
    for block in network.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.extend([inputs[0], output]))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = network(*inputs(data_shape))
    assert len(seen) == 4
    assert all(tokens.is_contiguous() and tokens.dtype == torch.float32 for tokens in seen)
    assert output.dtype == (torch.bfloat16 if bfloat16 else torch.float32)


@pytest.mark.parametrize(
    ("data_shape", "order"), [((2, 8, 8), torch.channels_last), ((2, 4, 4, 8), torch.channels_last_3d)]
)
def test_patches_come_as_tokens_without_a_copy(data_shape, order):
    network = randomised(data_shape, width=24)
    assert network.patches(inputs(data_shape)[0]).is_contiguous(memory_format=order)


def test_float64_agrees_with_float32():
    network, (x, t) = randomised(), inputs()
    single = network(x, t)
    double = network.double()(x.double(), t.double())
    assert double.dtype == torch.float64
    # The largest error of float32 is that of the phase, up to 1000 radians: 1000 * 2^-24 for each operation.
    assert (single - double).norm() < 4 * 1000 * 2.0**-24 * double.norm()
    # A change of t far below float32's resolution is seen.
    assert not torch.equal(network(x.double(), t.double() + 1e-10), double)


def test_bfloat16_autocast_is_close_and_so_are_its_gradients():
    network, (x, t) = randomised(), inputs()
    parameters = tuple(network.parameters())
    exact = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x, t)
    # Nine operations in sequence in each block and six outside, and as many backward, each with a relative rounding
    # error of at most 2^-9, of independent signs.
    bound = math.sqrt(24) * 2.0**-9
    assert 0 < (output - exact).norm() < bound * exact.norm()
    losses = [values.float().square().mean() for values in (exact, output)]
    assert abs(losses[1] / losses[0] - 1) < 2 * bound
    exact, rounded = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses)
    assert (rounded - exact).norm() < 2 * bound * exact.norm()


def test_works_in_bfloat16_throughout():
    network, (x, t) = randomised().bfloat16(), inputs(dtype=torch.bfloat16)
    output = network(x, t)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_compiles_whole_and_once():
    network, compilations = randomised(classes=3), []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    x, t = inputs()
    label = torch.tensor([0, 3, 1])
    torch.testing.assert_close(compiled(x, t, label), network(x, t, label), rtol=0, atol=0)
    compiled(x + 1, t / 2, label)
    assert len(compilations) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_gradients_are_those_of_eager(checkpointing):
    network, (x, t) = randomised(depth=1, checkpointing=checkpointing).train(), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (network, compiled):
        gradients.append(torch.autograd.grad(function(x, t).square().sum(), tuple(network.parameters())))
    torch.testing.assert_close(*gradients)


def kept_bytes(network, x, t):
    """Of the tensors kept for the backward pass, each storage once, without the network's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x, t)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_checkpointing_changes_memory_only():
    x, t = inputs()
    plain, checkpointing = randomised().train(), randomised(checkpointing=True).train()
    gradients = [
        torch.autograd.grad(network(x, t).square().sum(), tuple(network.parameters()))
        for network in (plain, checkpointing)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)

    # Of one block more: the tokens it is given, 16 a datum, and its part of the modulations.
    tokens, modulations = 3 * 16 * 16 * 4, 3 * 6 * 16 * 4
    with_one, with_two = (
        [kept_bytes(randomised(depth=depth, checkpointing=kept).train(), x, t) for kept in (False, True)]
        for depth in (1, 2)
    )
    assert with_two[1] - with_one[1] == tokens + modulations
    assert with_two[0] - with_one[0] > 15 * tokens
    assert kept_bytes(checkpointing.eval(), x, t) == with_two[0]


def test_derivatives_agree_with_differences_and_with_each_other():
    network = randomised().double()
    x, t = inputs(dtype=torch.float64)
    u, v = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # A central difference errs by h^2 times a third derivative and by 2^-53 / h.
    h = 1e-5

    def function(x):
        return network(x, t)

    def gradient(x):
        x = x.requires_grad_()
        return torch.autograd.grad((u * function(x)).sum(), x, create_graph=True)[0]

    pullback = torch.func.vjp(function, x)[1]
    with sdpa_kernel(SDPBackend.MATH):
        output, pushed = torch.func.jvp(function, (x,), (v,))[:2]
        point = x.clone().requires_grad_()
        twice = torch.autograd.grad((gradient(point) * v).sum(), point)[0]
        difference = (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)
    torch.testing.assert_close(output, function(x))
    torch.testing.assert_close((u * pushed).sum(), (pullback(u)[0] * v).sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(pushed, (function(x + h * v) - function(x - h * v)) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(twice, difference, rtol=1e-5, atol=1e-7)


def test_weights_load_into_a_network_built_without_memory():
    network, (x, t) = randomised(classes=3), inputs()
    with torch.device("meta"):
        other = DiT((2, 8, 8), **SMALL, classes=3)
    other.to_empty(device=x.device).load_state_dict(network.state_dict())
    torch.testing.assert_close(other(x, t), network(x, t), rtol=0, atol=0)


def test_a_label_goes_through_vmap():
    network = DiT((1, 4, 4), width=16, depth=1, heads=2, classes=3)
    nn.init.normal_(network.output.weight)
    x, t, label = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 2])
    one_by_one = torch.func.vmap(lambda x, t, label: network(x[None], t[None], label[None])[0])
    torch.testing.assert_close(one_by_one(x, t, label), network(x, t, label))
