r"""A solver whose grid and coefficients were fitted to one model, and its file.

With n² = α² + σ², the angle θ = atan(σ/α) and y = x/n the probability-flow ODE is dy/dθ = v(y, θ), with the bounded

    v = cos θ ε̂ − sin θ x̂₀

N evaluations v_j = v(y_j, θ_j) and the start y_0 are all that a method can combine. Every explicit linear one, such as
DDIM, DEIS, DPM-Solver++ and UniPC, has therefore the form

    y_{i+1} = a_i y_i + Σ_{j≤i} w_ij v_j                 i = 0…N−1

which leaves free where the model is asked, (y_i, θ_i), and what is made of the answers. ``calibration.calibrate``
chooses all these numbers. They are good for one model, which is known by its answers at a few states.

Source: Shaul et al. 2024 (arXiv:2403.01329), for the form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sde_diffusion.model import Model, evaluating
from sde_diffusion.samplers.multistep import weighted_sum
from sde_diffusion.samplers.solver import Noise, Predict, StepSolver
from sde_diffusion.sde import SDE, expand_to

_HEADER = "sde_diffusion.calibrated"
_COND = "cond."
# Answers of the same network in another dtype or on another device differ by less, relative to their size.
_TOLERANCE = 0.02


class CalibratedError(ValueError):
    """A calibrated solver that is missing, damaged, or not for this model."""


@dataclass(frozen=True)
class Report:
    """How a calibrated solver was fitted.

    Errors are root mean square distances a dimension to the tight solution at t_end, of trajectories that only chose
    among the iterates.

    Attributes:
        error: over all held-out trajectories.
        median_error: the median of their own.
        fitted_error: over the trajectories of the fit.
        hand_made: name and grid of the best published method at as many evaluations.
        hand_made_error: its error, over the same.
        hand_made_median_error: its median.
        trajectories: number that the solver was fitted to.
        validation: number held out.
        seed: of their starts.
        evaluations: of the model on one state, all in all, the tight solution among them.
        gradients: vector-Jacobian products of the model on one state.
    """

    error: float
    median_error: float
    fitted_error: float
    hand_made: str
    hand_made_error: float
    hand_made_median_error: float
    trajectories: int
    validation: int
    seed: int
    evaluations: int
    gradients: int


@dataclass(frozen=True)
class Fingerprint:
    """What a model answers, by which it is known again.

    Attributes:
        y: (2, *data_shape), states over n.
        slopes: (3, 2, *data_shape), v there at the first, a middle and the last time of evaluation.
        cond: the conditioning of the two.
    """

    y: Tensor
    slopes: Tensor
    cond: dict[str, Any] = field(default_factory=dict)


class Calibrated(StepSolver):
    """The solver of its own grid for one model: y_{i+1} = a_i y_i + Σ_j w_ij v_j; made by ``calibrate``."""

    def __init__(
        self,
        times: list[float],
        scale: Tensor,
        weights: Tensor,
        *,
        sde: str,
        levels: Tensor,
        fingerprint: Fingerprint | None,
        report: Report,
        name: str = "this solver",
    ):
        """Set the numbers.

        Args:
            times: N + 1 decreasing numbers.
            scale: a, (N,).
            weights: w, lower triangular (N, N).
            sde: what the SDE is called.
            levels: its α and σ at ``times``, (2, N + 1).
            fingerprint: of the model, or None to take any.
            report: how it was fitted.
            name: what errors call it.
        """
        self.times: list[float] = times
        self.scale, self.weights, self.sde, self.levels = scale, weights, sde, levels
        self.fingerprint, self.report, self.name = fingerprint, report, name
        self.memory = len(scale)

    def prepare(self, sde: SDE, times: Tensor) -> dict[str, Tensor]:
        """Factors of x̂₀ and ε̂ in v, a, and w of the present evaluation and those before it, for x."""
        norm, angle = polar(sde, times)
        step, back = torch.meshgrid(torch.arange(self.memory), torch.arange(self.memory), indexing="ij")
        recent = torch.where(back <= step, self.weights.gather(1, (step - back).clamp(min=0)), 0.0)
        return {
            "t": times[:-1],
            "data": -torch.sin(angle[:-1]),
            "noise": torch.cos(angle[:-1]),
            "scale": self.scale * norm[1:] / norm[:-1],
            "weights": norm[1:, None] * recent,
        }

    def step(self, predict: Predict, x: Tensor, c: SimpleNamespace, noise: Noise) -> Tensor:
        """The weighted sum."""
        c.past.append(predict.combine(x, c.t, c.data, c.noise))
        return weighted_sum(c.scale, x, c.weights, c.past)

    def check_model(self, model: Model) -> None:
        """Raise a CalibratedError, which says how to override it, unless it is the model of the calibration."""
        times = torch.tensor(self.times, dtype=torch.float64)
        for t in (self.times[0], self.times[-1]):
            model.sde.check_time(f"a time of {self.name}", t)
        levels = torch.stack([model.sde.alpha(times), model.sde.sigma(times)])
        if not torch.allclose(levels, self.levels, rtol=1e-6, atol=1e-9):
            raise CalibratedError(f"{self.name} is for {self.sde}: the model has {model.sde}")
        if self.fingerprint is None:
            return
        shape = tuple(self.fingerprint.y.shape[1:])
        if shape != tuple(model.data_shape):
            raise CalibratedError(f"{self.name} is for data_shape = {shape}: the model has {tuple(model.data_shape)}")
        with torch.no_grad(), evaluating(model):
            slopes = responses(model, self.times, self.fingerprint.y, self.fingerprint.cond)
        known = self.fingerprint.slopes
        deviation = float((slopes - known).square().mean().sqrt() / known.square().mean().sqrt())
        if not deviation <= _TOLERANCE:
            raise CalibratedError(
                f"{self.name} is for another model: this one's answers differ by {deviation:.2g} of their size, where "
                f"{_TOLERANCE} is allowed; calibrate again or, if it is meant, load it with check=False"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one .safetensors, whole or not at all, and return its path."""
        path = Path(path)
        tensors = {
            "times": torch.tensor(self.times, dtype=torch.float64),
            "scale": self.scale,
            "weights": self.weights,
            "levels": self.levels,
        }
        cond = {} if self.fingerprint is None else self.fingerprint.cond
        if self.fingerprint is not None:
            tensors |= {"fingerprint.y": self.fingerprint.y, "fingerprint.slopes": self.fingerprint.slopes}
        tensors |= {_COND + key: value for key, value in cond.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in cond.items() if not isinstance(value, Tensor)}
        header = {"sde": self.sde, "report": asdict(self.report), "cond": others}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(path.name + ".partial")
        copies = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        save_file(copies, partial_path, metadata={_HEADER: json.dumps(header)})
        partial_path.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check: bool = True) -> Calibrated:
        """Read what ``save`` wrote.

        Args:
            path: the file.
            check: whether the solver refuses a model whose answers are not those of the calibration's.

        Raises:
            CalibratedError: if it is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
            description = json.loads(header[_HEADER])
            cond = {key.removeprefix(_COND): value for key, value in tensors.items() if key.startswith(_COND)}
            fingerprint = None
            if check and "fingerprint.y" in tensors:
                fingerprint = Fingerprint(
                    tensors["fingerprint.y"], tensors["fingerprint.slopes"], cond | description["cond"]
                )
            return cls(
                tensors["times"].tolist(),
                tensors["scale"],
                tensors["weights"],
                sde=description["sde"],
                levels=tensors["levels"],
                fingerprint=fingerprint,
                report=Report(**description["report"]),
                name=str(path),
            )
        except (OSError, SafetensorError) as error:
            raise CalibratedError(f"{path}: cannot be read: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CalibratedError(f"{path}: does not hold a calibrated solver: {error!r}") from error


def calibrated_path(directory: str | os.PathLike[str], nfe: int) -> Path:
    """Where the solver of ``nfe`` evaluations is kept beside a model."""
    return Path(directory) / f"calibrated_{nfe}.safetensors"


def find(model: Model, nfe: int | None, *, check: bool = True) -> Calibrated:
    """The solver of ``nfe`` evaluations that was saved beside the model, in its attribute ``directory``.

    Args:
        model: as ``load`` returns it.
        nfe: the number.
        check: as of ``Calibrated.load``.

    Raises:
        CalibratedError: if the model was not loaded from files, nfe is not given, or there is none; names those that
            there are.
    """
    directory = getattr(model, "directory", None)
    if directory is None:
        raise CalibratedError("solver = 'calibrated': this model was not loaded from a file; give the solver itself")
    there = sorted(int(path.stem.rpartition("_")[2]) for path in Path(directory).glob("calibrated_[0-9]*.safetensors"))
    if nfe not in there:
        have = ", ".join(map(str, there)) or "none"
        raise CalibratedError(
            f"solver = 'calibrated', nfe = {nfe}: beside the model in {directory} there are solvers for nfe = {have}; "
            f"calibrate(model, nfe).save(...) makes one"
        )
    return Calibrated.load(calibrated_path(directory, nfe), check=check)


def polar(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """n and θ at t, of its shape."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return torch.hypot(alpha, sigma), torch.atan2(sigma, alpha)


def slope_at(model: Model, y: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """v at y (B, ...) and t, () or (B,) in float64."""
    norm, angle = polar(model.sde, t)
    scale, cos, sin = (expand_to(value.to(y.dtype), y) for value in (norm, torch.cos(angle), torch.sin(angle)))
    x0, eps = model.predict(scale * y, t.to(y.dtype), **cond)
    return cos * eps - sin * x0


def responses(model: Model, times: list[float], y: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """v (3, B, ...) at y and the first, a middle and the last time of evaluation, in float32 on the host."""
    moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in cond.items()}
    y, asked = y.to(model.device), times[:-1]
    at = torch.tensor([asked[0], asked[len(asked) // 2], asked[-1]], dtype=torch.float64, device=model.device)
    return torch.stack([slope_at(model, y, t, moved) for t in at]).float().cpu()
