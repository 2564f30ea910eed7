"""The published networks: their sizes, their arithmetic, and what their weights and features are at the start."""

import inspect
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import VESDE
from sde_diffusion.networks import NETWORKS
from sde_diffusion.networks.account import account
from sde_diffusion.networks.blocks import FourierEmbedding, ResidualBlock, SelfAttention
from sde_diffusion.networks.published import PUBLISHED, forward_flops, main, published
from sde_diffusion.networks.unet import UNet

# E[silu(z)²] for z ~ N(0, 1), by quadrature.
SILU_POWER = 0.3558


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return published(name)


def reduced(name: str, **overrides) -> nn.Module:
    """The network at a small width and size, all levels and blocks kept, which takes milliseconds."""
    entry = PUBLISHED[name]
    side = next(side for part, side in (("dit", 8), ("adm", 32), ("celebahq", 64), ("", 16)) if part in name)
    data_shape = (entry.data_shape[0], side, side)
    if entry.network == "dit":
        options = {"width": 48, "depth": 3, "heads": 4}
    else:
        options = {"base_channels": 16 if side == 64 else 32}
        # The code of DDPM, improved DDPM and ADM has 32 groups at any width.
        if not entry.options.get("rescale"):
            options["groups"] = 32
        if "head_channels" in entry.options:
            options["head_channels"] = 16
    torch.manual_seed(0)
    return published(name, data_shape, **(options | overrides)).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_public_code(name):
    entry, network = PUBLISHED[name], on_meta(name)
    # The row of the label "none", which DiT's own table has.
    of_no_label = 4 * entry.options["base_channels"] if "adm" in name else 0
    assert parameters(network) == entry.parameters + of_no_label
    assert all(parameter.requires_grad for parameter in network.parameters())
    if entry.printed is not None:
        # To the printed digits, of which the zero of a 120 is none.
        digits = len(entry.printed.replace(".", "").rstrip("0"))
        assert float(f"{parameters(network) / 1e6:.{digits - 1}e}") == float(entry.printed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_options_are_arguments_of_the_class(name):
    entry = PUBLISHED[name]
    assert set(entry.options) <= set(inspect.signature(NETWORKS[entry.network]).parameters)
    assert entry.source


@pytest.mark.parametrize("name", PUBLISHED)
def test_reduced_network_starts_as_zero_and_runs(name):
    network = reduced(name)
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(1, *network.data_shape, generator=generator), torch.tensor([0.3])
    out_channels = PUBLISHED[name].options.get("out_channels", network.data_shape[0])
    with torch.no_grad():
        assert torch.equal(network(x, t), torch.zeros(1, out_channels, *network.data_shape[1:]))
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        early, late = network(x, t), network(x, t + 0.5)
    assert early.isfinite().all()
    assert (early - late).abs().max() > 1e-3 * early.abs().max() > 0


def spread(shape: Sequence[int]) -> Tensor:
    """Numbers spread evenly over (-√3, √3), of variance 1: the same on any machine, and of any version of torch."""
    count = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return math.sqrt(12) * (count.square() * ((5**0.5 - 1) / 2) % 1 - 0.5).reshape(shape)


def given_weights(network: nn.Module) -> nn.Module:
    """The network in float64 with weights that depend on nothing but the shapes of its layers."""
    network.to(torch.float64)
    with torch.no_grad():
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_matrix = parameter.ndim > 1
                parameter.copy_(spread(parameter.shape) * (parameter[0].numel() ** -0.5 if is_matrix else 0.3))
                if isinstance(module, nn.GroupNorm) and name == "weight":
                    parameter.add_(1)
        if isinstance(network.time_features, FourierEmbedding):
            network.time_features.frequencies.copy_(10 * spread(network.time_features.frequencies.shape))
    return network


# What the public code named in PUBLISHED computes of the same numbers with the same weights, at the sizes of `reduced`:
# the standard deviation of the output, its first number and its last.
OUTPUTS = {
    "ddpm_cifar10": (0.663242978, 0.706018873, 0.641289393),
    "ddpmpp_cifar10": (0.496178171, 0.907233409, -0.061029134),
    "ddpmpp_deep_cifar10": (0.510566150, 0.716775187, -0.291599355),
    "ncsnpp_cifar10": (0.500909018, 0.921841323, -0.065127455),
    "ncsnpp_deep_cifar10": (0.524797399, 0.862521980, -0.224344681),
    "ncsnpp_celebahq_256": (1.428818780, 1.620414821, 0.283485534),
    "edm_ddpmpp_cifar10": (0.994385969, 1.575511316, 0.094215625),
    "edm_ncsnpp_cifar10": (0.996594818, 1.647749166, 0.132434531),
    "improved_ddpm_cifar10": (0.714799800, 0.518554813, 0.444124324),
    "improved_ddpm_imagenet64": (0.691273762, 0.475438746, 0.209881553),
    "adm_imagenet64": (0.715573078, 0.764036111, 0.068792890),
    "adm_imagenet128": (0.713128614, 0.785258083, 0.590844355),
    "adm_imagenet256": (0.688309450, 0.483683838, 0.761103907),
    "dit_s_2": (1.206853236, 2.049446195, -1.202276355),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_those_of_the_public_code(name):
    # DDPM in PyTorch is score-SDE's, which lacks attention after all but the last block of a level of the way up.
    network = given_weights(reduced(name, **({"up_attention": "last"} if name == "ddpm_cifar10" else {})))
    x, t = spread((1, *network.data_shape)), torch.tensor([0.3], dtype=torch.float64)
    with torch.no_grad():
        output = network(x, t, torch.tensor([3]) if network.classes else None)
    found = output.std(), output[0, 0, 0, 0], output[0, -1, -1, -1]
    assert [value.item() for value in found] == pytest.approx(OUTPUTS[name], abs=1e-9)


# Table 4 of Peebles & Xie 2023, in multiply-adds and, as it is a little more, some of what is no product.
@pytest.mark.parametrize(("name", "printed"), [("dit_s_2", 6.06), ("dit_b_2", 23.01), ("dit_xl_2", 118.64)])
def test_arithmetic_of_dit_is_the_papers(name, printed):
    assert forward_flops(on_meta(name), PUBLISHED[name].data_shape) / 2e9 == pytest.approx(printed, rel=1e-3)


@pytest.mark.parametrize(("name", "sigma_max"), [("ncsnpp_deep_cifar10", 50.0), ("ncsnpp_celebahq_256", 348.0)])
def test_time_of_ncsnpp_is_the_logarithm_of_the_noise(name, sigma_max):
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    log_sigma = VESDE(0.01, sigma_max).sigma(t).log()
    torch.testing.assert_close(PUBLISHED[name].options["time_scale"] * t.diff(), log_sigma.diff())


def test_overrides():
    with torch.device("meta"):
        network = published("adm_imagenet64", (1, 32, 32), classes=0, out_channels=None)
    assert (network.data_shape, network.classes) == ((1, 32, 32), 0)
    assert PUBLISHED["adm_imagenet64"].options["classes"] == 1000


def test_errors_name_the_network_and_the_option():
    with pytest.raises(ValueError, match=r"name must be one of ddpm_cifar10, .*dit_xl_2; got 'ddpm'"):
        published("ddpm")
    with pytest.raises(ValueError, match="unknown option width of network 'unet'"):
        published("ddpm_cifar10", width=3)


def test_table_has_a_row_a_network(capsys, monkeypatch):
    monkeypatch.setattr("sde_diffusion.networks.published.PUBLISHED", {name: PUBLISHED[name] for name in ("dit_s_2",)})
    main()
    *_, row = capsys.readouterr().out.splitlines()
    assert row == "| dit_s_2 | 4 x 32 x 32 | 32,865,056 | 32,865,056 | 33 | 12.1 |"


def drawn_as(network: UNet, fan_in_and_out: Callable[[int, int], float], attention: float) -> None:
    """Assert the variance of every weight of `network`, and that it is uniform about 0; attention's is a multiple."""
    weights: list[tuple[Tensor, float]] = []
    zero = {id(module.output) for module in network.modules() if isinstance(module, SelfAttention)}
    zero |= {id(module.conv_out) for module in network.modules() if isinstance(module, ResidualBlock)}
    zero |= {id(stage.image.conv) for stage in network.up if stage.image is not None}
    parts = {id(module.qkv): (3, attention) for module in network.modules() if isinstance(module, SelfAttention)}
    for module in network.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or module is network.projection:
            continue
        if id(module) in zero:
            assert not module.weight.any()
            assert module.bias is not None
            assert not module.bias.any()
        else:
            number, factor = parts.get(id(module), (1, 1.0))
            weights += [(part, factor) for part in module.weight.chunk(number)]
    blocks = [stage.block for stage in [*network.down, *network.middle, *network.up]]
    sizes = [block.embedding_channels for block in blocks if block.embedding_channels]
    weights += [(part, 1.0) for part in network.projection.weight.split(sizes)]
    assert len(weights) > 30
    for weight, factor in weights:
        fan_out, fan_in = len(weight) * weight[0, 0].numel(), weight[0].numel()
        variance = factor * fan_in_and_out(fan_in, fan_out)
        # The estimate from n uniform numbers has relative standard error √(0.8/n); 5 of them.
        assert weight.square().mean().item() == pytest.approx(variance, rel=5 * math.sqrt(0.8 / weight.numel()))
        assert weight.abs().max() <= math.sqrt(3 * variance) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("name", "attention"), [("ddpm_cifar10", 1.0), ("ddpmpp_cifar10", 0.1), ("edm_ncsnpp_cifar10", 0.1)]
)
def test_weights_start_with_the_variance_of_the_average_fan(name, attention):
    # A tenth for each map to q, k and v: NIN(init_scale=0.1) in score-SDE, and EDM's √0.2 times weights of fan out 3C.
    network = reduced(name)
    drawn_as(network, lambda fan_in, fan_out: 2 / (fan_in + fan_out), attention)
    for parameter_name, parameter in network.named_parameters():
        assert not parameter_name.endswith("bias") or not parameter.any(), parameter_name


@pytest.mark.parametrize("name", ["improved_ddpm_cifar10", "adm_imagenet64"])
def test_weights_of_openai_start_as_torch_draws_them(name):
    network = reduced(name)
    drawn_as(network, lambda fan_in, fan_out: 1 / (3 * fan_in), 1.0)
    assert network.stem.bias.any()
    if network.classes:
        rows = network.condition.table.weight
        # The variance of n normal numbers has relative standard error √(2/n).
        assert rows.var().item() == pytest.approx(1.0, rel=5 * math.sqrt(2 / rows.numel()))


@pytest.mark.parametrize(("name", "factor"), [("ddpm_cifar10", 1.0), ("ddpmpp_cifar10", 0.5**0.5)])
def test_at_the_start_a_sum_is_its_skip(name, factor):
    network = reduced(name)
    seen = []

    def compare(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(torch.equal(output, inputs[0] * factor))

    for module in network.modules():
        is_plain = (
            isinstance(module, ResidualBlock) and module.resample is None and isinstance(module.skip, nn.Identity)
        )
        if is_plain or isinstance(module, SelfAttention):
            module.register_forward_hook(compare)
    with torch.no_grad():
        network(torch.randn(1, *network.data_shape), torch.rand(1))
    assert len(seen) > 8
    assert all(seen)


def variances(rescale: bool) -> list[float]:
    """Variance of the features after each block of a way down, once the last layer of each has weights as all have."""
    torch.manual_seed(0)
    network = UNet((3, 16, 16), 32, (1,), 16, (), rescale=rescale).eval()
    found: list[float] = []
    for stage in network.down:
        nn.init.xavier_uniform_(stage.block.conv_out.weight)
        stage.register_forward_hook(lambda module, inputs, output: found.append(output.var().item()))
    with torch.no_grad():
        network(torch.randn(8, 3, 16, 16), torch.rand(8))
    return found


def test_rescaled_features_keep_their_variance_through_depth():
    # Normalised features have unit variance, their silu the power p, which a convolution with as many channels out as
    # in keeps: v <- (v + p)/2, so that v goes to p from wherever it starts. p is that of normal numbers; the features
    # have heavier tails, 32 channels are few, and the border has zeros: a half either way.
    found = variances(rescale=True)
    assert all(0.5 * SILU_POWER < v < 1.5 * SILU_POWER for v in found[4:])


def test_features_that_are_not_rescaled_grow_linearly_with_depth():
    # As above, but v <- v + p.
    found = variances(rescale=False)
    for blocks in (4, 8, 15):
        assert 0.5 * SILU_POWER < (found[blocks] - found[0]) / blocks < 1.5 * SILU_POWER


def test_the_table_counts_as_the_account_does():
    entry = PUBLISHED["ddpm_cifar10"]
    with torch.device("meta"):
        network = published("ddpm_cifar10")
    assert forward_flops(network, entry.data_shape) == account(network).forward_flops
