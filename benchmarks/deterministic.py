"""Error of the deterministic solvers at few evaluations: python benchmarks/deterministic.py.

Root mean square distance to the end point of the same probability-flow ODE, solved at 1e-10, of the VP SDE from t = 1
to 1e-3, for the two benchmark mixtures in float64: every solver on every grid at 10, 20 and 50 evaluations.
"""

import argparse
from typing import Any

import torch
from mixtures import ring, rotated

import sde_diffusion as sd
from sde_diffusion.ode import ProbabilityFlow

T_END = 1e-3
GRIDS = ("log_snr", "angle", "t", "karras", "quadratic")
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "heun": ("heun", {}),
    "dpmpp_2s": ("dpmpp_2s", {}),
    "dpmpp_3s": ("dpmpp_3s", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_3m": ("dpmpp_3m", {}),
    "lms": ("lms", {}),
    "pndm, no Runge-Kutta": ("pndm", {"warmup": "multistep"}),
    "unipc, order 2": ("unipc", {"order": 2}),
    "unipc, order 3": ("unipc", {"order": 3}),
    "deis, order 2": ("deis", {"order": 2}),
    "deis, order 3": ("deis", {"order": 3}),
    "deis, order 4": ("deis", {"order": 4}),
}


def run(counts: tuple[int, ...] = (10, 20, 50)) -> None:
    """Print a table for each mixture."""
    for name, distribution, count in (("2-D", ring(), 4096), ("64-D", rotated(64), 512)):
        model = distribution.under(sd.VPSDE())
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(count, *model.data_shape, generator=generator, dtype=torch.float64)
        exact = ProbabilityFlow(model.sde, model.predict).solve(
            x, [1.0, T_END], method="dopri8", rtol=1e-10, atol=1e-10
        )
        print(f"\n| {name} |", " | ".join(f"{grid} {nfe}" for grid in GRIDS for nfe in counts), "|")
        print("|---" * (1 + len(GRIDS) * len(counts)) + "|")
        for label, (solver, options) in SOLVERS.items():
            errors = []
            for grid in GRIDS:
                for nfe in counts:
                    out = sd.sample(model, count, solver=solver, nfe=nfe, grid=grid, x_start=x, t_end=T_END, **options)
                    errors.append(f"{float((out.samples - exact).square().mean().sqrt()):.2g}")
            print(f"| {label} |", " | ".join(errors), "|", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nfe", type=int, nargs="+", default=[10, 20, 50])
    run(tuple(parser.parse_args().nfe))


if __name__ == "__main__":
    main()
