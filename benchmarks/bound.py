"""The variational bound less the exact −log p as the chain gets longer: python benchmarks/bound.py.

Nats a dimension of data drawn from a mixture, with the standard error of the mean of the differences, for both
variances of a reverse step and steps equal in log-SNR; the last line of each is the limit of continuous time. All
terms of a chain are evaluated twice an example.
"""

import argparse
import math

import torch
from mixtures import ring, rotated

import sde_diffusion as sd


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="points a mixture")
    parser.add_argument("--terms", type=int, default=256, help="strata of the limit")
    arguments = parser.parse_args()
    print("| mixture | SDE | T | posterior variance | noising variance |")
    print("|---|---|---|---|---|")
    for dimension in (2, 16):
        distribution = ring() if dimension == 2 else rotated(dimension)
        x = distribution.sample(arguments.count, seed=1)
        one, zero = torch.ones((), dtype=x.dtype), torch.zeros((), dtype=x.dtype)
        exact = distribution.log_prob(x, alpha=one, sigma=zero)
        for sde in (sd.VPSDE(), sd.CosineVPSDE(), sd.EDMSDE()):
            for steps in (10, 30, 100, 300, 1000, math.inf):
                terms = arguments.terms if steps == math.inf else None
                cells = []
                # In the limit there is but one variance.
                for variance in ("posterior",) if terms else ("posterior", "noising"):
                    model = distribution.under(sde)
                    bound = sd.variational_bound(model, x, steps=steps, variance=variance, terms=terms)
                    gap = (bound.nats + exact) / dimension
                    cells.append(f"{float(gap.mean()):.4f} ± {float(gap.std()) / math.sqrt(len(x)):.4f}")
                print(f"| {dimension}-D | {type(sde).__name__} | {steps} | {cells[0]} | {cells[-1]} |", flush=True)


if __name__ == "__main__":
    main()
