"""Networks by name.

Each is called as network(x, t, label=None, vector=None) with x (B, *data_shape), t (B,), label (B,) int64 or None and
vector (B, V) or None, and answers in the shape of x, or with out_channels in place of its channels. A new network is a
class whose first argument is data_shape, and one line in `NETWORKS`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from sde_diffusion.networks.dit import DiT
from sde_diffusion.networks.mlp import MLP
from sde_diffusion.networks.unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {"dit": DiT, "mlp": MLP, "unet": UNet}


def build_network(name: str, data_shape: Sequence[int], **options: Any) -> nn.Module:
    """The network `name` for data of shape `data_shape`; options are the arguments of its class.

    Raises:
        ValueError: for an unknown name or option, listing the known ones, or from the class for a bad value.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}; got {name!r}")
    _, *allowed = inspect.signature(NETWORKS[name]).parameters
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"unknown option {', '.join(unknown)} of network {name!r}; it has {', '.join(allowed)}")
    return NETWORKS[name](data_shape, **options)
