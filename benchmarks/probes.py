"""Which probes, where, and over which variable: the evidence for the likelihood's design: python benchmarks/probes.py.

* probes: variance of each kind times its products, from whole Jacobians of the shipped model along the paths of test
  images, as a share of Rademacher's; and what it gains to put probes where the variance is;
* variable: error of Gauss's rule over all of the path in t, in the angle and in log(σ/α), on the 64-D mixture;
* steps: error of the solver and its estimate by steps and nodes a step, on mixtures with the exact trace.

--only=probes runs one of these.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from likelihood_reference import test_images
from mixtures import ring, rotated
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.divergence import colours
from sde_diffusion.ode import ProbabilityFlow

BLOCKS = (2, 4, 8, 16, 64)
NODES = 10


def jacobian(model: sd.Model, x: Tensor, t: float) -> Tensor:
    """That of α x̂₀ (D, D) at one example x."""
    dimension, copies = x.numel(), 28
    rows = x.expand(copies, *x.shape[1:]).contiguous().requires_grad_(True)
    with torch.enable_grad():
        data = model.sde.alpha(torch.tensor(t)) * model.denoise(rows, t)
    units = torch.eye(dimension).reshape(-1, copies, *x.shape[1:])
    parts = [torch.autograd.grad(data, rows, unit, retain_graph=True)[0] for unit in units]
    return torch.cat(parts).reshape(dimension, dimension).double()


def off_diagonal(matrix: Tensor) -> Tensor:
    """The symmetric part without its diagonal."""
    symmetric = (matrix + matrix.mT) / 2
    return symmetric - torch.diag(symmetric.diag())


def hutch_plus_plus(matrix: Tensor, products: int, draws: int = 5) -> float:
    """Mean variance of Meyer et al.'s estimate (arXiv:2010.09649), a third of the products for each of its parts."""
    third, generator, total = products // 3, torch.Generator().manual_seed(0), 0.0
    for _ in range(draws):
        sketch = torch.randint(0, 2, (len(matrix), third), generator=generator).double() * 2 - 1
        basis = torch.linalg.qr(matrix @ sketch).Q
        rest = matrix - basis @ (basis.mT @ matrix)
        rest = rest - (rest @ basis) @ basis.mT
        total += float(2 * off_diagonal(rest).square().sum()) / third
    return total / draws


def probes(arguments: argparse.Namespace) -> None:
    """Variances from whole Jacobians."""
    model, x = test_images(arguments.images)
    sde = model.sde
    u = np.linspace(sde.log_noise(sde.t_min), sde.log_noise(sde.t_max), NODES + 2)[1:-1]
    times = [sde.t_from_log_noise(value) for value in u]
    states: list[Tensor] = []
    with torch.no_grad():
        flow = ProbabilityFlow(sde, model.predict)
        grid = [sde.t_min, *times, sde.t_max]
        flow.solve(x, grid, partial(_append, states), method="dormand_prince", rtol=1e-5, atol=1e-5)
    print(f"\nvariance x products, as a share of Rademacher's; mean over {arguments.images} images; 784 dimensions\n")
    names = ["gaussian", *(f"orthogonal {size}" for size in BLOCKS), "Hutch++ 24", "Hutch++ 96"]
    print("| log(σ/α) | trace/D | standard deviation of one | " + " | ".join(names) + " |")
    print("|---" * (3 + len(names)) + "|")
    same = {size: (c := colours(x.shape[1:], size).flatten())[:, None] == c for size in BLOCKS}
    deviations, total = [], torch.zeros(1 + len(names), dtype=torch.float64)
    for value, t, state in zip(u, times, states, strict=False):
        rows = []
        for example in state:
            matrix = jacobian(model, example[None], t)
            off = off_diagonal(matrix)
            one = 2 * off.square().sum()
            ours = [size * 2 * (off.square() * same[size]).sum() for size in BLOCKS]
            symmetric = off + torch.diag(matrix.diag())
            plus = [products * hutch_plus_plus(matrix, products) for products in (24, 96)]
            rows.append(torch.tensor([matrix.trace() / len(matrix), one, 2 * symmetric.square().sum(), *ours, *plus]))
        trace, *variances = torch.stack(rows).mean(0)
        deviations.append(float(variances[0].sqrt()))
        total += torch.stack(variances)
        shares = " | ".join(f"{float(v / variances[0]):.2f}" for v in variances[1:])
        print(f"| {value:.2f} | {float(trace):.3f} | {deviations[-1]:.2f} | {shares} |", flush=True)
    print("| all | | | " + " | ".join(f"{float(v / total[0]):.2f}" for v in total[1:]) + " |")
    spread = torch.tensor(deviations)
    gain = float(spread.sum().square() / (NODES * spread.square().sum()))
    print(
        f"\nvariance with probes in proportion to the standard deviation, of that with as many at each node: {gain:.2f}"
    )


