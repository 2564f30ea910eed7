"""Continuous-time score-SDE diffusion models: train, sample and score."""

from sde_diffusion.bound import Bound, RateDistortion, rate_distortion, variational_bound
from sde_diffusion.chain import BETAS, ChainSDE, GaussianChain, zero_terminal_snr
from sde_diffusion.data import DataInfo
from sde_diffusion.density_ratio import LogDensityRatio, log_density_ratio
from sde_diffusion.exact import Empirical, Gaussian, GaussianMixture
from sde_diffusion.general import BetaSDE, LogSNRSDE, MarginalSDE, RateSDE
from sde_diffusion.latent import Progression, decode, encode, interpolate, progressive, slerp
from sde_diffusion.likelihood import BitsPerDim, LogLikelihood, bits_per_dim, log_likelihood
from sde_diffusion.maximum_likelihood import differentiable_log_likelihood
from sde_diffusion.model import DiffusionModel, Model, Prediction, VariancePrediction
from sde_diffusion.ode import SolverError
from sde_diffusion.samplers import Calibrated, Samples, SolverInfo, calibrate, sample, solvers
from sde_diffusion.sde import EDMSDE, SDE, VESDE, VPSDE, ConstantVESDE, CosineVPSDE, FlowSDE, SubVPSDE
from sde_diffusion.training import (
    Callback,
    CheckpointError,
    ConfigError,
    Interrupted,
    TrainingError,
    TrainResult,
    default_config,
    load,
    load_config_file,
    post_hoc_average,
    pretrained,
    train,
)

__version__ = "0.1.0"

__all__ = [
    "BETAS",
    "EDMSDE",
    "SDE",
    "VESDE",
    "VPSDE",
    "BetaSDE",
    "BitsPerDim",
    "Bound",
    "Calibrated",
    "Callback",
    "ChainSDE",
    "CheckpointError",
    "ConfigError",
    "ConstantVESDE",
    "CosineVPSDE",
    "DataInfo",
    "DiffusionModel",
    "Empirical",
    "FlowSDE",
    "Gaussian",
    "GaussianChain",
    "GaussianMixture",
    "Interrupted",
    "LogDensityRatio",
    "LogLikelihood",
    "LogSNRSDE",
    "MarginalSDE",
    "Model",
    "Prediction",
    "Progression",
    "RateDistortion",
    "RateSDE",
    "Samples",
    "SolverError",
    "SolverInfo",
    "SubVPSDE",
    "TrainResult",
    "TrainingError",
    "VariancePrediction",
    "bits_per_dim",
    "calibrate",
    "decode",
    "default_config",
    "differentiable_log_likelihood",
    "encode",
    "interpolate",
    "load",
    "load_config_file",
    "log_density_ratio",
    "log_likelihood",
    "post_hoc_average",
    "pretrained",
    "progressive",
    "rate_distortion",
    "sample",
    "slerp",
    "solvers",
    "train",
    "variational_bound",
    "zero_terminal_snr",
]
