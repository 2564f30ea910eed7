"""Progressive generation and progressive coding: python examples/progressive.py.

First picture: what the model expects of the data at levels of noise on the way from noise to data, one sample a row;
the silhouette comes first, the texture last. Second: how close a receiver of the same states of test images gets to
them, against the bits that these cost by the variational bound (Ho et al. 2020, arXiv:2006.11239, section 4.3).
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import sde_diffusion as sd
from sde_diffusion.data import fashion_mnist
from sde_diffusion.data.pictures import save_picture


def main() -> None:
    """Load the model, draw samples, bound the code length of test images, write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="run to load in place of the model that ships with the package")
    parser.add_argument("--count", type=int, default=8, help="samples, and test images (default: %(default)s)")
    parser.add_argument("--levels", type=int, default=10, help="levels of noise to show (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of DDPM and of the bound (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--output", default="outputs/progressive.png", help="picture of the samples")
    parser.add_argument("--curve", default="outputs/rate_distortion.png", help="picture of the curve")
    arguments = parser.parse_args()

    model = sd.load(arguments.workdir or sd.pretrained("fashion_mnist"))
    progress = sd.progressive(model, arguments.count, arguments.levels, steps=arguments.steps, seed=arguments.seed)
    rows = progress.x0.transpose(0, 1).flatten(0, 1)
    save_picture(rows, model.data, arguments.output, columns=arguments.levels)
    print(f"{arguments.count} samples: nfe {progress.nfe}, {progress.seconds:.1f} seconds")
    print(f"wrote {Path(arguments.output)}, t = {', '.join(f'{t:.3g}' for t in progress.times)}")

    test = fashion_mnist("test")
    images = torch.stack([test[i][0] for i in range(arguments.count)])
    bound = sd.variational_bound(model, images, steps=arguments.steps, repeats=1, seed=arguments.seed)
    curve = sd.rate_distortion(bound)
    print(f"bound on {arguments.count} test images with {arguments.steps} steps: {bound.mean:.2f} {bound.unit}", end="")
    print(f" ± {bound.sampling_error:.2f} from one image to another; nfe {bound.nfe}, {bound.seconds:.1f} seconds")
    for rate in (0.1, 0.5, 1.0):
        reached = int((curve.rate < rate).sum().clamp(max=len(curve.rate) - 1))
        print(f"  after {float(curve.rate[reached]):.2f} bits/dim: root mean square error ", end="")
        print(f"{float(curve.distortion[reached]):.1f} of 255")
    save_curve(curve, Path(arguments.curve))
    print(f"wrote {Path(arguments.curve)}")


def save_curve(curve: sd.RateDistortion, path: Path) -> None:
    """Plot distortion against rate."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curve.rate, curve.distortion, marker=".")
    axes.set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE, range 255)", ylim=0)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
