r"""Fitting the grid and the coefficients of a ``Calibrated`` solver to a model.

The start is the best of the published methods, written in the form y_{i+1} = a_i y_i + Σ_j w_ij v_j of that solver:
what a linear method makes of unit vectors are its coefficients. Then all numbers move at once, so that the ends y_N of
whole trajectories come close to those ŷ of the same starts by a tight solver:

    minimise  mean over trajectories of √(e² + c²)          e² = mean over dimensions of (y_N − ŷ)²

with c three times the median of e. Where a trajectory takes the other side of a mode e is large and says little of the
others; a plain mean of e² would be about nothing else. The steps are Gauss-Newton's, a regularised least squares each,
with Marquardt's damping. With λ_i the sensitivity of z·y_N to y_i, found from the last backwards,

    λ_N = z        μ_i = Σ_{k≥i} w_ki λ_{k+1}        λ_i = a_i λ_{i+1} + (∂v_i/∂y_i)ᵀ μ_i
    derivatives of z·y_N by   a_i: λ_{i+1}·y_i        w_ij: λ_{i+1}·v_j        θ_i: μ_i·∂v_i/∂θ_i

a trajectory gives the row zᵀJ of its Jacobian for one vector-Jacobian product an evaluation. The gradient is that of
z = y_N − ŷ; E[Jᵀ z zᵀ J] = Jᵀ J for random signs z gives the Gauss-Newton matrix. Trajectories that took no part in
this choose among the iterates, of which the first is a published method.

Sources: Shaul et al. 2024 (arXiv:2403.01329), who fit all of a solver to end points, by their own objective and Adam;
Marquardt 1963, An algorithm for least-squares estimation of nonlinear parameters; Hutchinson 1990, for random signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.exact import ExactModel
from sde_diffusion.model import Model, Prediction, combination, evaluating, slice_cond
from sde_diffusion.ode import ProbabilityFlow
from sde_diffusion.samplers.calibrated import Calibrated, Fingerprint, Report, polar, responses, slope_at
from sde_diffusion.samplers.grids import GRIDS, time_grid
from sde_diffusion.samplers.multistep import DEIS, DPMSolver2M, DPMSolver3M, UniPC, weighted_sum
from sde_diffusion.samplers.noise import Streams
from sde_diffusion.samplers.solver import Predict, Problem, StepSolver
from sde_diffusion.sde import SDE

HAND_MADE: dict[str, Callable[[], StepSolver]] = {
    "ddim": partial(DEIS, 1),
    "deis, order 2": partial(DEIS, 2),
    "deis, order 3": partial(DEIS, 3),
    "deis, order 4": partial(DEIS, 4),
    "dpmpp_2m": DPMSolver2M,
    "dpmpp_3m": DPMSolver3M,
    "unipc, order 2": partial(UniPC, 2),
    "unipc, order 3": partial(UniPC, 3),
}

# Streams of their own: those of sample()'s seeds are what a calibrated solver will be used on.
_FIRST_SEED = 2**32
# By default as many trajectories as hold 2¹⁵ numbers, and a batch of twice as many numbers.
_NUMBERS = 2**15
_FIRST_DAMPING = 0.1
# Iterations of every start before one of them is chosen.
_TRIAL = 5


@torch.no_grad()
def calibrate(
    model: Model,
    nfe: int,
    *,
    trajectories: int | None = None,
    validation: int | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    starts: int = 3,
    iterations: int = 30,
    probes: int = 2,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable[[int, float, float], None] | None = None,
) -> Calibrated:
    """Fit a grid and the coefficients of a linear multistep method to a model, for ``nfe`` evaluations.

    Trajectories start in the prior, from seeds that ``sample`` does not use, and are solved tightly once: in float64
    at 1e-8 if the model is exact, else in ``dtype`` at 1e-5. Published methods on all grids are tried on some of them;
    ``starts`` of the best, of different grids, are improved by 5 iterations each, the best of these by up to
    ``iterations`` more, until the held-out trajectories no longer gain. An iteration costs, for each trajectory, 2 nfe
    evaluations, 1 nfe for each step tried, and (1 + probes) nfe products with a Jacobian.

    Args:
        model: a trained or exact model; with guidance, the guided one.
        nfe: N, evaluations of the model that the solver makes.
        trajectories: to fit to; by default as many as hold 2¹⁵ numbers, but 64 to 512.
        validation: trajectories held out, to choose among the iterates by; half as many by default.
        t_start: the first time; t_max by default.
        t_end: the last; t_min by default.
        cond: keyword arguments for the model; tensors of length trajectories + validation are cut into batches.
        seed: of the starts and of the random signs.
        starts: published methods to begin with.
        iterations: of the best of them, at most.
        probes: random signs for the Gauss-Newton matrix.
        batch_size: trajectories solved together; by default as many as hold 2¹⁶ numbers.
        device: where to compute; the model's device by default.
        dtype: of the states; the model's by default.
        callback: called with (iteration, error, held-out error) after each, root mean squares a dimension.

    Returns:
        The solver, for ``sample(model, n, solver=...)``, with its ``report``.

    Raises:
        ValueError: for a number that is not positive, a negative seed, a t_start without the prior, or a time range
            that is not one.
    """
    size = math.prod(model.data_shape)
    trajectories = min(512, max(64, _NUMBERS // size)) if trajectories is None else trajectories
    validation = (trajectories + 1) // 2 if validation is None else validation
    batch_size = max(1, 2 * _NUMBERS // size) if batch_size is None else batch_size
    numbers = {"nfe": nfe, "trajectories": trajectories, "validation": validation, "starts": starts, "probes": probes}
    for name, number in (numbers | {"batch_size": batch_size}).items():
        if number < 1:
            raise ValueError(f"{name} = {number}: must be at least 1")
    if seed < 0:
        raise ValueError(f"seed = {seed}: must be at least 0")
    span = _span(model, t_start, t_end)
    device, dtype = torch.device(device or model.device), dtype or model.dtype
    with evaluating(model):
        data = _Trajectories(model, span, trajectories, validation, cond, seed, batch_size, device, dtype)
        published = sorted(_published(data, nfe), key=lambda candidate: candidate.errors.mean())
        fit = _Fit(data, probes, seed, callback)
        runs = [_Run(fit, candidate.steps) for candidate in _one_a_grid(published)[:starts]]
        for run in runs:
            run.improve(_TRIAL)
        best = min(runs, key=lambda run: run.held_out)
        best.improve(iterations)
        return _finished(data, best.best, published[0], seed)


def _span(model: Model, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    """The times to solve between, from where the prior is."""
    sde = model.sde
    start = sde.t_max if t_start is None else model.check_time("t_start", t_start)
    end = sde.t_min if t_end is None else sde.check_time("t_end", t_end)
    if start < sde.t_max:
        raise ValueError(f"t_start = {start}: must be at least t_max = {sde.t_max}, where the prior is")
    if not end < start:
        raise ValueError(f"t_start = {start}, t_end = {end}: t_start must be the larger")
    return start, end


def _finished(data: _Trajectories, steps: _Steps, hand_made: _Candidate, seed: int) -> Calibrated:
    """The solver of these steps, with its report and its model's fingerprint."""
    sde, times = data.model.sde, steps.times(data.model.sde, *data.span)
    levels = torch.stack([level(torch.tensor(times, dtype=torch.float64)) for level in (sde.alpha, sde.sigma)])
    # Of x, where those of the fit are of y = x/n.
    errors, fitted, theirs = (
        torch.hypot(*levels[:, -1]) * data.errors(method, indices)
        for method, indices in (
            (steps, data.held_out),
            (steps, data.fitted),
            (hand_made.steps, data.held_out),
        )
    )
    report = Report(
        error=_root_mean_square(errors),
        median_error=float(errors.median()),
        fitted_error=_root_mean_square(fitted),
        hand_made=hand_made.name,
        hand_made_error=_root_mean_square(theirs),
        hand_made_median_error=float(theirs.median()),
        trajectories=len(data.fitted),
        validation=len(data.held_out),
        seed=seed,
        evaluations=data.evaluations,
        gradients=data.gradients,
    )
    y, cond = data.start[:2].float().cpu(), data.cond_of(range(min(2, data.total)))
    fingerprint = Fingerprint(y, responses(data.model, times, y, cond), cond)
    return Calibrated(
        times, steps.scale, steps.weights, sde=repr(sde), levels=levels, fingerprint=fingerprint, report=report
    )


