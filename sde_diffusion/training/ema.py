"""Averages of the weights along a run: several at once, and any other made of them when it is over.

    average ← β(t) average + (1 − β(t)) weights          after step t; after the first it is the weights
    exponential: β(t) = min(decay, (1 + t)/(10 + t))     with warm-up, so that the first weights are soon forgotten
    power:       β(t) = (1 − 1/t)^(γ + 1)                the weights of time τ in [0, t] count by the profile
                 p(τ) = (γ + 1) τ^γ / t^(γ + 1)          which grows with the run; its standard deviation is σ_rel t,
                 σ_rel = (γ + 1)^½ (γ + 2)⁻¹ (γ + 3)^−½

    post hoc: Σᵢ xᵢ averageᵢ over snapshots (γᵢ, tᵢ), whose profile Σᵢ xᵢ pᵢ is nearest to a wanted p in mean square:
        A x + λ 1 = b,  1ᵀ x = 1,   Aᵢⱼ = ⟨pᵢ, pⱼ⟩,  bᵢ = ⟨pᵢ, p⟩
        ⟨p_a, p_b⟩ = ∫ p_a p_b dτ = (γ_a + 1)(γ_b + 1)/(γ_a + γ_b + 1) · (t_a/t_b)^γ_b / t_b     for t_a <= t_b

Power-function averages, their widths and their combination: Karras et al. 2024 (arXiv:2312.02696, sections 3.1 and 3.2
and appendix C). Their system leaves Σ xᵢ free; here it is 1, so that a weight that never moved stays what it is however
few the snapshots are.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.model import DiffusionModel
from sde_diffusion.storage import CheckpointError, StoredTensors, fill, own
from sde_diffusion.training.checkpoint import load, save_model
from sde_diffusion.training.distributed import Ranks

# Of σ_rel. The widest weighs all steps alike, γ = 0; the narrowest is one step of a run of a million.
NARROWEST, WIDEST = 1e-6, 12**-0.5


def exponential_decay(decay: float, step: int) -> float:
    """β(step) of an exponential average with warm-up; ``decay`` is in [0, 1)."""
    return min(decay, (1 + step) / (10 + step)) if step > 1 else 0.0


def power_decay(gamma: float, step: int) -> float:
    """β(step) of a power-function average of exponent γ."""
    return (1 - 1 / step) ** (gamma + 1)


def power_exponent(sigma_rel: float) -> float:
    """γ of the power function of relative width σ_rel: the largest root of σ_rel² (γ + 2)² (γ + 3) = γ + 1.

    Raises:
        ValueError: for a width outside [1e-6, 12^−½].
    """
    if not NARROWEST <= sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel = {sigma_rel}: must be in [{NARROWEST}, {WIDEST}]")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Averages:
    """The averages of a model's weights that a run keeps, each a model of its own."""

    def __init__(
        self,
        model: DiffusionModel,
        decay: float,
        further_decays: Sequence[float] = (),
        widths: Sequence[float] = (),
        place: Callable[[DiffusionModel], object] = lambda copied: None,
    ):
        """Begin them all.

        Args:
            model: the model whose weights are averaged.
            decay: that of the main average.
            further_decays: those of exponential averages beside it.
            widths: σ_rel of power-function averages, of which snapshots are to be kept.
            place: what is done with each copy of the model before the next is made, such as sharding its weights.

        Raises:
            ValueError: for a width out of range.
        """
        self.widths = tuple(widths)
        self._decays: dict[str, Callable[[int], float]] = {"model": partial(exponential_decay, decay)}
        self._decays |= {f"model-{further}": partial(exponential_decay, further) for further in further_decays}
        self._decays |= {_power_name(width): partial(power_decay, power_exponent(width)) for width in widths}
        # By the name of the file that each is kept in.
        self.models: dict[str, DiffusionModel] = {}
        for name in self._decays:
            self.models[name] = copy.deepcopy(model).eval().requires_grad_(False)
            place(self.models[name])

    @torch.no_grad()
    def update(self, model: DiffusionModel, step: int) -> None:
        """Move every average towards the weights after ``step`` steps."""
        weights = [own(weight) for weight in model.parameters()]
        for name, decay in self._decays.items():
            average = [own(weight) for weight in self.models[name].parameters()]
            torch._foreach_lerp_(average, weights, 1 - decay(step))

    def save_snapshots(
        self,
        workdir: Path,
        step: int,
        config: Mapping[str, Any],
        whole: Callable[[DiffusionModel], DiffusionModel],
        ranks: Ranks,
    ) -> None:
        """Keep the power-function averages as they are after ``step`` steps, each file whole or not at all.

        Args:
            workdir: the directory of the run.
            step: of the averages.
            config: what the headers of the files say of them.
            whole: gathers a model of which each rank has a part.
            ranks: of which the first writes, and the others wait.

        Raises:
            CheckpointError: if they cannot be written, as on a full disk; the run's checkpoints stay.
        """
        folder = workdir / "averages"
        for width in self.widths:
            model = whole(self.models[_power_name(width)])

            path = folder / f"{step:08d}-{width}.safetensors"
            try:
                ranks.first(partial(folder.mkdir, exist_ok=True))
                ranks.first(partial(save_model, model, path, config))
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: a snapshot cannot be written: {error}; the checkpoints before it are whole"
                ) from error


