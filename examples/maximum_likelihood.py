"""Fit a model by maximum likelihood, through the solver: python examples/maximum_likelihood.py.

A small network learns the score of four Gaussians by denoising, for too short a time. Then its log-likelihood itself
is maximised for a few updates, by backpropagation through fixed steps of the probability-flow ODE. The likelihood of
held-out points, by an adaptive solver, is compared with the true density's at the same points: in the mean that is
minus the entropy, and the best there is. The gap to it is the divergence KL(data ‖ model).
"""

import argparse
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.exact import ExactModel
from sde_diffusion.losses import LogNormal, denoising_loss
from sde_diffusion.networks import MLP


def main() -> None:
    """Train in both ways, print held-out likelihoods with their errors, and plot how they rose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=200, help="updates by denoising (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=50, help="updates by likelihood (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="points an update (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="of the fixed-step solver (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1000, help="held-out points (default: %(default)s)")
    parser.add_argument("--t_min", type=float, default=1e-3, help="time of the density (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--output", default="outputs/maximum_likelihood.png", help="picture to write")
    arguments = parser.parse_args()

    exact = mixture().under(sd.VPSDE())
    torch.manual_seed(arguments.seed)
    # Smooth in log(σ/α), which it is told in place of the time, as the solver's steps are long.
    network = MLP((2,), width=64, time_scale=1.0, embedding=0)
    model = sd.DiffusionModel(network, exact.sde, "edm", data_shape=(2,), sigma_data=1.0)
    # Held out, and noised up to t_min as the density is.
    held_out = exact.sample(arguments.count, t=arguments.t_min, seed=10**6)
    best = exact.log_prob(held_out, arguments.t_min)
    print(f"true density: {mean_and_error(best)} nats, minus the entropy at t_min = {arguments.t_min:g}")

    started = time.perf_counter()
    pretrain(model, exact, arguments)
    before = sd.log_likelihood(model, held_out, trace="exact", t_min=arguments.t_min).log_prob
    print(f"{arguments.pretraining} updates by denoising: {mean_and_error(before)}, KL {mean_and_error(best - before)}")

    pretrained = time.perf_counter()
    curve = maximize_likelihood(model, exact, arguments)
    trained = time.perf_counter()
    after = sd.log_likelihood(model, held_out, trace="exact", t_min=arguments.t_min).log_prob
    print(f"{arguments.iterations} more by likelihood: {mean_and_error(after)}, KL {mean_and_error(best - after)}")
    print(f"gained, point by point: {mean_and_error(after - before)} nats")
    print(f"{pretrained - started:.0f} and {trained - pretrained:.0f} seconds; ", end="")
    save_curve(curve, Path(arguments.output))
    print(f"wrote {Path(arguments.output)}")


def mixture() -> sd.GaussianMixture:
    """Four Gaussians on a circle, of standard deviation 0.2."""
    std, angle = 0.2, torch.arange(4) * (math.pi / 2)
    means = math.sqrt(2 * (1 - std**2)) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return sd.GaussianMixture(means, std**2 * torch.eye(2).expand(4, 2, 2))


def pretrain(model: sd.DiffusionModel, exact: ExactModel, arguments: argparse.Namespace) -> None:
    """Denoising, the usual way to learn a score."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator, times = torch.Generator().manual_seed(arguments.seed), LogNormal(model.sde)
    for i in range(arguments.pretraining):
        x0 = exact.sample(arguments.batch_size, seed=i)
        t, _ = times.draw(torch.rand(len(x0), generator=generator))
        loss = denoising_loss(model, x0, t, torch.randn(x0.shape, generator=generator), "v").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def maximize_likelihood(model: sd.DiffusionModel, exact: ExactModel, arguments: argparse.Namespace) -> list[float]:
    """Gradient ascent on the log-likelihood of new points each time; what it is below the true one of these points."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    curve = []
    for i in range(arguments.iterations):
        x = exact.sample(arguments.batch_size, t=arguments.t_min, seed=arguments.pretraining + i)
        log_prob = sd.differentiable_log_likelihood(
            model, x, steps=arguments.steps, trace="exact", t_min=arguments.t_min, recompute=False
        ).mean()
        optimizer.zero_grad()
        (-log_prob).backward()
        optimizer.step()
        curve.append(float(exact.log_prob(x, arguments.t_min).mean() - log_prob.detach()))
    return curve


def mean_and_error(values: Tensor) -> str:
    """Mean (B,) and its standard error."""
    return f"{float(values.mean()):.3f} ± {float(values.std() / math.sqrt(len(values))):.3f}"


def save_curve(curve: list[float], path: Path) -> None:
    """Plot the divergence, as each update's points show it."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(curve) + 1), curve, marker=".")
    axes.set(xlabel="update by maximum likelihood", ylabel="KL(data ‖ model), nats", ylim=0)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
