r"""Denoising score matching as one weighted regression, and how its times are drawn.

    x_t = α x₀ + σ ε            loss = E_t E_{x₀, ε}  w(t) ‖target − prediction‖²/D

| weighting  | target | w(t)                                         | source |
|------------|--------|----------------------------------------------|--------|
| simple     | ε      | 1                                            | Ho et al. 2020, eq. 14 |
| x0         | x₀     | 1                                            | Salimans & Ho 2022 |
| v          | v      | 1, on v = α ε − σ x₀                         | Salimans & Ho 2022 |
| mean       | x₀     | a²: 1 on the mean of the previous state      | Nakkiran et al. 2024 |
| vlb        | x₀     | N a²/2σ̃²; ½ N (SNR(s) − SNR(t)) for σ̃² = v   | Kingma et al. 2021, eq. 14 |
| likelihood | ε      | ½ (t_max − t_min) g²/σ², vlb's as N → ∞      | Song et al. 2021b |
| min_snr    | x₀     | min(SNR, γ)                                  | Hang et al. 2023 |
| edm        | x₀     | (σ² + α² σ_d²)/(σ σ_d)² = 1/c_out²           | Karras et al. 2022, table 1 |
| a function | ε      | the user's w(log-SNR)                        | |
| hybrid     |        | simple + 0.001 vlb, which learns σ̃² alone    | Nichol & Dhariwal 2021, eq. 16 |

An error on ε is α/σ times that on x₀, and one on v is (α² + σ²)/σ times it; SNR = α²/σ². From the state at t to that
at s = t − Δ, Δ = t_max/N, there is q(x_s | x_t, x₀) = N(a x₀ + b x_t, v I), and with the share r = 1 − SNR(t)/SNR(s)

    a = α_s r        v = σ_s² r        noising variance  σ²_{t|s} = σ_t² r

Times t are drawn from uniform numbers u. They come with weights that make the mean that of uniform t:

| time               | density on [t_min, t_max]                            | source |
|--------------------|------------------------------------------------------|--------|
| uniform            | constant                                             | |
| log_normal         | log(σ/α) ~ N(mean, std²), part of the objective: no weight | Karras et al. 2022, table 1 |
| importance         | ∝ g²/σ² = −d log-SNR/dt: uniform in log-SNR          | Song et al. 2021b |
| loss_second_moment | ∝ √E[loss²], from the losses of earlier steps        | Nichol & Dhariwal 2021, eq. 18 |

The u of a batch are independent, or spread so that they cover [0, 1) more evenly: stratified (Kingma et al. 2021) or in
antithetic pairs. On arXiv: Ho 2006.11239, Song b 2101.09258, Nichol 2102.09672, Kingma 2107.00630, Salimans 2202.00512,
Karras 2206.00364, Hang 2303.09556, Nakkiran 2406.08929.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.chain import interpolate_variance
from sde_diffusion.model import DiffusionModel, Prediction
from sde_diffusion.sde import SDE, expand_to


def step_kl(x0_error: Tensor, a: Tensor, v: Tensor, reverse_variance: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x₀) ‖ p(x_s | x_t)) of one reverse step, elementwise in nats; Ho et al. 2020, eq. 7 and 8.

        ½ (v/σ̃² − 1 − log(v/σ̃²)) + a² (x₀ − x̂₀)²/(2σ̃²)

    Args:
        x0_error: x₀ − x̂₀.
        a: what multiplies x₀ in the posterior's mean.
        v: the posterior's variance, positive.
        reverse_variance: σ̃², the variance of p.

    Returns:
        A tensor of the arguments' common shape; exactly a²(x₀ − x̂₀)²/(2v) for σ̃² = v.
    """
    ratio = v / reverse_variance
    return 0.5 * (ratio - 1 - torch.log(ratio)) + 0.5 * (a * x0_error).square() / reverse_variance


