"""Interpolate between test images, by ODE latents and at several noise levels: python examples/interpolate.py.

Every row starts and ends with the two images themselves. Above, one row a pair: their latents at t_max are mixed on a
great circle and decoded by the probability-flow ODE. Below, the first pair once more for every level t: both are
noised to t, mixed on a straight line and decoded by DDPM; the larger t, the less the rows keep of the two.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.data import fashion_mnist
from sde_diffusion.data.pictures import save_picture


def main() -> None:
    """Load the model, interpolate, write the picture and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="run to load in place of the model that ships with the package")
    parser.add_argument("--count", type=int, default=4, help="pairs of images (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=9, help="images a row, with its ends (default: %(default)s)")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.2, 0.4, 0.6], help="times t of the lower rows")
    parser.add_argument("--steps", type=int, default=50, help="steps of DDPM (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the ODE solver (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and of the noise")
    parser.add_argument("--output", default="outputs/interpolate.png", help="picture to write")
    arguments = parser.parse_args()

    model = sd.load(arguments.workdir or sd.pretrained("fashion_mnist"))
    test = fashion_mnist("test")
    generator = torch.Generator().manual_seed(arguments.seed)
    codes = torch.stack(
        [test[int(i)][0] for i in torch.randperm(len(test), generator=generator)[: 2 * arguments.count]]
    )
    # Dequantised as in training: the latents of images without that noise are too short for the prior.
    x_a, x_b = model.data.dequantize(codes, torch.rand(codes.shape, generator=generator)).chunk(2)
    tolerances = {"rtol": arguments.tolerance, "atol": arguments.tolerance}

    started = time.perf_counter()
    latents = sd.encode(model, x_a, **tolerances)
    decoded = sd.sample(model, len(x_a), x_start=latents, solver="ode", **tolerances)
    error = (decoded.samples - x_a).square().mean().sqrt()
    print(f"round trip of {len(x_a)} images by ODE at tolerance {arguments.tolerance:g}: root mean square")
    print(f"  error of {error:.1e}, data in [{model.data.low:g}, {model.data.high:g}]; ", end="")
    print(f"decoding took nfe {decoded.nfe}; {time.perf_counter() - started:.1f} seconds")

    started = time.perf_counter()
    weights = [i / (arguments.columns - 1) for i in range(1, arguments.columns - 1)]
    rows = list(with_ends(sd.interpolate(model, x_a, x_b, weights, **tolerances), x_a, x_b).unbind(1))
    print(f"{len(rows)} rows by ODE: {time.perf_counter() - started:.1f} seconds")

    started = time.perf_counter()
    options = {"method": "shared_noise", "steps": arguments.steps, "grid": "angle", "seed": arguments.seed}
    for t in arguments.levels:
        mixed = sd.interpolate(model, x_a[:1], x_b[:1], weights, t=t, **options)
        rows += with_ends(mixed, x_a[:1], x_b[:1]).unbind(1)
    print(f"{len(arguments.levels)} rows at t = {arguments.levels}: nfe {arguments.steps} an image, ", end="")
    print(f"{time.perf_counter() - started:.1f} seconds")

    save_picture(torch.cat(rows), model.data, arguments.output, columns=arguments.columns)
    print(f"wrote {Path(arguments.output)}")


def with_ends(between: Tensor, x_a: Tensor, x_b: Tensor) -> Tensor:
    """Rows (K, B, ...) with the images themselves put in front and at the end."""
    return torch.cat([x_a[None], between, x_b[None]])


if __name__ == "__main__":
    main()
