r"""The reverse SDE handed to torchsde, over u = log(σ/α):  dx = drift du + η √2 σ dW̄.

torchsde runs time upwards in equal steps; r = 0…N counts ours, u = u_start + r Δu. Fixed steps draw each sample's
increments from its own stream, one after another. Adaptive ones need a whole Brownian path that can be looked up
anywhere, and share their step size within a batch: there each sample is solved alone, so that it does not depend on its
neighbours.

Runs of different steps can share a path: a ``torchsde.BrownianInterval`` of the part r/N of the way, from 0 to 1, whose
values are refined by halves from the sample's seed alone. They then differ by their errors only, which are of strong
order 1.5 for "srk" and 1 for the others. It is slow, at thirty halvings a sample and step, but for numbers of steps
that are powers of two up to 512.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torchsde
from torch import Tensor

from sde_diffusion.samplers.noise import StepNoise
from sde_diffusion.samplers.solver import Problem, Solver
from sde_diffusion.sde import drift_in_log_noise, non_negative

# Our noise does not depend on x, so Itô's and Stratonovich's readings are one; a method accepts only its own.
# "reversible_heun" is not among them: it is stable on the imaginary axis alone, and the reverse SDE contracts.
METHODS = {
    "euler": ("ito", "none"),
    "milstein": ("ito", "none"),
    "srk": ("ito", "space-time"),
    "heun": ("stratonovich", "none"),
    "euler_heun": ("stratonovich", "none"),
    "midpoint": ("stratonovich", "none"),
    "log_ode": ("stratonovich", "foster"),
}
# Orders in law; along a path all are of order 1, but "srk" of 1.5.
_ORDERS = {"euler": 1, "milstein": 1, "srk": 2, "heun": 2, "euler_heun": 1, "midpoint": 2, "log_ode": 2}
# Of a path, as a part of the way: where halving ends.
_RESOLUTION = 1e-9


class TorchSDE(Solver):
    """Any method of torchsde by its name."""

    default_steps: ClassVar[int] = 100
    in_log_snr: ClassVar[bool] = True
    is_stochastic = True

    def __init__(
        self,
        method: str = "srk",
        eta: float = 1.0,
        adaptive: bool = False,
        rtol: float = 1e-3,
        atol: float = 1e-3,
        reproducible_path: bool = False,
    ):
        """Choose the method and its noise.

        Args:
            method: a key of ``METHODS``.
            eta: η > 0, the scale of the noise.
            adaptive: whether it chooses its own steps, of which the grid's is the first.
            rtol: of an adaptive step.
            atol: of an adaptive step.
            reproducible_path: whether a sample of a seed follows one Brownian path whatever the steps.

        Raises:
            ValueError: for an unknown method, or η or a tolerance that is not positive.
        """
        if method not in METHODS:
            raise ValueError(f"method = {method!r}: must be one of {', '.join(METHODS)}")
        if not (rtol > 0 and atol > 0 and non_negative("eta", eta) > 0):
            raise ValueError(f"eta = {eta}, rtol = {rtol}, atol = {atol}: must be positive")
        self.method, self.eta, self.adaptive, self.rtol, self.atol = method, float(eta), adaptive, rtol, atol
        self.reproducible_path = reproducible_path

    @property
    def convergence_order(self) -> int | None:
        """In law, of fixed steps."""
        return None if self.adaptive else _ORDERS[self.method]

    def evaluations_per_step(self) -> int | None:
        """Not fixed: some methods evaluate a step's end for the next step too."""
        return None

    def solve(self, problem: Problem, x: Tensor) -> Tensor:
        """Integrate from grid[0] to grid[-1].

        Raises:
            ValueError: unless the grid's steps are equal in log-SNR.
        """
        u = torch.tensor([problem.sde.log_noise(t) for t in problem.grid], dtype=torch.float64)
        equal = torch.linspace(float(u[0]), float(u[-1]), len(u), dtype=torch.float64)
        if not torch.allclose(u, equal, atol=1e-6):
            raise ValueError("grid: torchsde takes equal steps in log-SNR; give grid='log_snr' and steps")
        return self._solve_alone(problem, x, u) if self.adaptive else self._solve_batch(problem, x, u)

    def _solve_batch(self, problem: Problem, x: Tensor, u: Tensor) -> Tensor:
        if self.reproducible_path:
            path: Any = _Paths(problem.streams.seeds(), len(u) - 1, x, is_dyadic=True)
        else:
            path = _Increments(StepNoise(problem.streams, (x[0].numel(),), x.dtype), x.flatten(1).shape)
        states = self._integrate(problem, x, u, path)
        for i in range(1, len(u)):
            problem.observe(i, states[i])
        return states[-1]

    def _solve_alone(self, problem: Problem, x: Tensor, u: Tensor) -> Tensor:
        solved = []
        for i, seed in enumerate(problem.streams.seeds()):
            alone = x[i : i + 1]
            path = _Paths([seed], len(u) - 1, alone, is_dyadic=self.reproducible_path)
            solved.append(self._integrate(problem.single(i), alone, u, path))
        states = torch.cat(solved, dim=1)
        for i in range(1, len(u)):
            problem.observe(i, states[i])
        return states[-1]

    def _integrate(self, problem: Problem, x: Tensor, u: Tensor, path: Any) -> Tensor:
        """States (N + 1, B, ...) at r = 0…N."""
        reverse = _Reverse(problem, x.shape[1:], u, self.eta, METHODS[self.method][0])
        with warnings.catch_warnings():
            # The noise does not depend on x, for which torchsde's warning about adaptive Euler is meant.
            warnings.filterwarnings("ignore", message="Numerical solution is not guaranteed")
            states = torchsde.sdeint(
                reverse,
                x.flatten(1),
                torch.arange(len(u), dtype=torch.float64),  # on the host: torchsde compares them at every step
                bm=path,
                method=self.method,
                dt=1.0,
                adaptive=self.adaptive,
                rtol=self.rtol,
                atol=self.atol,
            )
        return states.reshape(len(u), *x.shape)


