"""The spiral of Nakkiran et al. (arXiv:2406.08929), figure 6: python examples/spiral.py.

A network of three ReLU layers learns the mean of the previous state from 10, 20 and 40 points of a spiral, and DDIM
follows it from noise at t = 1 (light) to t = 0 (dark). It goes to each of a few points from all sides; of more of them
it sees the curve (grey), and the trajectories arrive perpendicular to that.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from sde_diffusion import tutorial
from sde_diffusion.data.pictures import save_trajectories
from sde_diffusion.networks import MLP

# The standard deviation of the data: enough noise to hide their shape.
SIGMA_Q = 1.0
COUNTS = (10, 20, 40)
MEASURED, DRAWN = 2000, 350


def main() -> None:
    """Train on each number of points, follow DDIM, draw the trajectories and print how they arrive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of DDIM, 1/Δt (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=6000, help="updates of the network (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="points an update (default: %(default)s)")
    parser.add_argument("--averaged", action="store_true", help="regress on the mean of x_{t-Δt} given x_t and x_0")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--output", default="outputs/spiral.png", help="picture to write")
    arguments = parser.parse_args()

    trajectories = []
    for count in COUNTS:
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(arguments.seed)
        points = spiral((torch.arange(count) + 0.5) / count)
        network = train(points, arguments, generator)
        states = tutorial.sample(network, MEASURED, (2,), arguments.steps, sigma_q=SIGMA_Q, generator=generator)
        trajectories.append(states[:, :DRAWN])
        cosine, std_error = arrival(states)
        distance = torch.cdist(states[-1], points).amin(1).mean()
        print(f"{count} points: mean |cos| to the curve {cosine:.3f} ± {std_error:.3f}, mean distance to the closest")
        print(f"  point {distance:.2f}; nfe {arguments.steps}, {time.perf_counter() - started:.1f} seconds", flush=True)
    dots = [spiral((torch.arange(count) + 0.5) / count) for count in COUNTS]
    titles = [f"{count} points" for count in COUNTS]
    save_trajectories(trajectories, dots, titles, arguments.output, spiral(torch.linspace(0, 1, 500).square()))
    print(f"wrote {Path(arguments.output)}")


def spiral(u: Tensor) -> Tensor:
    """Points (n, 2) of the curve of ``sde_diffusion.data.spiral``, u (n,) in [0, 1]: r = 2√u, angle 3π√u."""
    angle = 3 * math.pi * u.sqrt()
    return 2 * u.sqrt()[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)


def train(points: Tensor, arguments: argparse.Namespace, generator: torch.Generator) -> MLP:
    """The tutorial's network, fitted to points (m, 2) by Adam with a cosine schedule."""
    torch.manual_seed(arguments.seed)
    network = MLP((2,), width=128, depth=3, activation="relu", time_scale=1.0, embedding=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.iterations)
    dt = 1 / arguments.steps
    for _ in range(arguments.iterations):
        x0 = points[torch.randint(len(points), (arguments.batch_size,), generator=generator)]
        t = dt * torch.randint(1, arguments.steps + 1, (arguments.batch_size,), generator=generator)
        loss = tutorial.train_loss(network, x0, t, dt, SIGMA_Q, generator, averaged=arguments.averaged).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def arrival(states: Tensor) -> tuple[float, float]:
    """Mean of |cos| between the last step of each trajectory (K, n, 2) and the curve where it ends; standard error.

    1 is along the curve, 0 perpendicular to it, and 2/π = 0.64 the mean of directions that do not know of it.
    """
    curve = spiral(torch.linspace(0, 1, 5001))
    closest = torch.cdist(states[-1], curve).argmin(1).clamp(1, len(curve) - 2)
    tangent = curve[closest + 1] - curve[closest - 1]
    cosine = torch.cosine_similarity(states[-1] - states[-2], tangent, dim=1).abs()
    return float(cosine.mean()), float(cosine.std() / math.sqrt(len(cosine)))


if __name__ == "__main__":
    main()
