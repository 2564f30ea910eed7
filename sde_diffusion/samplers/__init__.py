"""From noise to data: solvers, their time grids and their random numbers."""

from sde_diffusion.samplers.calibrated import Calibrated
from sde_diffusion.samplers.calibration import calibrate
from sde_diffusion.samplers.registry import SOLVERS, SolverInfo, solvers
from sde_diffusion.samplers.sample import Samples, sample

__all__ = ["SOLVERS", "Calibrated", "Samples", "SolverInfo", "calibrate", "sample", "solvers"]
