"""Continuous-time score-SDE diffusion models: train, sample and score."""

from sde_diffusion.chain import GaussianChain
from sde_diffusion.data import DataInfo
from sde_diffusion.exact import Empirical, Gaussian, GaussianMixture
from sde_diffusion.model import DiffusionModel, Model, Prediction
from sde_diffusion.ode import SolverError
from sde_diffusion.samplers import Samples, sample, solvers
from sde_diffusion.sde import SDE, EDMSDE, SubVPSDE, VESDE, VPSDE
from sde_diffusion.training import (
    CheckpointError,
    ConfigError,
    TrainingError,
    TrainResult,
    default_config,
    load,
    save_model,
    train,
)

__version__ = "0.1.0"

__all__ = [
    "EDMSDE",
    "SDE",
    "VESDE",
    "VPSDE",
    "CheckpointError",
    "ConfigError",
    "DataInfo",
    "DiffusionModel",
    "Empirical",
    "Gaussian",
    "GaussianChain",
    "GaussianMixture",
    "Model",
    "Prediction",
    "Samples",
    "SolverError",
    "SubVPSDE",
    "TrainResult",
    "TrainingError",
    "default_config",
    "load",
    "sample",
    "save_model",
    "solvers",
    "train",
]
