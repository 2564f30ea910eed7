"""What the tests of training share: runs of a few steps that take milliseconds."""

import pytest
import torch
from torch import nn

from sde_diffusion.data import ArrayDataset

UNET = {
    "name": "unet",
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_resolutions": (4,),
    "dropout": 0.2,
}
MLP = {"name": "mlp", "width": 16, "depth": 2, "embedding": 8}


class Recorder(nn.Module):
    """A user's own network, linear in x, that keeps what it is called with in training."""

    def __init__(self, classes=0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.bias = nn.Parameter(torch.tensor([0.1]))
        self.classes, self.calls = classes, []

    def forward(self, x, t, label=None):
        if self.training:
            self.calls.append((x.detach().clone(), t.detach().clone(), label))
        return self.scale * x + self.bias


@pytest.fixture
def recorder():
    """The class of a user's own network that records its inputs."""
    return Recorder


@pytest.fixture
def tiny():
    """tiny(**sections): a config of 8 steps of an MLP on 50 points of the spiral, with some sections changed."""

    def build(**sections):
        config = {
            "data": {"name": "spiral", "size": 50},
            "network": MLP,
            "optim": {"lr": 0.01, "warmup": 3},
            "ema": {"decay": 0.9},
            "train": {"steps": 8, "batch_size": 4, "log_every": 1, "checkpoint_every": 3, "sample_every": 0},
        }
        for name, section in sections.items():
            changed = isinstance(section, dict) and "name" not in section
            config[name] = {**config.get(name, {}), **section} if changed else section
        return config

    return build


@pytest.fixture
def images():
    """37 random grey pictures of 8 x 8 with 8 bits and one of three labels: more than a batch, and no multiple."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (37, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ArrayDataset(values, torch.arange(37) % 3)


@pytest.fixture(params=["unet", "mlp"])
def kind(request, tiny, images):
    """(config, data set): a U-Net with attention and dropout on 8-bit pictures, and an MLP on a toy."""
    return (tiny(network=UNET), images) if request.param == "unet" else (tiny(), None)
