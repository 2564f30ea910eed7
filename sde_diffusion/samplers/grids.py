"""Times at which a solver stops on its way from noise to data.

| name        | equal steps in                                                                      |
|-------------|-------------------------------------------------------------------------------------|
| log_snr     | log(σ/α), so that the noise falls by one factor a step, whatever the SDE            |
| exponential | the same, under the name that others have for it: noise falls exponentially         |
| angle       | atan(σ/α), in which noise turns into data at an even pace; finite at both ends      |
| t           | time                                                                                |
| karras      | (σ/α)^{1/7}, between log_snr and equal steps of noise; Karras et al. 2022, eq. 5    |
| quadratic   | √t, so that steps shrink towards the data; Song et al. 2021 (DDIM), appendix D.2    |
| indices     | the states t = T i/1000, i = 1…1000, of a discrete chain; equal but for rounding    |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from sde_diffusion.sde import SDE

# ρ of Karras et al.
_RHO = 7
SPACINGS = ("trailing", "leading", "linspace")


def _equal_in_time(sde: SDE, start: float, end: float, steps: int) -> torch.Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def _equal_in_log_snr(sde: SDE, start: float, end: float, steps: int) -> torch.Tensor:
    check_log_snr(sde, start, end)
    noise = torch.linspace(sde.log_noise(start), sde.log_noise(end), steps + 1, dtype=torch.float64)
    return sde.t_from_log_snr(-2 * noise)


def _equal_in_angle(sde: SDE, start: float, end: float, steps: int) -> torch.Tensor:
    ends = torch.tensor([start, end], dtype=torch.float64)
    first, last = torch.atan2(sde.sigma(ends), sde.alpha(ends)).tolist()
    angle = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return sde.t_from_log_snr(-2 * torch.log(torch.tan(angle)))


def _equal_in_root_of_noise(sde: SDE, start: float, end: float, steps: int) -> torch.Tensor:
    # Only the noisy end may be infinite: there is a root of no noise.
    check_log_snr(sde, start, start)
    ends = torch.tensor([start, end], dtype=torch.float64)
    first, last = (sde.sigma(ends) / sde.alpha(ends)).pow(1 / _RHO).tolist()
    root = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return sde.t_from_log_snr(-2 * _RHO * torch.log(root))


def _equal_in_root_of_time(sde: SDE, start: float, end: float, steps: int) -> torch.Tensor:
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps + 1, dtype=torch.float64).square()


def index_times(
    sde: SDE, start: float, end: float, steps: int, spacing: str = "trailing", chain_steps: int = 1000
) -> torch.Tensor:
    """Times (steps + 1,) from ``start`` to ``end``, with states T i/chain_steps of a discrete chain between them.

    With n states from start to end, as 1000 from T to 0, and c = n/steps, i falls from start in steps of

        trailing: c, rounded, so that the last step is one of them too
        leading: ⌊c⌋, counted from the last state before the end, so that the first step is longer
        linspace: (n − 1)/(steps − 1), rounded, to the last state before the end

    as in Lin et al. 2024 (arXiv:2305.08891), table 2, where only "trailing" starts with all of the noise; and where it
    is a state's index i − 1 that they count.

    Raises:
        ValueError: for an unknown spacing, or more steps than states.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing = {spacing!r}: must be one of {', '.join(SPACINGS)}")
    # Some 1e-9 of a state from a state is that state, rounded.
    first = math.ceil(chain_steps * start / sde.T - 1e-9)
    last = math.floor(chain_steps * end / sde.T + 1e-9)
    count = first - last
    if steps > count:
        raise ValueError(
            f"steps = {steps}: must be at most {count}, the steps of a chain of {chain_steps} from t = {start} to {end}"
        )
    left = torch.arange(steps, 0, -1, dtype=torch.float64)
    if spacing == "trailing":
        states = last + torch.round(left * count / steps)
    elif spacing == "leading":
        states = last + 1 + (left - 1) * (count // steps)
    else:
        states = last + 1 + torch.round((left - 1) * (count - 1) / max(steps - 1, 1))
    times = torch.cat([states * sde.T / chain_steps, states.new_tensor([end])])
    times[0] = start
    return times


GRIDS: dict[str, Callable[[SDE, float, float, int], torch.Tensor]] = {
    "log_snr": _equal_in_log_snr,
    "exponential": _equal_in_log_snr,
    "angle": _equal_in_angle,
    "t": _equal_in_time,
    "karras": _equal_in_root_of_noise,
    "quadratic": _equal_in_root_of_time,
    "indices": index_times,
}


def time_grid(sde: SDE, kind: str | Sequence[float], start: float, end: float, steps: int) -> list[float]:
    """Decreasing times, ``steps`` + 1 of them, from ``start`` to ``end`` exactly.

    Args:
        sde: whose times they are.
        kind: a key of ``GRIDS``, or the times themselves.
        start: the noisy end.
        end: the end at the data.
        steps: number of steps; not used for given times.

    Raises:
        ValueError: for an unknown kind, a non-decreasing grid or one outside [0, T], a "log_snr" grid with
            an end where that is infinite, a "karras" grid with such a start, or more steps than "indices" has.
    """
    if not isinstance(kind, str):
        times = [sde.check_time("grid", float(t)) for t in kind]
        if len(times) < 2 or any(s >= t for t, s in pairwise(times)):
            raise ValueError(f"grid = {times}: needs at least two strictly decreasing times")
        return times
    if kind not in GRIDS:
        raise ValueError(f"grid = {kind!r}: must be one of {', '.join(GRIDS)}, or decreasing times")
    if not start > end:
        raise ValueError(f"t_start = {start}, t_end = {end}: t_start must be the larger")
    return [start, *GRIDS[kind](sde, start, end, steps)[1:-1].tolist(), end]


def check_log_snr(sde: SDE, start: float, end: float) -> None:
    """Raise a ValueError that names t_start or t_end if the log-SNR is infinite there."""
    for name, t in (("t_start", start), ("t_end", end)):
        if not math.isfinite(sde.log_noise(t)):
            raise ValueError(
                f"{name} = {t}: the log-SNR is infinite there; choose a time in [{sde.t_min}, {sde.t_max}], "
                f"or a solver and a grid that do not step in log-SNR, such as 'heun' with grid='angle'"
            )
