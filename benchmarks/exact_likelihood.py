"""log_likelihood with the exact trace against the closed form: python benchmarks/exact_likelihood.py.

Mean absolute error in nats a dimension at t_min, for mixtures in 2, 16 and 64 dimensions under each SDE; beside it the
gap between the densities at t_min and at 0, which is a property of the SDE's t_min and no error of the solver.
"""

import argparse
import math

import torch

import sde_diffusion as sd


def mixture(dimension: int, components: int = 10) -> sd.GaussianMixture:
    """Random means and rotated covariances of unit variance a dimension in all; in 2-D eight modes on a ring."""
    if dimension == 2:
        angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
        means = math.sqrt(2 * (1 - 0.1**2)) * torch.stack([angle.cos(), angle.sin()], 1)
        return sd.GaussianMixture(means, 0.1**2 * torch.eye(2, dtype=torch.float64).repeat(8, 1, 1))
    generator = torch.Generator().manual_seed(dimension)
    means = torch.randn(components, dimension, generator=generator, dtype=torch.float64)
    gaussian = torch.randn(components, dimension, dimension, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(gaussian)[0]
    uniform = torch.rand(components, dimension, generator=generator, dtype=torch.float64)
    eigenvalues = torch.exp(math.log(0.01) + uniform * math.log(2 / 0.01))
    total = means.square().mean() + eigenvalues.mean()
    return sd.GaussianMixture(means / total.sqrt(), rotation @ torch.diag_embed(eigenvalues / total) @ rotation.mT)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="points a mixture")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the solver, relative and absolute")
    arguments = parser.parse_args()
    print("| mixture | SDE | t_min | nfe | mean abs error, nats/dim | gap p(t_min) to p(0), nats/dim |")
    print("|---|---|---|---|---|---|")
    for dimension in (2, 16, 64):
        distribution = mixture(dimension)
        x = distribution.sample(arguments.count, seed=1).float()
        for sde in (sd.VPSDE(), sd.SubVPSDE(), sd.VESDE(), sd.EDMSDE()):
            model = distribution.under(sde)
            tolerance = arguments.tolerance
            result = sd.log_likelihood(model, x, trace="exact", rtol=tolerance, atol=tolerance)
            exact, clean = model.log_prob(x, result.t_min), model.log_prob(x, 0.0)
            error = float((result.log_prob - exact).abs().mean()) / dimension
            gap = float((exact - clean).abs().mean()) / dimension
            name = type(sde).__name__
            print(f"| {dimension}-D | {name} | {result.t_min:.2g} | {result.nfe} | {error:.1e} | {gap:.1e} |", flush=True)


if __name__ == "__main__":
    main()