class Profile(NamedTuple):
    """How the weights of a run count in a power-function average of relative width σ_rel after ``step`` steps."""

    sigma_rel: float
    step: int


def inner_products(rows: Iterable[Profile], columns: Iterable[Profile]) -> np.ndarray:
    """⟨p_a, p_b⟩ (N, M) of N profiles with M others, per step; errors as for ``power_exponent``."""
    gamma_a, t_a = np.array([(power_exponent(width), step) for width, step in rows]).T[:, :, None]
    gamma_b, t_b = np.array([(power_exponent(width), step) for width, step in columns]).T[:, None, :]
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    decline = (earlier / later) ** np.where(t_a > t_b, gamma_a, gamma_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * decline / later


def combination_weights(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The combination of kept profiles that is nearest to a wanted one; errors as for ``power_exponent``.

    Returns:
        Weights x (N,) that sum to 1, and the distance ‖Σᵢ xᵢ pᵢ − p‖/‖p‖ that remains, known to 1e-7 or so. No
        weight of the network differs from that of the wanted average by more than the distance times ‖p‖ times the
        root of the sum over all steps of its squared deviation from any constant.
    """
    # Steps are counted in those of the wanted profile, so that the products are of the size of the border of ones.
    products = wanted.step * inner_products(kept, kept)
    onto = wanted.step * inner_products(kept, [wanted])[:, 0]
    square = wanted.step * inner_products([wanted], [wanted])[0, 0]
    one = np.ones((len(kept), 1))
    system = np.block([[products, one], [one.T, np.zeros((1, 1))]])
    # Neighbouring snapshots are all but dependent where there are many: of all solutions the smallest, which hardly
    # amplifies the rounding of what it combines.
    x = np.linalg.lstsq(system, np.append(onto, 1.0), rcond=None)[0][:-1]
    return x, float(np.sqrt(max(0.0, x @ products @ x - 2 * x @ onto + square) / square))


def post_hoc_average(
    workdir: str | os.PathLike[str],
    sigma_rel: float,
    *,
    step: int | None = None,
    network: Callable[..., Tensor] | None = None,
    device: torch.device | str | None = None,
) -> DiffusionModel:
    """The model with the average of a width that was chosen after training, in evaluation mode.

    Args:
        workdir: directory of a run with ``ema.widths``, of which it has snapshots.
        sigma_rel: standard deviation of the average's profile, as a share of ``step``. Best between the run's widths.
        step: the step up to which weights are averaged, best one that has a snapshot; None is that of the last.
        network: the network to fill, for a run that was given one of the user's own.
        device: where to put it.

    Raises:
        ValueError: for a width out of range, or a step before the first or after the last snapshot.
        CheckpointError: if there is no snapshot, or one is damaged or of another network.
    """
    workdir = Path(workdir)
    kept = _snapshots(workdir)
    if not kept:
        raise CheckpointError(f"{workdir}: holds no snapshots of averages, which training keeps for ema.widths")
    first, last = (end(profile.step for profile in kept) for end in (min, max))
    step = last if step is None else step
    if not first <= step <= last:
        raise ValueError(f"step = {step}: must be in [{first}, {last}], between the first and the last snapshot")
    weights, _ = combination_weights(list(kept), Profile(sigma_rel, step))
    model = load(list(kept.values())[-1], network=network)
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in model.named_parameters()}
    for share, path in zip(weights, kept.values(), strict=True):
        fill(model, StoredTensors(path))
        for name, weight in model.named_parameters():
            total[name].add_(weight, alpha=float(share))
    for name, weight in model.named_parameters():
        weight.copy_(total[name])
    model.directory = workdir / "averages" / f"post-hoc-{step:08d}-{sigma_rel}"
    return model.to(device)


def drop_snapshots(workdir: Path, step: int) -> None:
    """Delete the snapshots of later steps: a run that is taken up at ``step`` takes those again."""
    for profile, path in _snapshots(workdir).items():
        if profile.step > step:
            path.unlink()


def _power_name(width: float) -> str:
    return f"power-{width}"


def _snapshots(workdir: Path) -> dict[Profile, Path]:
    """Every snapshot of a run, the last steps last."""
    kept = {}
    for path in (workdir / "averages").glob("[0-9]*-[0-9]*.safetensors"):
        step, _, width = path.stem.partition("-")
        kept[Profile(float(width), int(step))] = path
    return dict(sorted(kept.items(), key=lambda item: item[0].step))
