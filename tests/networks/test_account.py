"""The account of a network against counts by hand, and against what a real pass keeps."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sde_diffusion.networks import MLP, UNet
from sde_diffusion.networks.account import account, quantity

FLOAT = 4  # bytes


class Alone(nn.Module):
    """A layer as a user's network of (x, t)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t):
        return self.layer(x)


class Attention(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.qkv, self.output = heads, nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    """Residual blocks over a first layer; each block checkpointed or not."""

    def __init__(self, width, count, is_checkpointed):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)) for _ in range(count)
        )
        self.is_checkpointed = is_checkpointed

    def forward(self, x, t):
        x = self.first(x)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x))
        return x


def small_unet(**options):
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "attention_resolutions": (4,)}
    return UNet((1, 8, 8), **sizes, **options)


def test_convolutions_by_hand():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(4, 5, 4, stride=2, padding=1),
        nn.Conv2d(5, 2, 1, stride=2),
    )
    costs = account(Alone(layers), (3, 6, 8))
    pixels = 6 * 8
    first, up, last = (2 * pixels * weights for weights in (9 * 3 * 4, 16 * 4 * 5, 5 * 2))
    assert costs.forward_flops == first + up + last
    # The data need no gradient, which spares the first layer one of its two products.
    assert costs.backward_flops == first + 2 * up + 2 * last
    # The inputs of the four layers: the transposed convolution has doubled the height and width of the last.
    assert costs.kept_bytes == FLOAT * pixels * (3 + 4 + 4 + 4 * 5)
    assert costs.kept_bytes_a_step == 0
    assert costs.parameters == (9 * 3 * 4 + 4) + (16 * 4 * 5 + 5) + (5 * 2 + 2)


@settings(max_examples=15)
@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    is_transposed=st.booleans(),
)
def test_any_convolution(groups, channels, kernel, stride, is_transposed):
    given_channels, made = (groups * count for count in channels)
    kind = nn.ConvTranspose2d if is_transposed else nn.Conv2d
    layer = kind(given_channels, made, kernel, stride=stride, groups=groups)
    costs = account(Alone(nn.Sequential(nn.Conv2d(1, given_channels, 1), layer)), (1, 7, 5))
    before = 2 * 7 * 5 * given_channels
    positions = 7 * 5 if is_transposed else math.prod((size - kernel) // stride + 1 for size in (7, 5))
    flops = 2 * positions * kernel**2 * given_channels * made // groups
    assert costs.forward_flops == before + flops
    assert costs.backward_flops == before + 2 * flops


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_by_hand(heads):
    tokens, channels = 10, 8
    costs = account(Alone(Attention(channels, heads)), (tokens, channels))
    product = 2 * tokens * channels * channels
    assert costs.forward_flops == 3 * product + 4 * tokens**2 * channels + product
    # q k^T again, then two products for each of its own two.
    assert costs.backward_flops == 3 * product + 10 * tokens**2 * channels + 2 * product


def kept_by_a_real_pass(network, x, t, **cond):
    """Bytes of the storages that autograd keeps, without the network's own."""
    own = {tensor.data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(x, t, **cond)
    assert output.requires_grad
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "data_shape"),
    [
        (lambda: small_unet(dropout=0.1), (1, 8, 8)),
        (lambda: small_unet(classes=3), (1, 8, 8)),
        (lambda: MLP((2,), width=16, classes=3), (2,)),
        (lambda: Alone(Attention(8, 2)), (10, 8)),
        (lambda: Blocks(6, 3, is_checkpointed=True), (5, 6)),
    ],
    ids=["unet", "unet of classes", "mlp", "attention", "checkpointed"],
)
def test_kept_is_what_a_real_pass_keeps(build, data_shape, autocast):
    network = build()
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, *data_shape, generator=generator), torch.rand(4, generator=generator)
    cond = {"label": torch.tensor([0, 1, 2, 0])} if getattr(network, "classes", 0) else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        kept = kept_by_a_real_pass(network, x, t, **cond)
    # torch takes the two statistics of a group for bfloat16, where the kernel has float32: of 64 values or more.
    share = 2 * 2 / (2 * 64) if autocast else 0
    assert account(network, data_shape, autocast=autocast).kept_bytes_of(4) == pytest.approx(kept, rel=share, abs=0)


def test_flops_are_those_of_a_real_pass():
    network = small_unet()
    x, t = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    # Plain attention is two matrix products, which torch counts on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        output = network(x, t)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    costs = account(network)
    assert costs.forward_flops == forward.get_total_flops()
    # Attention on 4 x 4 positions of 16 channels computes q k^T again where plain attention has kept it.
    attentions, again = divmod(costs.backward_flops - backward.get_total_flops(), 2 * 16**2 * 16)
    assert attentions > 0
    assert again == 0