def denoising_loss(
    model: DiffusionModel,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    weighting: str | Weighting | Callable[[Tensor], Tensor] = "simple",
    **cond: Any,
) -> Tensor:
    """Weighted squared error per example, averaged over the dimensions.

    Args:
        model: the model to train.
        x0: data (B, *data_shape).
        t: times (B,).
        noise: ε, of x₀'s shape.
        weighting: a key of ``WEIGHTINGS`` for its defaults, one of their instances, or a function that maps log-SNR
            (B,) to a weight (B,), at least 0, on the squared error of ε.
        **cond: passed to the network.

    Returns:
        (B,) losses.

    Raises:
        ValueError: for an unknown weighting, data that the model does not take, or "hybrid" with a model that does
            not learn its variance.
    """
    if isinstance(weighting, str):
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting = {weighting!r}: must be one of {', '.join(WEIGHTINGS)}, or a function")
        weighting = WEIGHTINGS[weighting]()
    elif not isinstance(weighting, Weighting):
        weighting = LogSNRWeighting(weighting)
    prediction = model.predict(model.sde.perturb(x0, t, noise), t, **cond)
    return weighting.loss(model, prediction, x0, noise, t)


class Weighting(ABC):
    """How the errors of a prediction make a loss."""

    @abstractmethod
    def loss(self, model: DiffusionModel, prediction: Prediction, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(B,) losses, of a prediction from α x₀ + σ ε at t (B,); x₀ and ε are (B, *data_shape)."""


class Regression(Weighting):
    """w(t) ‖target − prediction‖²/D, with target "eps", "x0" or "v"."""

    target: ClassVar[str]

    def unit(self, model: DiffusionModel, t: Tensor) -> Tensor:
        """1/√w(t), (B,): the error that costs one; 1 unless a subclass weighs times."""
        return torch.ones_like(t)

    def loss(self, model: DiffusionModel, prediction: Prediction, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(B,) losses."""
        if self.target == "eps":
            error = noise - prediction.eps
        elif self.target == "x0":
            error = x0 - prediction.x0
        else:
            alpha, sigma = expand_to(model.sde.alpha(t), x0), expand_to(model.sde.sigma(t), x0)
            error = alpha * (noise - prediction.eps) - sigma * (x0 - prediction.x0)
        # Divided before it is squared: at small σ the plain square would lose digits.
        return (error / expand_to(self.unit(model, t), x0)).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Simple(Regression):
    """1 on ε: every time counts alike to the network that predicts noise."""

    target = "eps"


@dataclass(frozen=True)
class PlainX0(Regression):
    """1 on x₀."""

    target = "x0"


@dataclass(frozen=True)
class PlainV(Regression):
    """1 on v = α ε − σ x₀; under VP it is 1 + SNR on x₀."""

    target = "v"


@dataclass(frozen=True)
class EDM(Regression):
    """1/c_out² on x₀: plain squared error of the network of the prediction "edm"."""

    target = "x0"

    def unit(self, model: DiffusionModel, t: Tensor) -> Tensor:
        """c_out = σ σ_d/√(σ² + α² σ_d²)."""
        alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
        return sigma * model.sigma_data / torch.sqrt(sigma.square() + (alpha * model.sigma_data).square())


@dataclass(frozen=True)
class MinSNR(Regression):
    """min(SNR, γ) on x₀, which is min(SNR, γ)/SNR on ε: less weight where there is little noise.

    Attributes:
        gamma: γ, positive; ∞ gives ``Simple``.
    """

    gamma: float = 5.0
    target = "x0"

    def __post_init__(self) -> None:
        """Check γ."""
        _check_positive("gamma", self.gamma)

    def unit(self, model: DiffusionModel, t: Tensor) -> Tensor:
        """1/√min(SNR, γ)."""
        return torch.exp(-0.5 * model.sde.log_snr(t).clamp(max=math.log(self.gamma)))


@dataclass(frozen=True)
class Mean(Regression):
    """a² on x₀: plain squared error on E[x_{t−Δ} | x_t], what the network of the prediction "mean" puts out.

    Attributes:
        step: Δ, positive; None for the model's ``mean_step``. Times before 0 count as 0.
    """

    step: float | None = None
    target = "x0"

    def __post_init__(self) -> None:
        """Check Δ."""
        if self.step is not None:
            _check_positive("step", self.step)

    def unit(self, model: DiffusionModel, t: Tensor) -> Tensor:
        """1/a."""
        # In float64: the state before is close, and a small.
        t_exact = t.double()
        s = (t_exact - (self.step or model.mean_step)).clamp(min=0)
        return (1 / model.sde.posterior_mean(s, t_exact)[0]).to(t.dtype)


@dataclass(frozen=True)
class VLB(Regression):
    """N a²/2σ̃² on x₀: over uniform t its mean is the sum of the bound's N steps of Δ = t_max/N, in nats a dimension.

    A time has the weight of the step in whose cell it is, ((i − 1)Δ, iΔ]. That of the first is the decoder's, 1/2σ_1².
    What no network changes is left out.

    Attributes:
        steps: N of [0, t_max], at least 2.
        variance: σ̃² of the other steps, "posterior" or "noising".
    """

    steps: int = 1000
    variance: str = "posterior"
    target = "x0"

    def __post_init__(self) -> None:
        """Check both."""
        _check_steps(self.steps)
        if self.variance not in ("posterior", "noising"):
            raise ValueError(f"variance = {self.variance!r}: must be one of posterior, noising")

    def unit(self, model: DiffusionModel, t: Tensor) -> Tensor:
        """√(2σ̃²/N)/a."""
        step = _step_of(model.sde, t, self.steps)
        variance = torch.where(step.is_first, step.noising, step.v) if self.variance == "posterior" else step.noising
        return (torch.sqrt(2 * variance / _count_steps(model.sde, self.steps)) / step.a).to(t.dtype)


@dataclass(frozen=True)
class Likelihood(Regression):
    """½ (t_max − t_min) g²/σ² on ε, which is g² on the score: ``VLB`` as its steps become many.

    Over uniform t its mean is ½ ∫ g² ‖s_θ − ∇ log p(x_t | x₀)‖² dt/D from t_min to t_max, in nats a dimension. The
    integral diverges at 0, where there is no noise: the cut-off t_min is part of the objective.
    """

    target = "eps"

    def unit(self, model: DiffusionModel, t: Tensor) -> Tensor:
        """√(2/(t_max − t_min)) σ/g."""
        sde = model.sde
        return math.sqrt(2 / (sde.t_max - sde.t_min)) * sde.sigma(t) / sde.diffusion(t)


@dataclass(frozen=True)
class LogSNRWeighting(Regression):
    """A user's w(log-SNR) on ε.

    Attributes:
        function: maps log-SNR (B,) to a weight (B,), at least 0.
    """

    function: Callable[[Tensor], Tensor]
    target = "eps"

    def unit(self, model: DiffusionModel, t: Tensor) -> Tensor:
        """1/√w."""
        return self.function(model.sde.log_snr(t)).rsqrt()


@dataclass(frozen=True)
class Hybrid(Weighting):
    """Simple loss plus a little of the bound, for a model with ``learned_variance``.

    The bound's error of the mean is detached: the first term trains x̂₀ and the second the variance alone, through
    the fraction that the model predicts.

    Attributes:
        steps: N of the bound, as in ``VLB``.
        vlb_weight: what multiplies the bound, the sum of N steps in nats a dimension.
    """

    steps: int = 1000
    vlb_weight: float = 1e-3

    def __post_init__(self) -> None:
        """Check both."""
        _check_steps(self.steps)
        _check_positive("vlb_weight", self.vlb_weight)

    def loss(self, model: DiffusionModel, prediction: Prediction, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(B,) losses."""
        fraction = getattr(prediction, "fraction", None)
        if fraction is None:
            raise ValueError("weighting 'hybrid' needs a model with learned_variance=True")
        step = _step_of(model.sde, t, self.steps)
        # In units of √v: powers of the variances themselves could underflow.
        coefficients = step.a / step.v.sqrt(), step.noising / step.v
        a, noising = (expand_to(coefficient.to(x0.dtype), x0) for coefficient in coefficients)
        posterior = torch.ones_like(noising)
        reverse_variance = interpolate_variance(posterior, noising, fraction)
        kl = step_kl((x0 - prediction.x0).detach(), a, posterior, reverse_variance)
        bound = _count_steps(model.sde, self.steps) * kl.flatten(1).mean(1)
        return Simple().loss(model, prediction, x0, noise, t) + self.vlb_weight * bound


WEIGHTINGS: dict[str, type[Weighting]] = {
    "simple": Simple,
    "x0": PlainX0,
    "v": PlainV,
    "mean": Mean,
    "vlb": VLB,
    "likelihood": Likelihood,
    "min_snr": MinSNR,
    "edm": EDM,
    "hybrid": Hybrid,
}


class _Step(NamedTuple):
    """A step of the chain of N equal steps for each time, in float64: whether it is the first, a, v and σ²_{t|s}."""

    is_first: Tensor
    a: Tensor
    v: Tensor
    noising: Tensor


def _step_of(sde: SDE, t: Tensor, steps: int) -> _Step:
    """The steps in whose cells ((i − 1)Δ, iΔ] the times t are, Δ = t_max/N.

    The first has a = 1 and the whole variance σ²(Δ); its v, 0 in the chain, is the second's, as a decoder's variance
    lies between these two.
    """
    width = sde.t_max / steps
    # A time that is the end of a cell but for its rounding in float32 is in that cell.
    end = width * torch.ceil(t.double() / width - 1e-4).clamp(1, steps)
    start = end - width
    is_first = end < 1.5 * width
    share, second = sde.added_share(start, end), sde.added_share(end, end + width)
    added, remaining = sde.sigma(end).square(), sde.sigma(start).square()
    return _Step(
        is_first,
        torch.where(is_first, 1.0, sde.alpha(start) * share),
        torch.where(is_first, added * second, remaining * share),
        torch.where(is_first, added, added * share),
    )


def _count_steps(sde: SDE, steps: int) -> float:
    """How many of ``steps`` equal steps of [0, t_max] fill [t_min, t_max]."""
    return steps * (1 - sde.t_min / sde.t_max)


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise ValueError(f"steps = {steps}: must be at least 2")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} = {value}: must be positive")


class TimeSampler:
    """A distribution of training times on [t_min, t_max] of an SDE."""

    def __init__(self, sde: SDE):
        """Draw times of ``sde``."""
        self.sde = sde

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times and their weights, (B,) each, from u (B,) uniform on [0, 1]; t rises with u.

        The mean of weight · loss(t) is that of loss(t) over uniform t, but where the weight is 1 because the
        distribution is part of the objective.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draw(u)")

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Learn from the losses (B,) of the times (B,) of a step, before they are weighted by ``draw``."""

    def state_dict(self) -> dict[str, Tensor]:
        """What has been learnt, to be stored with a checkpoint; empty if nothing can be."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what ``state_dict`` gave.

        Raises:
            ValueError: naming what is missing, not its own or of another shape.
        """
        if state:
            raise ValueError(f"{', '.join(state)}: {type(self).__name__} has no state")


class Uniform(TimeSampler):
    """Uniform on [t_min, t_max]."""

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times and ones."""
        t_min, t_max = self.sde.t_min, self.sde.t_max
        # The sum can be rounded to beyond t_max.
        return (t_min + (t_max - t_min) * u).clamp(t_min, t_max), torch.ones_like(u)


class LogNormal(TimeSampler):
    """log(σ/α) ~ N(mean, std²), kept inside [t_min, t_max]; Karras et al. 2022, table 1."""

    def __init__(self, sde: SDE, mean: float = -1.2, std: float = 1.2):
        """Set mean and standard deviation of log(σ/α).

        Raises:
            ValueError: unless std is positive.
        """
        super().__init__(sde)
        _check_positive("std", std)
        self.mean, self.std = mean, std

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times and ones."""
        log_noise = self.mean + self.std * torch.special.ndtri(u.double())
        t = self.sde.t_from_log_snr(-2 * log_noise).clamp(self.sde.t_min, self.sde.t_max)
        return t.to(u.dtype), torch.ones_like(u)


class Importance(TimeSampler):
    """p(t) ∝ g²/σ², which evens out the likelihood weighting: it leaves a constant weight on ‖ε − ε̂‖².

    As d log-SNR/dt = −g²/σ², it is the uniform distribution of log-SNR. Song et al. 2021b.
    """

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times, and uniform density over p."""
        sde = self.sde
        first, last = (-2 * sde.log_noise(t) for t in (sde.t_min, sde.t_max))
        t = sde.t_from_log_snr(first + (last - first) * u.double()).clamp(sde.t_min, sde.t_max)
        weight = (first - last) / (sde.t_max - sde.t_min) * (sde.sigma(t) / sde.diffusion(t)).square()
        return t.to(u.dtype), weight.to(u.dtype)


class LossSecondMoment(TimeSampler):
    """p ∝ √E[loss²] in each of many equal bins of time, from the last losses seen there; uniform until all are full.

    That p makes the weighted loss vary least, if losses within a bin are alike. Nichol & Dhariwal 2021, section 3.3.
    """

    def __init__(self, sde: SDE, bins: int = 100, history: int = 10, floor: float = 1e-3):
        """Begin with empty bins.

        Args:
            sde: whose [t_min, t_max] is divided.
            bins: number of bins.
            history: losses kept in a bin.
            floor: share of the times drawn uniformly all the same.

        Raises:
            ValueError: unless bins and history are positive and 0 < floor <= 1.
        """
        super().__init__(sde)
        _check_positive("bins", bins)
        _check_positive("history", history)
        if not 0 < floor <= 1:
            raise ValueError(f"floor = {floor}: must be above 0 and at most 1")
        self.floor = floor
        self.losses = torch.zeros(bins, history, dtype=torch.float64)
        self.counts = torch.zeros(bins, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """Those of the bins, (bins,), float64."""
        bins, history = self.losses.shape
        moments = self.losses.square().mean(1).sqrt()
        total = moments.sum()
        learnt = (1 - self.floor) * moments / total + self.floor / bins
        is_known = (self.counts.min() >= history) & (total > 0)
        return torch.where(is_known, learnt, torch.full_like(learnt, 1 / bins))

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times, and uniform density over p; the inverse of the piecewise linear distribution function."""
        self.losses, self.counts = self.losses.to(u.device), self.counts.to(u.device)
        p = self.probabilities()
        end, place = p.cumsum(0), u.double()
        bin_ = torch.searchsorted(end, place, right=True).clamp(max=len(p) - 1)
        inside = ((place - (end - p)[bin_]) / p[bin_]).clamp(0, 1)
        t_min, t_max = self.sde.t_min, self.sde.t_max
        t = (t_min + (t_max - t_min) * (bin_ + inside) / len(p)).clamp(t_min, t_max)
        return t.to(u.dtype), (1 / (len(p) * p[bin_])).to(u.dtype)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Put each loss in the place of the oldest of its bin."""
        bins, history = self.losses.shape
        share = (t.double() - self.sde.t_min) / (self.sde.t_max - self.sde.t_min)
        bin_ = (bins * share).long().clamp(0, bins - 1)
        member = torch.nn.functional.one_hot(bin_, bins)
        rank, total = (member.cumsum(0) * member).sum(1) - 1, member.sum(0)
        place = bin_ * history + (self.counts[bin_] + rank) % history
        # A loss that a later one of this batch would overwrite goes to a place past the end: no place is written twice.
        place = torch.where(rank + history >= total[bin_], place, bins * history)
        flat = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        self.losses = flat.scatter(0, place, loss.detach().double())[:-1].reshape(bins, history)
        self.counts = self.counts + total

    def state_dict(self) -> dict[str, Tensor]:
        """The losses (bins, history) and how many each bin has seen (bins,)."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what ``state_dict`` gave; errors as in the base class."""
        for name, own in self.state_dict().items():
            found = tuple(state[name].shape) if name in state else "nothing"
            if found != tuple(own.shape):
                raise ValueError(f"tensor {name}: the state has {found}, the sampler {tuple(own.shape)}")
        self.losses, self.counts = state["losses"], state["counts"]


TIMES: dict[str, Callable[..., TimeSampler]] = {
    "uniform": Uniform,
    "log_normal": LogNormal,
    "importance": Importance,
    "loss_second_moment": LossSecondMoment,
}


def independent(u: Tensor) -> Tensor:
    """Leave u (B,) as it is."""
    return u


def stratified(u: Tensor) -> Tensor:
    """(u₀ + i/B) mod 1: one in each B-th of the circle, all moved by the first number."""
    return torch.remainder(u[0] + torch.arange(len(u), device=u.device, dtype=u.dtype) / len(u), 1.0)


def antithetic(u: Tensor) -> Tensor:
    """Pairs u, 1 − u; the last of an odd number stays alone."""
    return torch.stack([u[0::2], 1 - u[0::2]], 1).flatten()[: len(u)]


SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "independent": independent,
    "stratified": stratified,
    "antithetic": antithetic,
}
