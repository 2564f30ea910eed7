"""log_likelihood with the exact trace against the closed form: python benchmarks/exact_likelihood.py.

Mean absolute error in nats a dimension at t_min, for mixtures in 2, 16 and 64 dimensions under each SDE; beside it the
gap to the density of the data themselves, which is a property of the SDE's t_min and no error of the solver.
"""

import argparse

import torch
from mixtures import ring, rotated

import sde_diffusion as sd


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="points a mixture")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the solver, relative and absolute")
    arguments = parser.parse_args()
    print("| mixture | SDE | t_min | nfe | mean abs error, nats/dim | gap to the data's density, nats/dim |")
    print("|---|---|---|---|---|---|")
    for dimension in (2, 16, 64):
        distribution = ring() if dimension == 2 else rotated(dimension)
        x = distribution.sample(arguments.count, seed=1).float()
        for sde in (sd.VPSDE(), sd.SubVPSDE(), sd.VESDE(), sd.EDMSDE()):
            model = distribution.under(sde)
            tolerance = arguments.tolerance
            result = sd.log_likelihood(model, x, trace="exact", rtol=tolerance, atol=tolerance)
            zero, one = torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)
            exact, clean = model.log_prob(x, result.t_min), distribution.log_prob(x, alpha=one, sigma=zero)
            error = float((result.log_prob - exact).abs().mean()) / dimension
            gap = float((exact - clean).abs().mean()) / dimension
            name = type(sde).__name__
            print(
                f"| {dimension}-D | {name} | {result.t_min:.2g} | {result.nfe} | {error:.1e} | {gap:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