def test_autocast_keeps_halves_and_copies_of_the_weights():
    layers = nn.Sequential(nn.Linear(6, 40), nn.SiLU(), nn.Linear(40, 6))
    full, half = (account(Alone(layers), (6,), autocast=dtype) for dtype in (None, torch.bfloat16))
    assert full.kept_bytes == 2 * half.kept_bytes == FLOAT * (6 + 40 + 40)
    # No data need a gradient, which spares the copy of the first weight.
    assert (full.kept_bytes_a_step, half.kept_bytes_a_step) == (0, 2 * 6 * 40)
    assert half.kept_bytes_of(7) == 2 * (6 * 40 + 7 * (6 + 40 + 40))
    assert (half.forward_flops, half.weight_bytes) == (full.forward_flops, full.weight_bytes)


def test_checkpointing_keeps_less_and_computes_again():
    width, count = 6, 3
    plain, thrifty = (account(Blocks(width, count, is_checkpointed=flag), (width,)) for flag in (False, True))
    layer = 2 * width * 4 * width
    assert thrifty.forward_flops == plain.forward_flops == 2 * width**2 + 2 * count * layer
    assert [layer.forward_flops for layer in thrifty.layers[: 1 + count]] == [2 * width**2, *[2 * layer] * count]
    # Of a block only its input; else also what the activation and the second layer were given.
    assert thrifty.kept_bytes == FLOAT * width * (1 + count)
    assert plain.kept_bytes == FLOAT * width * (1 + count * (1 + 4 + 4))
    # The second layer's output is not needed again.
    assert thrifty.backward_flops == plain.backward_flops + count * layer


def test_training_state_by_hand():
    costs = account(Alone(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), (3,))
    trained = FLOAT * (3 * 4 + 4 + 2 * 4)
    buffers = FLOAT * 2 * 4 + 8  # two running moments and a count
    assert costs.weight_bytes == costs.average_bytes == trained + buffers
    assert (costs.gradient_bytes, costs.moment_bytes) == (trained, 2 * trained)
    assert costs.training_bytes == 5 * trained + 2 * buffers

    network = Alone(nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 3)))
    costs = account(network, (3,))
    assert costs.weight_bytes == FLOAT * (3 * 4 + 4 + 4 * 3 + 3)
    assert costs.gradient_bytes == FLOAT * (4 * 3 + 3)
    # Of the frozen layer nothing is asked, and so of the trained one no gradient by its input.
    assert costs.backward_flops == 2 * 4 * 3
    assert costs.kept_bytes == FLOAT * 4


def test_a_network_that_is_all_frozen_is_counted_as_if_trained():
    network = small_unet(dropout=0.1)
    expected = account(network)
    with torch.no_grad():
        assert account(network.requires_grad_(False).eval()) == expected


def test_float64_keeps_twice_as_much():
    single, double = account(MLP((2,), width=16)), account(MLP((2,), width=16).double())
    assert (double.kept_bytes, double.weight_bytes) == (2 * single.kept_bytes, 2 * single.weight_bytes)
    assert double.forward_flops == single.forward_flops


def test_the_published_network_for_cifar10():
    """Of Ho et al. 2020: four levels of two residual blocks, attention at 16 x 16 and in the middle."""
    embedding = 512

    def residual(given_channels, made, height):
        skip = given_channels * made if given_channels != made else 0
        return 2 * (height**2 * (9 * given_channels * made + 9 * made**2 + skip) + embedding * made)

    def attention(height, channels=256):
        return 4 * height**4 * channels, 2 * height**2 * 4 * channels**2

    down = [(128, 128, 32)] * 2 + [(128, 256, 16), (256, 256, 16)] + [(256, 256, 8)] * 2 + [(256, 256, 4)] * 2
    up = [(512, 256, 4)] * 3 + [(512, 256, 8)] * 3 + [(512, 256, 16)] * 2 + [(384, 256, 16), (384, 128, 32)]
    middle = [(256, 256, 4)] * 2
    blocks = sum(residual(*sizes) for sizes in [*down, *middle, *up, (256, 128, 32), (256, 128, 32)])
    products, linear = (sum(parts) for parts in zip(*[attention(16)] * 5, attention(4), strict=True))
    time = 2 * (128 * embedding + embedding**2)
    ends = 2 * 2 * 32**2 * 9 * 3 * 128
    halvings = 2 * 9 * (16**2 * 128**2 + (8**2 + 4**2) * 256**2)
    # By a transposed convolution of 4 x 4, which is nearest-neighbour upsampling and a convolution of 3 x 3 in one.
    doublings = 2 * 16 * (4**2 + 8**2 + 16**2) * 256**2

    with torch.device("meta"):
        costs = account(UNet((3, 32, 32)))
    assert costs.parameters == 35_746_307
    rest = blocks + linear + time + ends + halvings + doublings
    assert costs.forward_flops == products + rest
    # Attention by half more than twice; the data and the features of time need no gradient.
    assert costs.backward_flops == 10 * products // 4 + 2 * rest - ends // 2 - 2 * 128 * embedding


