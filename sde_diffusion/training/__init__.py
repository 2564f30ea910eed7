"""How a network learns: config in, checkpoint out, resumable."""

from sde_diffusion.training.checkpoint import CheckpointError, load, pretrained
from sde_diffusion.training.config import ConfigError, default_config, load_config_file, named, resolve_config
from sde_diffusion.training.loop import TrainingError, TrainResult, train

__all__ = [
    "CheckpointError",
    "ConfigError",
    "TrainResult",
    "TrainingError",
    "default_config",
    "load",
    "load_config_file",
    "named",
    "pretrained",
    "resolve_config",
    "train",
]
