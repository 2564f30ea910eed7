"""The networks of published models: what builds each, and how many parameters it must have.

    network = published("adm_imagenet64")                   # as published, weights drawn anew
    network = published("adm_imagenet64", classes=0)        # but for what is given

    python -m sde_diffusion.networks.published              # prints them all, with what each costs

Sources: Ho et al. 2020 (DDPM); Song et al. 2021 (DDPM++, NCSN++); Karras et al. 2022 (EDM); Nichol & Dhariwal 2021
(improved DDPM); Dhariwal & Nichol 2021 (ADM); Peebles & Xie 2023 (DiT); and what each of them has published of its
code, named with each network.

Times are those of this library, which the options scale to what the published network was given:

    t in [0, 1], 1000 t or 999 t the discrete step       DDPM, DDPM++, improved DDPM, ADM, DiT
    t in [0, 1] of VESDE, log σ(t) but for a constant    NCSN++; the constant only turns each sine and its cosine
    t = ¼ log σ, as prediction "edm" gives it            EDM

A network with classes has one label more than the U-Nets published: "none", for classifier-free guidance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sde_diffusion.networks import build_network


@dataclass(frozen=True)
class Published:
    """A published network.

    Attributes:
        network: its name in ``NETWORKS``.
        data_shape: shape of one input.
        options: arguments of the network's class.
        parameters: how many parameters its public code trains.
        printed: millions of parameters as a paper or README prints them, where one does.
        source: where the options are from.
    """

    network: str
    data_shape: tuple[int, ...]
    options: dict[str, Any]
    parameters: int
    printed: str | None
    source: str


_CIFAR10 = (3, 32, 32)
_LATENTS = (4, 32, 32)

_SCORE_SDE: dict[str, Any] = {
    "attention_resolutions": (16,),
    "dropout": 0.1,
    "project_resampled": True,
    "rescale": True,
    "up_attention": "last",
    "initialisation": "fan_average_small_attention",
}
_DDPMPP = _SCORE_SDE | {"time_scale": 999.0, "resampling": "average"}
_NCSNPP = _SCORE_SDE | {
    "time_features": "fourier",
    "time_scale": math.log(50.0 / 0.01),
    "resampling": "fir",
    "progressive_input": "residual",
}
_EDM = {"channel_multipliers": (2, 2, 2), "blocks_per_level": 4, "dropout": 0.13, "time_scale": 1.0}

_OPENAI: dict[str, Any] = {
    "out_channels": 6,
    "time_features": "transformer",
    "scale_shift": True,
    "norm_epsilon": 1e-5,
    "initialisation": "torch",
}
_IMPROVED = _OPENAI | {"blocks_per_level": 3, "attention_resolutions": (16, 8), "heads": 4}
_ADM = _OPENAI | {"attention_resolutions": (32, 16, 8), "classes": 1000, "resampling": "average"}


def _dit(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {"patch": 2, "width": width, "depth": depth, "heads": heads, "classes": 1000, "out_channels": 8}


PUBLISHED: dict[str, Published] = {
    "ddpm_cifar10": Published(
        "unet",
        _CIFAR10,
        {"dropout": 0.1, "resampling": "conv_shifted"},
        35_746_307,
        "35.7",
        "Ho et al. 2020, app. B; hojonathanho/diffusion, scripts/run_cifar.py",
    ),
    "ddpmpp_cifar10": Published(
        "unet",
        _CIFAR10,
        _DDPMPP | {"blocks_per_level": 4},
        61_804_419,
        None,
        "yang-song/score_sde_pytorch, configs/vp/cifar10_ddpmpp_continuous.py",
    ),
    "ddpmpp_deep_cifar10": Published(
        "unet",
        _CIFAR10,
        _DDPMPP | {"blocks_per_level": 8},
        106_632_579,
        None,
        "yang-song/score_sde_pytorch, configs/vp/cifar10_ddpmpp_deep_continuous.py",
    ),
    "ncsnpp_cifar10": Published(
        "unet",
        _CIFAR10,
        _NCSNPP | {"blocks_per_level": 4},
        62_758_787,
        None,
        "yang-song/score_sde_pytorch, configs/ve/cifar10_ncsnpp_continuous.py",
    ),
    "ncsnpp_deep_cifar10": Published(
        "unet",
        _CIFAR10,
        _NCSNPP | {"blocks_per_level": 8},
        107_586_947,
        None,
        "yang-song/score_sde_pytorch, configs/ve/cifar10_ncsnpp_deep_continuous.py",
    ),
    "ncsnpp_celebahq_256": Published(
        "unet",
        (3, 256, 256),
        _NCSNPP
        | {
            "channel_multipliers": (1, 1, 2, 2, 2, 2, 2),
            "dropout": 0.0,
            "time_scale": math.log(348.0 / 0.01),
            "progressive_input": "skip",
            "progressive_output": "skip",
        },
        65_574_421,
        None,
        "yang-song/score_sde_pytorch, configs/ve/celebahq_256_ncsnpp_continuous.py",
    ),
    "edm_ddpmpp_cifar10": Published(
        "unet",
        _CIFAR10,
        _DDPMPP | _EDM,
        55_732_739,
        None,
        "NVlabs/edm, train.py --arch=ddpmpp, without augmentation",
    ),
    "edm_ncsnpp_cifar10": Published(
        "unet",
        _CIFAR10,
        _NCSNPP | _EDM,
        56_395_523,
        None,
        "NVlabs/edm, train.py --arch=ncsnpp, without augmentation",
    ),
    "improved_ddpm_cifar10": Published(
        "unet",
        _CIFAR10,
        _IMPROVED | {"dropout": 0.3},
        52_546_438,
        "50",
        "openai/improved-diffusion, README.md, unconditional CIFAR-10",
    ),
    "improved_ddpm_imagenet64": Published(
        "unet",
        (3, 64, 64),
        _IMPROVED | {"channel_multipliers": (1, 2, 3, 4)},
        121_063_942,
        "120",
        "Nichol & Dhariwal 2021, sec. 6; openai/improved-diffusion, README.md, unconditional ImageNet-64",
    ),
    "adm_imagenet64": Published(
        "unet",
        (3, 64, 64),
        _ADM
        | {
            "base_channels": 192,
            "channel_multipliers": (1, 2, 3, 4),
            "blocks_per_level": 3,
            "dropout": 0.1,
            "head_channels": 64,
        },
        295_904_454,
        "296",
        "Dhariwal & Nichol 2021, app. I; openai/guided-diffusion, README.md, 64x64 model",
    ),
    "adm_imagenet128": Published(
        "unet",
        (3, 128, 128),
        _ADM | {"base_channels": 256, "channel_multipliers": (1, 1, 2, 3, 4), "heads": 4},
        421_529_606,
        "422",
        "Dhariwal & Nichol 2021, app. I; openai/guided-diffusion, README.md, 128x128 model",
    ),
    "adm_imagenet256": Published(
        "unet",
        (3, 256, 256),
        _ADM | {"base_channels": 256, "channel_multipliers": (1, 1, 2, 2, 4, 4), "head_channels": 64},
        553_838_086,
        "554",
        "Dhariwal & Nichol 2021, app. I; openai/guided-diffusion, README.md, 256x256 model",
    ),
    "dit_s_2": Published(
        "dit",
        _LATENTS,
        _dit(384, 12, 6),
        32_865_056,
        "33",
        "Peebles & Xie 2023, table 1; facebookresearch/DiT, models.py, DiT-S/2",
    ),
    "dit_b_2": Published(
        "dit",
        _LATENTS,
        _dit(768, 12, 12),
        130_315_808,
        "130",
        "Peebles & Xie 2023, table 1; facebookresearch/DiT, models.py, DiT-B/2",
    ),
    "dit_l_2": Published(
        "dit",
        _LATENTS,
        _dit(1024, 24, 16),
        457_840_672,
        "458",
        "Peebles & Xie 2023, table 1; facebookresearch/DiT, models.py, DiT-L/2",
    ),
    "dit_xl_2": Published(
        "dit",
        _LATENTS,
        _dit(1152, 28, 16),
        674_834_720,
        "675",
        "Peebles & Xie 2023, table 1; facebookresearch/DiT, models.py, DiT-XL/2",
    ),
}


def published(name: str, data_shape: Sequence[int] | None = None, **overrides: Any) -> nn.Module:
    """The published network `name`, for data of its own shape or `data_shape`, but for the options in `overrides`.

    Under ``torch.device("meta")`` it takes no memory. A smaller shape may need other attention_resolutions.

    Raises:
        ValueError: for an unknown name or option, listing the known ones, or for a value that does not fit.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name must be one of {', '.join(PUBLISHED)}; got {name!r}")
    entry = PUBLISHED[name]
    return build_network(
        entry.network, entry.data_shape if data_shape is None else data_shape, **(entry.options | overrides)
    )


def forward_flops(network: nn.Module, data_shape: Sequence[int]) -> int:
    """FLOPs of one image through a network on the device "meta", a multiply-add counted as two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *data_shape), torch.empty(1))
    return counter.get_total_flops()


def main() -> None:
    """Print every published network with its parameters and the arithmetic of one image, in Markdown."""
    print("| network | data | parameters | of the public code | printed, M | GFLOP an image |")
    print("|---|---|---|---|---|---|")
    for name, entry in PUBLISHED.items():
        with torch.device("meta"):
            network = published(name)
        shape = " x ".join(map(str, entry.data_shape))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        counts = f"{parameters:,} | {entry.parameters:,} | {entry.printed or '-'}"
        print(f"| {name} | {shape} | {counts} | {forward_flops(network, entry.data_shape) / 1e9:.1f} |")


if __name__ == "__main__":
    main()
