"""Continuous-time score-SDE diffusion models: train, sample and score."""

from sde_diffusion.chain import GaussianChain
from sde_diffusion.data import DataInfo
from sde_diffusion.exact import Empirical, Gaussian, GaussianMixture
from sde_diffusion.likelihood import BitsPerDim, LogLikelihood, bits_per_dim, log_likelihood
from sde_diffusion.model import DiffusionModel, Model, Prediction
from sde_diffusion.ode import SolverError
from sde_diffusion.samplers import Samples, sample, solvers
from sde_diffusion.sde import EDMSDE, SDE, VESDE, VPSDE, SubVPSDE
from sde_diffusion.training import (
    CheckpointError,
    ConfigError,
    TrainingError,
    TrainResult,
    default_config,
    load,
    load_config_file,
    pretrained,
    train,
)

__version__ = "0.1.0"

__all__ = [
    "EDMSDE",
    "SDE",
    "VESDE",
    "VPSDE",
    "BitsPerDim",
    "CheckpointError",
    "ConfigError",
    "DataInfo",
    "DiffusionModel",
    "Empirical",
    "Gaussian",
    "GaussianChain",
    "GaussianMixture",
    "LogLikelihood",
    "Model",
    "Prediction",
    "Samples",
    "SolverError",
    "SubVPSDE",
    "TrainResult",
    "TrainingError",
    "bits_per_dim",
    "default_config",
    "load",
    "load_config_file",
    "log_likelihood",
    "pretrained",
    "sample",
    "solvers",
    "train",
]
