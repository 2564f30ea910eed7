"""What the papers claim of training, measured on data in the plane: python benchmarks/claims.py.

Each row trains the same small network on the checkerboard, several seeds, and reports

    codelength   the variational bound on test data, nats a dimension (lower is better)
    distance     the energy distance of samples and test data, unbiased, times 1000 (lower is better)

as mean ± standard error over the seeds. The distance of two test sets of that size stands beside it. The chain has the
VP SDE's marginals at STEPS equal steps of time, in training ("vlb", "mean"), for the bound and for the sampler.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

import sde_diffusion as sd
from sde_diffusion.data.toys import checkerboard
from sde_diffusion.evaluation import energy_distance
from sde_diffusion.training import default_config, named

STEPS = 100
DATA = checkerboard

# prediction, weighting, distribution of t, and the reverse variance of both numbers
TRAINED: dict[str, tuple[str, Any, str, str]] = {
    "ε, simple": ("eps", named("simple"), "uniform", "noising"),
    "ε, vlb": ("eps", named("vlb", steps=STEPS), "uniform", "noising"),
    "ε, vlb, t by importance": ("eps", named("vlb", steps=STEPS), "importance", "noising"),
    "mean, vlb, t by importance": ("mean", named("vlb", steps=STEPS), "importance", "noising"),
    "mean, plain squares": ("mean", named("mean"), "uniform", "noising"),
    "ε, hybrid, learned variance": ("eps", named("hybrid", steps=STEPS), "uniform", "learned"),
}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--count", type=int, default=4000, help="test points, and samples")
    arguments = parser.parse_args()
    test, other = DATA(arguments.count, seed=101), DATA(arguments.count, seed=102)
    print(f"distance of two test sets of {arguments.count}: {distance(test, other):.2f}\n")
    print("| prediction, loss | codelength | distance |\n|---|---|---|")
    simple = []
    for name, (prediction, weighting, time, variance) in TRAINED.items():
        models = [
            fit(prediction, weighting, time, variance == "learned", arguments.train_steps, seed)
            for seed in range(arguments.seeds)
        ]
        print(f"| {name} | {row(models, test, [variance] * len(models))} |", flush=True)
        if name == "ε, simple":
            simple = models
    print("\n| reverse variance, of the models with ε, simple | codelength | distance |\n|---|---|---|")
    variances: dict[str, list[Any]] = {
        "posterior v": ["posterior"] * len(simple),
        "between, ½": [0.5] * len(simple),
        "noising σ²": ["noising"] * len(simple),
        "best constant a step": [best_variance(model) for model in simple],
    }
    for name, chosen in variances.items():
        print(f"| {name} | {row(simple, test, chosen)} |", flush=True)


def fit(prediction: str, weighting: Any, time: str, learned: bool, steps: int, seed: int) -> sd.DiffusionModel:
    """Train one network."""
    config = default_config()
    config.seed = seed
    config.network = named("mlp", width=128, depth=3, time_scale=10.0)
    config.model.prediction, config.model.mean_step, config.model.learned_variance = prediction, 1 / STEPS, learned
    config.loss.weighting, config.loss.time = weighting, named(time)
    config.optim.lr, config.optim.warmup, config.ema.decay = 2e-3, 100, 0.995
    config.train.steps, config.train.batch_size, config.train.log_every = steps, 256, steps
    return sd.train(config, dataset=DATA(50_000, seed=7)).model


def best_variance(model: sd.Model) -> torch.Tensor:
    """The best constant of every step, estimated on training data."""
    chain = model.sde.discretize(STEPS)
    return chain.optimal_variance(chain.mean_square_score(model, DATA(4000, seed=7)))


def row(models: list[sd.DiffusionModel], test: torch.Tensor, variances: list[Any]) -> str:
    """Codelength and distance over the seeds, each model with its reverse variance."""
    codelengths, distances = [], []
    for seed, (model, variance) in enumerate(zip(models, variances, strict=True)):
        times = model.sde.discretize(STEPS).times
        codelengths.append(sd.variational_bound(model, test, grid=times[1:].flip(0).tolist(), variance=variance).mean)
        grid = times.flip(0).tolist()
        out = sd.sample(model, len(test), solver="ddpm", grid=grid, variance=variance, seed=seed)
        distances.append(distance(out.samples, test))
    return f"{summary(codelengths, 4)} | {summary(distances, 2)}"


def summary(values: list[float], digits: int) -> str:
    """Mean ± standard error."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return f"{float(numbers.mean()):.{digits}f} ± {float(numbers.std()) / math.sqrt(len(numbers)):.{digits}f}"


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased energy distance times 1000; it may be below 0."""
    return 1000 * energy_distance(x, y, blocks=2).distance


if __name__ == "__main__":
    main()
