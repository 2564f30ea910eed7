"""How a network learns: config in, checkpoint out, resumable."""

from sde_diffusion.training.checkpoint import CheckpointError, load, save_model
from sde_diffusion.training.config import ConfigError, default_config, resolve_config
from sde_diffusion.training.loop import TrainingError, TrainResult, train

__all__ = [
    "CheckpointError",
    "ConfigError",
    "TrainResult",
    "TrainingError",
    "default_config",
    "load",
    "resolve_config",
    "save_model",
    "train",
]