class _Reverse(torch.nn.Module):
    """torchsde's view of the reverse SDE: states (B, D), drift f and diagonal noise g over r."""

    noise_type = "diagonal"

    def __init__(self, problem: Problem, shape: torch.Size, u: Tensor, eta: float, sde_type: str):
        super().__init__()
        self.problem, self.shape, self.eta, self.sde_type = problem, shape, eta, sde_type
        self.start, self.stride = float(u[0]), float(u[1] - u[0])
        self._known: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=4)
        # torchsde asks for g some twenty times a step, at three times.
        self._sigma = lru_cache(maxsize=4)(self._sigma_at)

    def f(self, r: Tensor, y: Tensor) -> Tensor:
        """Drift a unit of r.

        The last answers are kept: torchsde asks for the first once more to learn its shape, for those of a
        step's stages again at every later stage, and "srk" ends each step with its first stage, at weight 0.
        """
        for known_r, known_y, drift in self._known:
            if torch.equal(known_r, r) and torch.equal(known_y, y):
                return drift
        x = y.reshape(-1, *self.shape)
        drift = drift_in_log_noise(self.problem.sde, self.problem.predict, x, self._log_noise(r), self.eta)
        self._known.append((r, y, (self.stride * drift).flatten(1)))
        return self._known[-1][2]

    def g(self, r: Tensor, y: Tensor) -> Tensor:
        """η √(2 |Δu|) σ."""
        std = self.eta * math.sqrt(2 * abs(self.stride)) * self._sigma(float(r))
        return y.new_full((), std).expand_as(y)

    def _sigma_at(self, r: float) -> float:
        log_noise = torch.tensor(self.start + self.stride * r, dtype=torch.float64)
        return float(self.problem.sde.sigma(self.problem.sde.t_from_log_snr(-2 * log_noise)))

    def _log_noise(self, r: Tensor) -> Tensor:
        return self.start + self.stride * r.double()


class _Increments:
    """A Brownian path for a solver that asks once for each of a run of intervals."""

    # More than any method needs.
    levy_area_approximation = "foster"

    def __init__(self, noise: StepNoise, shape: torch.Size):
        self.noise, self.shape = noise, shape

    def __call__(self, start: Tensor, end: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        """W(end) − W(start) (B, D), and its time integral U if asked.

        U = h W/2 + √(h³/12) z. The Lévy area A multiplies a commutator, 0 for noise independent of x.
        """
        h = end - start
        increment = h.sqrt() * self.noise()
        if return_U:
            return increment, 0.5 * h * increment + torch.sqrt(h**3 / 12) * self.noise()
        return (increment, torch.zeros_like(increment)) if return_A else increment


class _Paths:
    """Whole Brownian paths, over r as functions of r/N."""

    levy_area_approximation = "foster"

    def __init__(self, seeds: list[int], steps: int, x: Tensor, is_dyadic: bool):
        """One path for each seed and state of x (B, ...); if dyadic, what it is does not depend on what is asked."""
        self.steps, self.shape = steps, x.flatten(1).shape
        self._paths = [
            torchsde.BrownianInterval(
                t0=0.0,
                t1=1.0,
                size=(1, self.shape[1]),
                dtype=x.dtype,
                device=x.device,
                entropy=seed,
                tol=_RESOLUTION if is_dyadic else 0.0,
                halfway_tree=is_dyadic,
                levy_area_approximation="space-time",
            )
            for seed in seeds
        ]

    def __call__(self, start: Tensor, end: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        """As of ``_Increments``: over r, W is √N times that over r/N, and U is N √N times."""
        interval = float(start) / self.steps, float(end) / self.steps
        parts = [path(*interval, return_U=True) for path in self._paths]
        increment, integral = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        increment = math.sqrt(self.steps) * increment
        if return_U:
            return increment, self.steps * math.sqrt(self.steps) * integral
        return (increment, torch.zeros_like(increment)) if return_A else increment
