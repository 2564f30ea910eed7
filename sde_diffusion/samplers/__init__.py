"""From noise to data: solvers, their time grids and their random numbers."""

from sde_diffusion.samplers.sample import SOLVERS, Samples, sample, solvers

__all__ = ["SOLVERS", "Samples", "sample", "solvers"]