def test_a_network_that_fits_no_machine():
    with torch.device("meta"):
        network = MLP((2,), width=10**7)
    costs = account(network)
    assert costs.weight_bytes > 4 * 2 * 10**14
    assert all(parameter.is_meta for parameter in network.parameters())


def test_the_network_is_left_as_it_was():
    network = small_unet().eval()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())
    before = copy.deepcopy(network)
    account(network)
    assert not network.training
    assert {name: (p.requires_grad, p.grad, p.stride()) for name, p in network.named_parameters()} == {
        name: (p.requires_grad, None, p.stride()) for name, p in before.named_parameters()
    }
    torch.testing.assert_close(network.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def test_layers_add_up_to_the_totals():
    for network in (small_unet(), MLP((2,), width=16, classes=3)):
        costs = account(network)
        for name in ("parameters", "forward_flops", "kept_bytes"):
            assert sum(getattr(layer, name) for layer in costs.layers) == getattr(costs, name)


def test_layers_are_opened_lists_and_what_is_left():
    class Pair(nn.Module):
        """Its second layer is called from outside."""

        def __init__(self, first):
            super().__init__()
            self.first, self.second = first, nn.Linear(3, 3)

        def forward(self, x):
            return self.first(x)

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))
            self.lists = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(3, 3)}), Pair(shared)])
            self.pair, self.again, self.unused = Pair(shared), self.lists[1], nn.Linear(3, 5)

        def forward(self, x, t):
            x = self.lists[0]["a"](x * self.scale)
            x = self.pair(self.again(self.lists[1](x)))
            return self.pair.second(x) @ x.new_zeros(3, 2)

    layers = account(Nested(), (3,)).layers
    assert [(layer.name, layer.kind, layer.shape, layer.parameters, layer.forward_flops) for layer in layers] == [
        ("lists.0.a", "Linear", (3,), 12, 18),
        ("lists.1", "Pair", (3,), 2 * 12, 2 * 18),
        ("pair", "Pair", (3,), 12, 2 * 18),
        ("unused", "Linear", None, 20, 0),
        ("(itself)", "Nested", (2,), 3, 12),
    ]


def test_the_table_has_the_numbers():
    costs = account(Alone(nn.Sequential(nn.Linear(1000, 2000))), (1000,))
    lines = [line.split() for line in costs.table().splitlines()]
    assert lines == [
        ["layer", "class", "output", "parameters", "MFLOP", "kept", "kB"],
        ["layer", "Sequential", "2000", "2,002,000", "4.000", "4.000"],
        ["total", "2,002,000", "4.000", "4.000"],
    ]
    assert len({len(line) for line in costs.table().splitlines()}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (142_985_484, "143 MB"), (12_443_713_536, "12.44 GB")],
)
def test_quantities(value, text):
    assert quantity(value, "B") == text


def test_conditions_are_given_in_the_batch():
    calls = []

    class Conditional(nn.Module):
        data_shape, classes, vector = (2,), 5, 7

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2 + 7, 2)

        def forward(self, x, t, label=None, vector=None):
            calls.append((tuple(x.shape), tuple(t.shape), tuple(label.shape), label.dtype, tuple(vector.shape)))
            return self.layer(torch.cat([x, vector], dim=1))

    account(Conditional())
    assert calls == [((n, 2), (n,), (n,), torch.int64, (n, 7)) for n in (2, 3)]


class LooksAtValues(nn.Module):
    def forward(self, x, t):
        return x if t.max() > 0.5 else -x


class ReturnsPair(nn.Module):
    def forward(self, x, t):
        return x, t


@pytest.mark.parametrize(
    ("network", "data_shape", "message"),
    [
        (Alone(nn.Linear(2, 2)), None, "data_shape is missing: a Alone has no such attribute"),
        (Alone(nn.Linear(2, 2)), (2, 0), r"data_shape = \(2, 0\): must be positive whole numbers"),
        (Alone(nn.Linear(2, 2)), (2.0,), r"data_shape = \(2\.0,\): must be positive whole numbers"),
        (LooksAtValues(), (2,), "network cannot be counted without values"),
        (ReturnsPair(), (2,), "network must return a tensor; got tuple"),
        (MLP((3,), width=8), (2,), "x must be"),
    ],
)
def test_mistakes_are_named(network, data_shape, message):
    with pytest.raises(ValueError, match=message):
        account(network, data_shape)


def test_a_network_without_parameters_has_nothing_to_go_back_for():
    class Doubled(nn.Module):
        def forward(self, x, t):
            return 2 * x

    costs = account(Doubled(), (2,))
    assert (costs.parameters, costs.forward_flops, costs.backward_flops, costs.kept_bytes) == (0, 0, 0, 0)
