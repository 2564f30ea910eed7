"""How a network learns: config in, checkpoint out, resumable."""

from sde_diffusion.training.callbacks import Callback
from sde_diffusion.training.checkpoint import CheckpointError, load, pretrained
from sde_diffusion.training.config import ConfigError, default_config, load_config_file, named, resolve_config
from sde_diffusion.training.ema import post_hoc_average
from sde_diffusion.training.loop import TrainingError, TrainResult, train
from sde_diffusion.training.run_directory import Interrupted

__all__ = [
    "Callback",
    "CheckpointError",
    "ConfigError",
    "Interrupted",
    "TrainResult",
    "TrainingError",
    "default_config",
    "load",
    "load_config_file",
    "named",
    "post_hoc_average",
    "pretrained",
    "resolve_config",
    "train",
]