def variable(arguments: argparse.Namespace) -> None:
    """The integral of the exact divergence along exact paths."""
    model = rotated(64).under(sd.VPSDE())
    sde, x = model.sde, model.distribution.sample(64, seed=1)
    flow = ProbabilityFlow(sde, model.predict)
    first, last = sde.log_noise(sde.t_min), sde.log_noise(sde.t_max)
    angles = math.atan(math.exp(first)), math.atan(math.exp(last))
    tangent = torch.tan

    def of_time(t: Tensor) -> tuple[Tensor, Tensor]:
        return t, torch.ones_like(t)

    def of_angle(angle: Tensor) -> tuple[Tensor, Tensor]:
        t, rate = sde.time_change(torch.log(tangent(angle)))
        return t, rate / (torch.sin(angle) * torch.cos(angle))

    variables: dict[str, tuple[tuple[float, float], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
        "t": ((sde.t_min, sde.t_max), of_time),
        "angle": (angles, of_angle),
        "log(σ/α)": ((first, last), sde.time_change),
    }
    exact = model.log_prob(x, sde.t_min)
    print("\nmean absolute error of one Gauss rule over all of the path, nats/dim; 64-D mixture, VP\n")
    print("| variable | 12 nodes | 24 | 48 | 96 |\n|---|---|---|---|---|")
    for name, ((low, high), time_of) in variables.items():
        errors = []
        for number in (12, 24, 48, 96):
            points, weights = np.polynomial.legendre.leggauss(number)
            t, rate = time_of(torch.from_numpy(low + (high - low) * (points + 1) / 2))
            states: list[Tensor] = []
            grid = [sde.t_min, *t.tolist(), sde.t_max]
            end = flow.solve(x, grid, partial(_append, states), method="dormand_prince", rtol=1e-9, atol=1e-9)
            parts = zip(weights * (high - low) / 2, rate.tolist(), t.tolist(), states, strict=False)
            change = sum(w * r * model.divergence(state, time) for w, r, time, state in parts)
            errors.append(float((sde.prior_log_prob(end) + change - exact).abs().mean()) / 64)
        print(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors) + " |", flush=True)


def _append(states: list[Tensor], i: int, state: Tensor) -> None:
    states.append(state.clone())


def steps(arguments: argparse.Namespace) -> None:
    """Errors by steps and nodes, without refinement."""
    print("\nmean absolute error of the solver, nats/dim (and its estimate); VP, 128 points, exact trace\n")
    print("| mixture | steps | 2 nodes | 3 nodes | 4 nodes | 6 nodes |\n|---|---|---|---|---|---|")
    for dimension in (2, 64):
        distribution = ring() if dimension == 2 else rotated(dimension)
        model, x = distribution.under(sd.VPSDE()), distribution.sample(128, seed=1)
        exact = model.log_prob(x, model.sde.t_min)
        for number in (8, 12, 16, 24):
            cells = []
            for nodes in (2, 3, 4, 6):
                result = sd.log_likelihood(model, x, trace="exact", steps=number, nodes=nodes, atol=math.inf)
                error = float((result.log_prob - exact).abs().mean()) / dimension
                cells.append(f"{error:.1e} ({float(result.solver_error.mean()) / dimension:.1e})")
            print(f"| {dimension}-D | {number} | " + " | ".join(cells) + " |", flush=True)


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {"probes": probes, "variable": variable, "steps": steps}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SECTIONS), action="append", help="a section; all by default")
    parser.add_argument("--images", type=int, default=2, help="whose Jacobians are looked at")
    given = parser.parse_args()
    for section in given.only or SECTIONS:
        SECTIONS[section](given)
