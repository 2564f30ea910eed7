"""Calibrate solvers to the model that ships with the package: python scripts/calibrate_pretrained.py.

Writes sde_diffusion/pretrained/fashion_mnist/calibrated_5.safetensors, and those of 10 and 20 evaluations, some minutes
each on one thread, and prints what each was fitted to and its held-out error beside the best published method's.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import sde_diffusion as sd
from sde_diffusion.samplers.calibrated import calibrated_path
from sde_diffusion.samplers.calibration import calibrate


def show(iteration: int, fitted: float, held_out: float) -> None:
    """Print a line."""
    print(f"{iteration:3d}  fitted {fitted:.4f}  held out {held_out:.4f}", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument(
        "--trajectories", type=int, help="by default as many as fewer evaluations allow: 480/nfe, or 48"
    )
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--probes", type=int, default=3)
    parser.add_argument("--output", default="sde_diffusion/pretrained/fashion_mnist")
    arguments = parser.parse_args()
    model = sd.load(sd.pretrained("fashion_mnist"))
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    for nfe in arguments.nfe:
        started = time.perf_counter()
        trajectories = arguments.trajectories or max(48, 480 // nfe)
        solver = calibrate(
            model,
            nfe,
            trajectories=trajectories,
            validation=trajectories // 2,
            starts=arguments.starts,
            iterations=arguments.iterations,
            probes=arguments.probes,
            callback=lambda i, fitted, held_out: print(
                f"{i:3d}  fitted {fitted:.4f}  held out {held_out:.4f}", flush=True
            ),
        )
        path = solver.save(calibrated_path(arguments.output, nfe))
        print(f"{path}, {path.stat().st_size} bytes, {time.perf_counter() - started:.0f} s")
        for name, value in asdict(solver.report).items():
            print(f"    {name}: {value:.4g}" if isinstance(value, float) else f"    {name}: {value}", flush=True)


if __name__ == "__main__":
    main()
