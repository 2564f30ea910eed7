"""solver="auto" against every sampler of the peers and every deterministic solver of ours, at equal evaluations.

    python benchmarks/auto.py

prints three kinds of tables and draws docs/images/solvers_*.png;

    python benchmarks/auto.py --rules

what the rules were drawn from: the geometric mean, on the training mixtures, of each solver on each grid of the family
of ``samplers/auto.py`` that is in its table, and on that of √t. Errors are root mean square distances to the end point
of the same ODE, in float64 (see family.py); the rules of "auto" were drawn from other mixtures than these. A
configuration is a solver or sampler with its options and one of the grids of ``grids.GRIDS``; an error of a
configuration that cannot be had, or is not finite, counts as infinite.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peers
from family import T_END, T_START, Case, geometric_mean, held_out, targets, training
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.samplers.auto import CORRECTED_DEIS, RULES, Rule, choose
from sde_diffusion.samplers.grids import GRIDS
from sde_diffusion.samplers.multistep import DEIS

COUNTS = (5, 8, 10, 15, 20, 30, 50)
IMAGES = Path(__file__).parent.parent / "docs" / "images"

# All are run from so many starts, and those whose geometric mean is not within a factor of the least, and that are not
# at the least in any cell, from these alone.
SCREENED, NEAR = 32, 2.0

Solve = Callable[[Case, int], Tensor]
# Errors by configuration, case and evaluations.
Errors = dict[str, dict[str, dict[int, float]]]

# Every deterministic solver of fixed steps, with the options that change it.
OURS: list[tuple[str, dict[str, Any]]] = [
    ("euler", {}),
    ("ddim", {}),
    ("heun", {}),
    ("dpmpp_2s", {}),
    ("dpmpp_3s", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_3m", {}),
    *(("unipc", {"order": order}) for order in (1, 2, 3)),
    ("unipc", {"order": 3, "lower_order_final": False}),
    *(("deis", {"order": order, "form": form}) for form in ("data", "noise", "velocity") for order in (2, 3, 4)),
    *(("lms", {"order": order}) for order in (2, 3, 4)),
    ("pndm", {}),
]


def run(
    samples: int = 128,
    samples_2d: int = 4096,
    samples_64d: int = 512,
    counts: tuple[int, ...] = COUNTS,
    images: Path | None = IMAGES,
) -> None:
    """Measure everything, print the tables, and draw the curves.

    Args:
        samples: starts of a held-out mixture.
        samples_2d: starts of the target in the plane.
        samples_64d: starts of the target in 64 dimensions.
        counts: evaluations.
        images: folder of the pictures; None for none.
    """
    aims = targets(samples_2d, samples_64d)
    cases = held_out(samples) + aims
    groups: dict[str, dict[str, Solve]] = {"auto": {"auto": auto}, "peers": _peers(), "ours": _ours()}
    errors: dict[str, Errors] = {}
    for group, configurations in groups.items():
        started = time.perf_counter()
        errors[group] = measure(configurations, cases, counts)
        seconds = time.perf_counter() - started
        print(f"{group}: {len(configurations)} configurations in {seconds:.0f} s", flush=True)
    print_summary(errors, [case.name for case in cases], counts)
    for case in aims:
        print_target(errors, case.name, counts)
        if images is not None:
            draw(errors, case.name, counts, images / f"solvers_{case.name.split('-')[0]}d.png")


def by(rule: Rule) -> Solve:
    """A rule for any number of evaluations."""

    def solve(case: Case, nfe: int) -> Tensor:
        solver = rule.solver()
        solver.times = rule.times(case.model.sde, T_START, T_END, nfe)
        return sd.sample(case.model, len(case.start), solver=solver, x_start=case.start).samples

    return solve


def auto(case: Case, nfe: int) -> Tensor:
    """What is judged."""
    solver = choose(case.model.sde, nfe, T_START, T_END)
    out = sd.sample(case.model, len(case.start), solver=solver, x_start=case.start)
    if out.nfe != nfe:
        raise RuntimeError(f"auto took {out.nfe} evaluations for {nfe}")
    return out.samples


def ours(solver: str, grid: str, options: dict[str, Any]) -> Solve:
    """One of ours."""

    def solve(case: Case, nfe: int) -> Tensor:
        x = case.start
        out = sd.sample(case.model, len(x), solver=solver, grid=grid, nfe=nfe, x_start=x, t_end=T_END, **options)
        if out.nfe > nfe:
            raise RuntimeError(f"{solver} took {out.nfe} evaluations of {nfe}")
        return out.samples

    return solve


def _ours() -> dict[str, Solve]:
    configurations: dict[str, Solve] = {}
    for solver, options in OURS:
        label = " ".join([solver, *(f"{name}={value}" for name, value in options.items())])
        configurations |= {f"{label}, {grid}": ours(solver, grid, options) for grid in GRIDS}
    return configurations


def _peers() -> dict[str, Solve]:
    def peer(sampler: peers.Sampler, grid: str) -> Solve:
        return lambda case, nfe: sampler.solve(case, grid, nfe)

    return {f"{sampler.name}, {grid}": peer(sampler, grid) for sampler in peers.samplers() for grid in GRIDS}


def measure(configurations: dict[str, Solve], cases: list[Case], counts: tuple[int, ...]) -> Errors:
    """The error of each in every cell; infinite at counts where it is out of the running on a few of the starts."""
    few = [case.first(SCREENED) for case in cases]
    errors: Errors = {name: {case.name: {} for case in cases} for name in configurations}
    for nfe in counts:
        screened = {name: [_error(solve, case, nfe) for case in few] for name, solve in configurations.items()}
        least = [min(column) for column in zip(*screened.values(), strict=True)]
        least_mean = min(geometric_mean(row) for row in screened.values())
        kept = 0
        for name, solve in configurations.items():
            is_near = geometric_mean(screened[name]) < NEAR * least_mean
            is_kept = is_near or any(error < 1.2 * cell for error, cell in zip(screened[name], least, strict=True))
            kept += is_kept
            for case in cases:
                errors[name][case.name][nfe] = _error(solve, case, nfe) if is_kept else math.inf
        print(f"  {nfe} evaluations: {kept} of {len(configurations)} measured on all starts", flush=True)
    return errors


def _error(solve: Solve, case: Case, nfe: int) -> float:
    try:
        error = case.error(solve(case, nfe))
    except ValueError:
        # Some cannot do with so few evaluations.
        return math.inf
    return error if math.isfinite(error) else math.inf


def best(errors: Errors, cases: list[str], nfe: int) -> tuple[float, str]:
    """Geometric mean over the cases, and name, of the configuration in which that is smallest."""
    return min((geometric_mean([cells[case][nfe] for case in cases]), name) for name, cells in errors.items())


def print_summary(errors: dict[str, Errors], cases: list[str], counts: tuple[int, ...]) -> None:
    """Geometric means over all cases at each count."""
    print(f"\nGeometric mean of the errors on {len(cases)} mixtures, none of which a rule was drawn from:\n")
    print("| evaluations | auto | best peer | | auto / it | best single one of ours | | auto / best of each cell |")
    print("|---|---|---|---|---|---|---|---|")
    for nfe in counts:
        auto = errors["auto"]["auto"]
        mean, (theirs, peer), (single, name) = (best(errors[group], cases, nfe) for group in ("auto", "peers", "ours"))
        cells = [min(measured[case][nfe] for group in errors.values() for measured in group.values()) for case in cases]
        ratio = geometric_mean([auto[case][nfe] / cell for case, cell in zip(cases, cells, strict=True)])
        print(
            f"| {nfe} | {mean[0]:.3g} | {theirs:.3g} | {peer} | {mean[0] / theirs:.2f} | {single:.3g} | {name} "
            f"| {ratio:.2f} |",
            flush=True,
        )


def print_target(errors: dict[str, Errors], case: str, counts: tuple[int, ...]) -> None:
    """The errors of one case at each count, beside the best that there is of each kind for it."""
    print(f"\n{case}:\n\n| evaluations | auto | best peer | | best of ours | |\n|---|---|---|---|---|---|")
    for nfe in counts:
        auto = errors["auto"]["auto"][case][nfe]
        (theirs, peer), (single, name) = (best(errors[group], [case], nfe) for group in ("peers", "ours"))
        print(f"| {nfe} | {auto:.2g} | {theirs:.2g} | {peer} | {single:.2g} | {name} |", flush=True)


def print_rules(samples: int, counts: tuple[int, ...]) -> None:
    """Candidates for the rules on the mixtures that they are drawn from."""
    cases = training(samples)
    solvers: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
        "DEIS": (DEIS, (3, 4)),
        "corrected": (CORRECTED_DEIS, (2, 3, 4)),
    }
    grids = sorted({(2.0, 0.25, 0.0), *((rule.sharpness, rule.power, rule.centre) for rule in RULES)})
    print(f"\nGeometric mean of the errors on {len(cases)} mixtures:\n")
    print(f"| solver | d, p, c | {' | '.join(map(str, counts))} |\n|---|---|{'---|' * len(counts)}")
    for label, (kind, orders) in solvers.items():
        for order, grid in itertools.product(orders, grids):
            rule = Rule(1, partial(kind, order=order), *grid)
            cells = [f"{geometric_mean([_error(by(rule), case, nfe) for case in cases]):.2g}" for nfe in counts]
            print(f"| {label} {order} | {', '.join(map(str, grid))} | {' | '.join(cells)} |", flush=True)


def draw(errors: dict[str, Errors], case: str, counts: tuple[int, ...], path: Path) -> None:
    """Error against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.6))
    labels = {"auto": "auto", "peers": "best peer of each count", "ours": "best of ours of each count"}
    for (group, label), style in zip(labels.items(), ("o-", "s--", "^:"), strict=True):
        axes.loglog(counts, [best(errors[group], [case], nfe)[0] for nfe in counts], style, label=label)
    axes.set(title=case, xlabel="evaluations of the model", ylabel="root mean square error")
    axes.set_xticks(counts, [str(nfe) for nfe in counts])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="starts of a held-out mixture")
    parser.add_argument("--samples-2d", type=int, default=4096, help="starts of the target in the plane")
    parser.add_argument("--samples-64d", type=int, default=512, help="starts of the target in 64 dimensions")
    parser.add_argument("--nfe", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--rules", action="store_true", help="print what the rules were drawn from instead")
    arguments = parser.parse_args()
    if arguments.rules:
        print_rules(arguments.samples, tuple(arguments.nfe))
        return
    sizes = (arguments.samples, arguments.samples_2d, arguments.samples_64d)
    run(*sizes, counts=tuple(arguments.nfe), images=arguments.images)


if __name__ == "__main__":
    main()
