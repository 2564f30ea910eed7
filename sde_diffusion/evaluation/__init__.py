"""How good samples are: features of images, and distances between their distributions."""

from sde_diffusion.evaluation.features import FEATURES, FeatureNetwork, extract_features, load_features
from sde_diffusion.evaluation.metrics import (
    FrechetDistance,
    Moments,
    UnbiasedDistance,
    energy_distance,
    frechet_distance,
    gaussian_frechet,
    kernel_distance,
)

__all__ = [
    "FEATURES",
    "FeatureNetwork",
    "FrechetDistance",
    "Moments",
    "UnbiasedDistance",
    "energy_distance",
    "extract_features",
    "frechet_distance",
    "gaussian_frechet",
    "kernel_distance",
    "load_features",
]
