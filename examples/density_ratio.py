"""The log ratio of two densities, which is a classifier: python examples/density_ratio.py.

Data of either of two mixtures, alike in the mean, are told apart by the sign of log p(x)/q(x) from two calls of
``log_likelihood``, and this is compared with the closed form. In the plane the trace is exact, and the picture shows
the ratio over it. In more dimensions it is estimated, and the reported standard error is held against the error made.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.exact import ExactModel

Pair = tuple[ExactModel, ExactModel]
# Half the side of the maps, and the largest log ratio, in nats, that they show.
REACH, LARGEST = 2.2, 10.0


def main() -> None:
    """Print how well the ratios agree in both cases, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="points of each mixture (default: %(default)s)")
    parser.add_argument("--dimension", type=int, default=32, help="of the second case (default: %(default)s)")
    parser.add_argument("--probes", type=int, default=8, help="of its estimate (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=64, help="points a side of the map (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the points and the probes")
    parser.add_argument("--output", default="outputs/density_ratio.png", help="picture to write")
    arguments = parser.parse_args()

    plane = (ring(0.0).under(sd.VPSDE()), ring(0.5).under(sd.VPSDE()))
    compare("in the plane", plane, arguments)
    first, second = (random_mixture(arguments.dimension, seed) for seed in (0, 1))
    space = (first.under(sd.VPSDE()), second.under(sd.VPSDE()))
    compare(f"in {arguments.dimension} dimensions", space, arguments)

    side = torch.linspace(-REACH, REACH, arguments.resolution)
    points = torch.cartesian_prod(side, side)
    expected, result = exact_ratio(plane, points), sd.log_density_ratio(*plane, points, trace="exact")
    print(f"over the map: off by at most {float((result.log_ratio - expected).abs().max()):.2g} nats")
    save_maps({"closed form": expected, "by ODE": result.log_ratio}, plane, Path(arguments.output))
    print(f"wrote {Path(arguments.output)}")


def ring(offset: float) -> sd.GaussianMixture:
    """Four Gaussians on a circle, turned by a share of the angle between them."""
    angle = (torch.arange(4) + offset) * (math.pi / 2)
    means = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return sd.GaussianMixture(means, 0.1 * torch.eye(2).expand(4, 2, 2))


def random_mixture(dimension: int, seed: int) -> sd.GaussianMixture:
    """Three Gaussians about 0 with random full covariances."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.3 * torch.randn(3, dimension, generator=generator)
    factors = torch.randn(3, dimension, 2 * dimension, generator=generator)
    return sd.GaussianMixture(means, factors @ factors.mT / (2 * dimension))


def exact_ratio(models: Pair, x: Tensor) -> Tensor:
    """log p/q (B,) in closed form, at the t_min of both."""
    p, q = (model.log_prob(x, model.sde.t_min) for model in models)
    return p - q


def compare(place: str, models: Pair, arguments: argparse.Namespace) -> None:
    """Print errors of the ratio, and of the classifier, on points of both."""
    x = torch.cat([model.sample(arguments.count, seed=arguments.seed + i) for i, model in enumerate(models)])
    is_p = torch.arange(2 * arguments.count) < arguments.count
    result = sd.log_density_ratio(*models, x, probes=arguments.probes, seed=arguments.seed)
    expected = exact_ratio(models, x)
    error = result.log_ratio - expected
    mistakes, least = (float(((ratio > 0) != is_p).float().mean()) for ratio in (result.log_ratio, expected))
    print(f"{place}: log ratios of {float(expected.abs().mean()):.2f} nats in the mean of their size")
    print(f"  root mean square error {float(error.square().mean().sqrt()):.2g} nats, ", end="")
    print(f"reported standard error at most {float(result.std_error.square().mean().sqrt()):.2g}")
    print(f"  {100 * mistakes:.1f} % of points on the wrong side, {100 * least:.1f} % by the closed form")


def save_maps(maps: dict[str, Tensor], models: Pair, path: Path) -> None:
    """Log ratios (resolution²,) side by side, with points of both mixtures and the line where they are equal."""
    figure = Figure(figsize=(4 * len(maps) + 1, 4.2), layout="constrained")
    panels = figure.subplots(1, len(maps))
    for axes, (name, values) in zip(panels, maps.items(), strict=True):
        side = math.isqrt(len(values))
        extent = (-REACH, REACH, -REACH, REACH)
        square = values.reshape(side, side).T.numpy()
        image = axes.imshow(square, origin="lower", extent=extent, vmin=-LARGEST, vmax=LARGEST, cmap="RdBu")
        axes.contour(square, levels=[0], extent=extent, colors="black", linewidths=1)
        for model, colour in zip(models, ("navy", "darkred"), strict=True):
            axes.scatter(*model.sample(200).T.numpy(), s=3, color=colour)
        axes.set(title=name, xticks=[], yticks=[], xlim=(-REACH, REACH), ylim=(-REACH, REACH))
    figure.colorbar(image, ax=panels, label="log p/q (nats): p blue, q red", extend="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
