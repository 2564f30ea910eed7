"""How good a model is: likelihoods of whole data sets; features of samples, and distances between distributions."""

from sde_diffusion.evaluation.dataset import (
    DatasetResult,
    Measure,
    bound_measure,
    evaluate_dataset,
    fingerprint,
    likelihood_measure,
)
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
from sde_diffusion.evaluation.typicality import RocArea, Typicality, roc_area, typicality

__all__ = [
    "FEATURES",
    "DatasetResult",
    "FeatureNetwork",
    "FrechetDistance",
    "Measure",
    "Moments",
    "RocArea",
    "Typicality",
    "UnbiasedDistance",
    "bound_measure",
    "energy_distance",
    "evaluate_dataset",
    "extract_features",
    "fingerprint",
    "frechet_distance",
    "gaussian_frechet",
    "kernel_distance",
    "likelihood_measure",
    "load_features",
    "roc_area",
    "typicality",
]