def _root_mean_square(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


@dataclass(frozen=True)
class _Steps:
    """θ (N + 1,), a (N,) and w (N, N) of a method, in float64 on the host."""

    angles: Tensor
    scale: Tensor
    weights: Tensor

    def times(self, sde: SDE, start: float, end: float) -> list[float]:
        inner = sde.t_from_log_snr(-2 * torch.log(torch.tan(self.angles[1:-1])))
        return [start, *inner.tolist(), end]

    def free(self) -> Tensor:
        """The numbers that are fitted: θ_1…θ_{N−1}, a, and w row by row."""
        row, column = torch.tril_indices(*self.weights.shape)
        return torch.cat([self.angles[1:-1], self.scale, self.weights[row, column]])

    def moved(self, change: Tensor) -> _Steps:
        """By relative changes: of log Δθ, whose sum stays what it is, and of a and w in units of their step Δθ."""
        n, gaps = len(self.scale), -self.angles.diff()
        row, column = torch.tril_indices(n, n)
        stretched = gaps * torch.exp(torch.cat([change[: n - 1], change.new_zeros(1)]))
        stretched = stretched * (gaps.sum() / stretched.sum())
        angles = torch.cat([self.angles[:1], self.angles[0] - stretched.cumsum(0)[:-1], self.angles[-1:]])
        scale = self.scale + gaps * change[n - 1 : 2 * n - 1]
        weights = torch.zeros_like(self.weights).index_put((row, column), gaps[row] * change[2 * n - 1 :])
        return _Steps(angles, scale, self.weights + weights)

    def jacobian(self) -> Tensor:
        """d free/d change at no change."""
        return torch.func.jacfwd(lambda change: self.moved(change).free())(torch.zeros_like(self.free()))


@dataclass(frozen=True)
class _Candidate:
    name: str
    grid: str
    steps: _Steps
    errors: Tensor


class _Trajectories:
    """Starts, the ends that they should reach, and what a method makes of them."""

    def __init__(
        self,
        model: Model,
        span: tuple[float, float],
        trajectories: int,
        validation: int,
        cond: Mapping[str, Any] | None,
        seed: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.model, self.span, self.cond, self.batch_size, self.device = model, span, cond, batch_size, device
        self.evaluations, self.gradients, self.total = 0, 0, trajectories + validation
        self.fitted, self.held_out = range(trajectories), range(trajectories, self.total)
        sde, start = model.sde, torch.tensor(span[0], dtype=torch.float64)
        std = sde.prior_std if span[0] <= sde.t_max else float(sde.sigma(start))
        norms, _ = polar(sde, torch.tensor(span, dtype=torch.float64))
        exact = isinstance(model, ExactModel)
        tight = torch.float64 if exact else dtype
        x = std * Streams(_FIRST_SEED + seed, range(self.total), device).normal(model.data_shape, tight)
        self.start = (x / norms[0]).to(dtype)
        ends = []
        for batch in self.batches(range(self.total)):
            flow = ProbabilityFlow(sde, partial(self._counted, self.cond_of(batch)))
            options = {"method": "dopri8", "rtol": 1e-8, "atol": 1e-8} if exact else {"rtol": 1e-5, "atol": 1e-5}
            ends.append(flow.solve(x[batch.start : batch.stop], list(span), **options) / norms[1])
        self.end = torch.cat(ends).to(dtype)

    def _counted(self, cond: dict[str, Any], x: Tensor, t: Tensor) -> Prediction:
        self.evaluations += len(x)
        return self.model.predict(x, t, **cond)

    def cond_of(self, batch: range) -> dict[str, Any]:
        """The conditioning of some of them."""
        return slice_cond(self.cond, self.total, batch, self.device)

    def batches(self, indices: range) -> Iterator[range]:
        for first in range(indices.start, indices.stop, self.batch_size):
            yield range(first, min(indices.stop, first + self.batch_size))

    def roll_out(self, steps: _Steps, batch: range) -> tuple[list[Tensor], list[Tensor]]:
        """y_0…y_N and v_0…v_{N−1}."""
        states, slopes, cond = [self.start[batch.start : batch.stop]], [], self.cond_of(batch)
        times = torch.tensor(steps.times(self.model.sde, *self.span), dtype=torch.float64, device=self.start.device)
        for i, (scale, weights) in enumerate(zip(steps.scale.tolist(), steps.weights.tolist(), strict=True)):
            self.evaluations += len(batch)
            slopes.append(slope_at(self.model, states[-1], times[i], cond))
            states.append(weighted_sum(scale, states[-1], reversed(weights[: i + 1]), slopes))
        return states, slopes

    def errors(self, steps: _Steps, indices: range) -> Tensor:
        """e (len(indices),) in float64."""
        found = []
        for batch in self.batches(indices):
            end = self.roll_out(steps, batch)[0][-1]
            found.append((end - self.end[batch.start : batch.stop]).flatten(1).double().square().mean(1).sqrt())
        return torch.cat(found).nan_to_num(math.inf).cpu()

    def rows(
        self, steps: _Steps, batch: range, states: list[Tensor], slopes: list[Tensor], directions: Tensor
    ) -> Tensor:
        """∂(z·y_N)/∂free (K, B, P) for directions z (K, B, ...)."""
        n, cond = len(slopes), self.cond_of(batch)
        sde = self.model.sde
        times = torch.tensor(steps.times(sde, *self.span), dtype=torch.float64)
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        pace = (alpha.square() + sigma.square()) / (alpha * sde.sigma_dot(times) - sigma * sde.alpha_dot(times))
        sensitivity = [directions] * (n + 1)
        of_angle, of_scale, of_weights = [], [], []
        for i in reversed(range(n)):
            of_scale.append(_products(sensitivity[i + 1], states[i][None]))
            of_weights.append(_products(sensitivity[i + 1], torch.stack(slopes[: i + 1])))
            if i == 0:
                break
            later = [(float(steps.weights[k, i]), sensitivity[k + 1]) for k in range(i, n)]
            arriving = combination(*later)
            by_state, by_time = self._products_with_jacobian(states[i], float(times[i]), cond, arriving)
            sensitivity[i] = float(steps.scale[i]) * sensitivity[i + 1] + by_state
            of_angle.append(float(pace[i]) * by_time[..., None])
        return torch.cat([*reversed(of_angle), *reversed(of_scale), *reversed(of_weights)], -1)

    def _products_with_jacobian(
        self, y: Tensor, t: float, cond: dict[str, Any], directions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z·∂v/∂y (K, B, ...) and z·∂v/∂t (K, B) for directions z (K, B, ...)."""
        self.evaluations += len(y)
        self.gradients += len(y) * len(directions)
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            at = torch.full((len(y),), t, dtype=torch.float64, device=y.device, requires_grad=True)
            slope = slope_at(self.model, y, at, cond)
        products = [torch.autograd.grad(slope, (y, at), z, retain_graph=True) for z in directions]
        return torch.stack([by_state for by_state, _ in products]), torch.stack([by_time for _, by_time in products])


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of each example (K, B, J) in float64, for a (K, B, ...) and b (J, B, ...)."""
    return torch.einsum("kbd,jbd->kbj", a.flatten(2), b.flatten(2)).double()


class _UnitVectors(Model):
    """A model whose k-th answer is v = e_{k+1}: what a linear method makes of these are its coefficients."""

    def __init__(self, sde: SDE, nfe: int):
        self.sde, self.data_shape, self.calls = sde, (nfe + 1,), 0

    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> Prediction:
        self.calls += 1
        norm, angle = polar(self.sde, self.sde.as_time(t, x))
        y, slope = x / norm, torch.zeros_like(x)
        slope[:, self.calls] = 1
        return Prediction(
            torch.cos(angle) * y - torch.sin(angle) * slope, torch.sin(angle) * y + torch.cos(angle) * slope
        )


def _read_off(solver: StepSolver, sde: SDE, times: list[float]) -> _Steps:
    """A linear method of one evaluation a step, in the form of this module."""
    nfe = len(times) - 1
    norm, angles = polar(sde, torch.tensor(times, dtype=torch.float64))
    x = torch.zeros(1, nfe + 1, dtype=torch.float64)
    x[0, 0] = norm[0]
    states = [x]
    predict = Predict(_UnitVectors(sde, nfe))
    solver.solve(Problem(sde, predict, times, Streams(0, range(1)), lambda i, state: states.append(state)), x)
    y = torch.cat(states) / norm[:, None]
    scale = torch.where(y[:-1, 0] == 0, 0.0, y[1:, 0] / y[:-1, 0])
    return _Steps(angles, scale, (y[1:] - scale[:, None] * y[:-1])[:, 1:].tril())


def _published(data: _Trajectories, nfe: int) -> Iterator[_Candidate]:
    """Every hand-made method on every grid, with its errors on some of the trajectories."""
    few = range(min(len(data.fitted), max(8, _NUMBERS // 4 // data.start[0].numel()), 128))
    for grid in GRIDS:
        for name, make in HAND_MADE.items():
            try:
                steps = _read_off(make(), data.model.sde, time_grid(data.model.sde, grid, *data.span, nfe))
            except ValueError:
                # Not all of them reach an end of time where the log-SNR is infinite.
                continue
            yield _Candidate(f"{name}, {grid}", grid, steps, data.errors(steps, few))


def _one_a_grid(candidates: list[_Candidate]) -> list[_Candidate]:
    """The first of each grid."""
    first: dict[str, _Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.grid, candidate)
    return list(first.values())


class _Fit:
    """The objective, and its Gauss-Newton equations."""

    def __init__(
        self, data: _Trajectories, probes: int, seed: int, callback: Callable[[int, float, float], None] | None
    ):
        self.data, self.probes, self.callback, self.iterations = data, probes, callback, 0
        self.generator = torch.Generator(data.start.device).manual_seed(seed)

    def equations(self, steps: _Steps) -> tuple[Tensor, Tensor, float]:
        """Gradient (P,) and Gauss-Newton matrix (P, P) of the objective in relative changes, and c."""
        data, size = self.data, self.data.start[0].numel()
        rolled = [(batch, *data.roll_out(steps, batch)) for batch in data.batches(data.fitted)]
        residuals = [states[-1] - data.end[batch.start : batch.stop] for batch, states, _ in rolled]
        errors = torch.cat([residual.flatten(1).double().square().mean(1).sqrt() for residual in residuals])
        margin = 3 * float(errors.median())
        shares = torch.rsqrt(errors.square() + margin**2) / (size * len(data.fitted))
        count = len(steps.free())
        gradient, matrix = errors.new_zeros(count), errors.new_zeros(count, count)
        for (batch, states, slopes), residual in zip(rolled, residuals, strict=True):
            share = shares[batch.start : batch.stop, None]
            uniform = torch.rand(self.probes, *residual.shape, generator=self.generator, device=residual.device)
            signs = torch.where(uniform < 0.5, -1.0, 1.0).to(residual.dtype)
            first, *rows = data.rows(steps, batch, states, slopes, torch.cat([residual[None], signs]))
            gradient = gradient + (share * first).sum(0)
            for row in rows:
                matrix = matrix + row.T @ (share * row) / self.probes
        jacobian = steps.jacobian()
        return jacobian.T @ gradient.cpu(), jacobian.T @ matrix.cpu() @ jacobian, margin


def _objective(errors: Tensor, margin: float) -> float:
    return float(torch.sqrt(errors.square() + margin**2).mean())


class _Run:
    """A method on its way from a published one."""

    def __init__(self, fit: _Fit, steps: _Steps):
        self.fit, self.steps, self.best, self.damping = fit, steps, steps, _FIRST_DAMPING
        self.errors = fit.data.errors(steps, fit.data.fitted)
        self.held_out = float(fit.data.errors(steps, fit.data.held_out).mean())
        self.since_best, self.is_done = 0, False

    def improve(self, iterations: int, patience: int = 6, least_gain: float = 1e-3) -> None:
        """Iterate until nothing is gained: by the objective, or for ``patience`` iterations by what is held out."""
        for _ in range(iterations):
            if self.is_done:
                return
            gain = self._step()
            self.since_best += 1
            held_out = self.fit.data.errors(self.steps, self.fit.data.held_out)
            if float(held_out.mean()) < self.held_out:
                self.best, self.held_out, self.since_best = self.steps, float(held_out.mean()), 0
            self.is_done = gain < least_gain or self.since_best >= patience
            self.fit.iterations += 1
            if self.fit.callback is not None:
                errors = [float(values.square().mean().sqrt()) for values in (self.errors, held_out)]
                self.fit.callback(self.fit.iterations, *errors)

    def _step(self, attempts: int = 8) -> float:
        """Lower the objective, and return by which part of it."""
        gradient, matrix, margin = self.fit.equations(self.steps)
        before, diagonal = _objective(self.errors, margin), matrix.diagonal()
        # What moves y_N little is held by the mean too: a long way could move it otherwise than the matrix says.
        weight = torch.diag(diagonal + 0.01 * diagonal.mean())
        for _ in range(attempts):
            steps = self.steps.moved(torch.linalg.solve(matrix + self.damping * weight, -gradient))
            errors = self.fit.data.errors(steps, self.fit.data.fitted)
            after = _objective(errors, margin)
            if after < before:
                self.steps, self.errors, self.damping = steps, errors, max(self.damping / 4, 1e-8)
                return 1 - after / before
            self.damping *= 4
        return 0.0
