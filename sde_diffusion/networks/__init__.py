"""Networks by name."""
from typing import Any
from torch import nn
from sde_diffusion.networks.unet import UNet

NETWORKS: dict[str, Any] = {"unet": UNet}


def build_network(name: str, data_shape: Any, **options: Any) -> nn.Module:
    """Build."""
    return NETWORKS[name](data_shape=data_shape, **options)
