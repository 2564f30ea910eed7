"""Network rows that adaptive ODE solvers evaluate for a given error: python benchmarks/adaptive.py.

All of them solve the probability-flow ODE over the angle between data and noise, of the VP SDE from t = 1 to 1e-3, for
the two benchmark mixtures, 256 samples in float64. A cell holds the root mean square distance to a solution at 1e-11,
and the rows evaluated a sample: the sizes of all batches that the model was given, over 256. The last column is the
number of rows at equal error over that of dormand_prince: the geometric mean of the ratio over the errors that both
reach, of which log(rows) is a piecewise linear function of log(error).

torchode (pip install torchode==1.0.1) is left out where it is not installed.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torchdiffeq
from mixtures import ring, rotated
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import runge_kutta
from sde_diffusion.ode import integrate

try:
    import torchode
except ImportError:
    torchode = None

SDE = sd.VPSDE()
T_END = 1e-3
BATCH = 256
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
OURS = "dormand_prince"

Velocity = Callable[[Tensor, Tensor], Tensor]
# (velocity, x, both ends, tolerance) -> solution.
Solve = Callable[[Velocity, Tensor, list[float], float], Tensor]


def main() -> None:
    """Print the table."""
    run()


def run() -> None:
    """Print a line for every mixture and solver."""
    solvers = SOLVERS | (TORCHODE if torchode else {})
    if torchode is None:
        print("torchode is not installed: left out.\n")
    print("| mixture | solver |", " | ".join(f"{tolerance:g}" for tolerance in TOLERANCES), "| rows at equal error |")
    print("|---" * (len(TOLERANCES) + 3) + "|")
    for name, distribution in (("2-D", ring()), ("64-D", rotated(64))):
        curves: dict[str, list[tuple[float, float]]] = {}
        for solver, curve in measure(distribution.under(SDE), solvers):
            curves[solver] = curve
            cells = " | ".join(f"{error:.1e}, {rows:.1f}" for error, rows in curve)
            print(f"| {name} | {solver} | {cells} | {rows_ratio(curve, curves[OURS]):.2f} |", flush=True)


def measure(model: sd.Model, solvers: dict[str, Solve]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Of each solver in turn, its name and (error, rows a sample) at every tolerance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, *model.data_shape, generator=generator, dtype=torch.float64)
    t = torch.tensor([1.0, T_END], dtype=torch.float64)
    ends = torch.atan2(SDE.sigma(t), SDE.alpha(t)).tolist()
    rows = 0

    def velocity(y: Tensor, angle: Tensor) -> Tensor:
        """dy/dθ at an angle, () or (B,); y is x, as α² + σ² = 1."""
        nonlocal rows
        rows += len(y)
        # torchdiffeq looks beyond the end.
        angle = angle.double().clamp(min(ends), max(ends))
        x0, eps = model.predict(y, SDE.t_from_log_snr(-2 * torch.log(torch.tan(angle))))
        angle = angle.reshape(-1, 1)
        return torch.cos(angle) * eps - torch.sin(angle) * x0

    exact = torchdiffeq_shared(velocity, x, ends, 1e-11, method="dopri8")
    for name, solve in solvers.items():
        curve = []
        for tolerance in TOLERANCES:
            rows = 0
            solution = solve(velocity, x, ends, tolerance)
            curve.append((float((solution - exact).square().mean().sqrt()), rows / BATCH))
        yield name, curve


def ours(velocity: Velocity, x: Tensor, ends: list[float], tolerance: float) -> Tensor:
    """A sample's own steps, and no row for who has arrived."""
    return runge_kutta.solve(lambda rows: velocity, x, ends, rtol=tolerance, atol=tolerance)[-1]


def torchdiffeq_shared(
    velocity: Velocity, x: Tensor, ends: list[float], tolerance: float, method: str = "dopri5"
) -> Tensor:
    """Steps for the largest error of a batch, as the library has torchdiffeq take them."""

    def rates(state: tuple[Tensor, ...], angle: Tensor) -> tuple[Tensor, ...]:
        return (velocity(state[0], angle),)

    return integrate(rates, (x,), ends, method=method, rtol=tolerance, atol=tolerance)[0]


def torchdiffeq_default(velocity: Velocity, x: Tensor, ends: list[float], tolerance: float) -> Tensor:
    """Steps for the mean error of a batch, and an interpolant at the end."""
    points = torch.tensor(ends, dtype=torch.float64)
    path = torchdiffeq.odeint(lambda s, y: velocity(y, s), x, points, method="dopri5", rtol=tolerance, atol=tolerance)
    return path[-1]


def torchode_with(method: str) -> Solve:
    """A sample's own steps, by torchode's integral controller."""

    def solve(velocity: Velocity, x: Tensor, ends: list[float], tolerance: float) -> Tensor:
        term = torchode.ODETerm(lambda s, y: velocity(y, s))
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        start, end = (torch.full((len(x),), s, dtype=torch.float64) for s in ends)
        solver = torchode.AutoDiffAdjoint(getattr(torchode, method)(term=term), controller)
        return solver.solve(torchode.InitialValueProblem(y0=x, t_start=start, t_end=end)).ys.reshape(x.shape)

    return solve


def rows_ratio(curve: list[tuple[float, float]], base: list[tuple[float, float]], points: int = 50) -> float:
    """Geometric mean of the rows at equal error over those of ``base``, over the errors that both reach."""
    low = max(min(e for e, _ in c) for c in (curve, base))
    high = min(max(e for e, _ in c) for c in (curve, base))
    errors = [math.log(low) + (math.log(high) - math.log(low)) * i / (points - 1) for i in range(points)]
    return math.exp(sum(log_rows(curve, e) - log_rows(base, e) for e in errors) / points)


def log_rows(curve: list[tuple[float, float]], log_error: float) -> float:
    """Piecewise linear interpolation."""
    logs = sorted((math.log(error), math.log(rows)) for error, rows in curve)
    (left, below), (right, above) = next((pair for pair in pairwise(logs) if log_error <= pair[1][0]), logs[-2:])
    return below + (above - below) * (log_error - left) / (right - left)


SOLVERS: dict[str, Solve] = {
    OURS: ours,
    "torchdiffeq dopri5, as here": torchdiffeq_shared,
    "torchdiffeq dopri5, its defaults": torchdiffeq_default,
}
TORCHODE: dict[str, Solve] = {
    "torchode dopri5": torchode_with("Dopri5"),
    "torchode tsit5": torchode_with("Tsit5"),
}


if __name__ == "__main__":
    main()
