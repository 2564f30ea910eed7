"""Solvers calibrated to the two target mixtures: python benchmarks/calibrated.py.

Distance (root mean square over dimensions and samples) at t = 1e-3 to the tight solution of the same probability-flow
ODE, from starts at t = 1 that took no part in any calibration: 4,096 of the 2-D target and 512 of the 64-D one. The
first table sets it beside the smallest distance of all configurations of other libraries' solvers, some 200 a cell,
that benchmarks/peers.py measures on the same starts, and beside the best of this library's published methods on all
grids. Root mean squares are mostly those of the few samples that end in another mode: the median is of each sample's
own distance. The second has the number of trajectories that a solver is fitted to. Some twenty minutes on one thread.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
from family import T_END, Case, targets

import sde_diffusion as sd
from sde_diffusion.samplers.calibrated import Report
from sde_diffusion.samplers.calibration import calibrate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COUNTS = (5, 8, 10, 15, 20)
TRAJECTORIES = (32, 64, 128, 256, 512)
PEERS = {
    "2-D target": {5: 0.049, 8: 0.019, 10: 0.016, 15: 0.0087, 20: 0.0053},
    "64-D target": {5: 0.222, 8: 0.119, 10: 0.077, 15: 0.021, 20: 0.012},
}


class Row(NamedTuple):
    """One calibration, judged on the starts of a case."""

    distance: float
    median: float
    seconds: float
    report: Report


def measure(case: Case, nfe: int, trajectories: int) -> Row:
    """Calibrate and judge; the validation trajectories are 256, so that only the others are of another number."""
    started = time.perf_counter()
    solver = calibrate(case.model, nfe, trajectories=trajectories, validation=256, t_end=T_END)
    seconds = time.perf_counter() - started
    samples = sd.sample(case.model, len(case.start), solver=solver, x_start=case.start).samples
    errors = (samples - case.end).square().mean(1).sqrt()
    return Row(case.error(samples), float(errors.median()), seconds, solver.report)


def by_evaluations(case: Case, counts: tuple[int, ...]) -> dict[int, Row]:
    """Print a row for each number of evaluations."""
    rows = {}
    for nfe in counts:
        rows[nfe] = row = measure(case, nfe, trajectories=512)
        peer = PEERS[case.name][nfe]
        print(
            f"| {case.name} | {nfe} | {row.distance:.2g} | {peer:.2g} | {row.distance / peer:.2f} | {row.median:.2g} | "
            f"{row.report.hand_made_error:.2g} ({row.report.hand_made}) | {row.seconds:.0f} |",
            flush=True,
        )
    return rows


def by_trajectories(case: Case, nfe: int, numbers: tuple[int, ...]) -> dict[int, Row]:
    """Print a row for each number of trajectories."""
    rows = {}
    for number in numbers:
        rows[number] = row = measure(case, nfe, number)
        print(
            f"| {case.name} | {number} | {row.report.fitted_error:.2g} | {row.distance:.2g} | {row.median:.2g} | "
            f"{row.seconds:.0f} |",
            flush=True,
        )
    return rows


def picture(name: str, counted: dict[int, Row], fitted: dict[int, Row], nfe: int, output: Path) -> None:
    """Distance against evaluations, and against trajectories."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    evaluations = list(counted)
    left.plot(evaluations, [PEERS[name][n] for n in evaluations], "s--", color="0.5", label="best of other libraries")
    left.plot(evaluations, [counted[n].distance for n in evaluations], "o-", label="calibrated")
    left.plot(evaluations, [counted[n].median for n in evaluations], "o:", label="calibrated, median")
    left.set(yscale="log", xlabel="evaluations", ylabel="distance on unseen starts", title=name)
    numbers = list(fitted)
    right.plot(numbers, [fitted[n].report.fitted_error for n in numbers], "v--", label="fitted trajectories")
    right.plot(numbers, [fitted[n].distance for n in numbers], "o-", label="unseen")
    right.plot(numbers, [fitted[n].median for n in numbers], "o:", label="unseen, median")
    right.set(xscale="log", yscale="log", xlabel="trajectories", title=f"{nfe} evaluations")
    left.set_xticks(evaluations)
    right.set_xticks(numbers, labels=[str(number) for number in numbers])
    right.minorticks_off()
    for axis in (left, right):
        axis.legend()
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def run(
    counts: tuple[int, ...] = COUNTS,
    numbers: tuple[int, ...] = TRAJECTORIES,
    nfe: int = 8,
    output: str = "docs/images",
) -> None:
    """Print both tables and draw the curves."""
    cases = targets()
    print("| target | evaluations | distance | best of others | ratio | median | published methods here | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    counted = [by_evaluations(case, counts) for case in cases]
    print(f"\n{nfe} evaluations:\n")
    print("| target | trajectories | distance, fitted | distance, unseen | median, unseen | seconds |")
    print("|---|---|---|---|---|---|")
    fitted = [by_trajectories(case, nfe, numbers) for case in cases]
    for case, evaluations, trajectories in zip(cases, counted, fitted, strict=True):
        path = Path(output) / f"calibrated_{case.name.split('-')[0]}d.png"
        picture(case.name, evaluations, trajectories, nfe, path)
        print(f"\nwrote {path}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--trajectories", type=int, nargs="+", default=list(TRAJECTORIES))
    parser.add_argument("--nfe", type=int, default=8)
    parser.add_argument("--output", default="docs/images")
    arguments = parser.parse_args()
    run(tuple(arguments.counts), tuple(arguments.trajectories), arguments.nfe, arguments.output)


if __name__ == "__main__":
    main()
