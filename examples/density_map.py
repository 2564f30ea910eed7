"""Maps of a density in the plane, exact and through the probability-flow ODE: python examples/density_map.py.

Eight Gaussians on a circle, noised to t_min. Left, their density in closed form. In the middle, what ``log_likelihood``
makes of their exact score: all that differs is the solver's error. Right, the same of a network that has learnt the
score from samples, by denoising. The scale is logarithmic: where there are no data the network errs most.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.data import eight_gaussians
from sde_diffusion.losses import LogNormal, denoising_loss
from sde_diffusion.networks import MLP

# Half the side of the maps, and the densities, in nats, that they show.
REACH, LOWEST, HIGHEST = 2.2, -10.0, 1.0


def main() -> None:
    """Train the network, compute the three maps, write the picture and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=64, help="points a side (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=2500, help="updates of the network (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=512, help="points an update (default: %(default)s)")
    parser.add_argument("--t_min", type=float, default=1e-3, help="time of the density (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the solver, in nats a dimension")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--output", default="outputs/density_map.png", help="picture to write")
    arguments = parser.parse_args()

    exact = mixture().under(sd.VPSDE())
    options = {"trace": "exact", "t_min": arguments.t_min, "atol": arguments.tolerance}
    started = time.perf_counter()
    learned = train(arguments.iterations, arguments.batch_size, arguments.seed)
    print(f"trained in {time.perf_counter() - started:.1f} seconds")

    side = torch.linspace(-REACH, REACH, arguments.resolution)
    points = torch.cartesian_prod(side, side)
    expected = exact.log_prob(points, arguments.t_min)
    maps = {"closed form": expected}
    for name, model in (("exact score, ODE", exact), ("learnt score, ODE", learned)):
        result = sd.log_likelihood(model, points, **options)
        maps[name] = result.log_prob
        error = (result.log_prob - expected).abs()
        # Where the data are: the mean over the density.
        weighted = float((error * expected.softmax(0)).sum())
        print(f"{name}: off by {weighted:.2g} nats in the mean over the data, at most by ", end="")
        print(f"{float(error[expected > LOWEST].max()):.2g} where log p > {LOWEST:g}; ", end="")
        print(f"nfe {float(result.nfe.double().mean()):.0f}")
    save_maps(maps, arguments.resolution, Path(arguments.output))
    print(f"wrote {Path(arguments.output)}")


def mixture() -> sd.GaussianMixture:
    """The distribution of ``sde_diffusion.data.eight_gaussians``."""
    std, angle = 0.1, torch.arange(8) * (2 * math.pi / 8)
    means = math.sqrt(2 * (1 - std**2)) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return sd.GaussianMixture(means, std**2 * torch.eye(2).expand(8, 2, 2))


def train(iterations: int, batch_size: int, seed: int) -> sd.DiffusionModel:
    """A network of the score, fitted by denoising; smooth, as its divergence is wanted."""
    torch.manual_seed(seed)
    # It is told log(σ/α) in place of the time.
    network = MLP((2,), width=128, depth=4, time_scale=1.0, embedding=0)
    model = sd.DiffusionModel(network, sd.VPSDE(), "edm", data_shape=(2,), sigma_data=1.0)
    times = LogNormal(model.sde)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    generator, points = torch.Generator().manual_seed(seed), eight_gaussians(100_000, seed)
    for _ in range(iterations):
        x0 = points[torch.randint(len(points), (batch_size,), generator=generator)]
        t, _ = times.draw(torch.rand(batch_size, generator=generator))
        loss = denoising_loss(model, x0, t, torch.randn(x0.shape, generator=generator), "v").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def save_maps(maps: dict[str, Tensor], resolution: int, path: Path) -> None:
    """Log densities (resolution²,) side by side, with one scale of colours."""
    figure = Figure(figsize=(3.6 * len(maps) + 0.8, 3.8), layout="constrained")
    panels = figure.subplots(1, len(maps))
    for axes, (name, values) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(
            values.reshape(resolution, resolution).T.numpy(),
            origin="lower",
            extent=(-REACH, REACH, -REACH, REACH),
            vmin=LOWEST,
            vmax=HIGHEST,
        )
        axes.set(title=name, xticks=[], yticks=[])
    figure.colorbar(image, ax=panels, label="log density (nats)", extend="min")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
