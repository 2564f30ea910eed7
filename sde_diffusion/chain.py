r"""The discrete chain x_t = λ_t x_{t−1} + σ_t ε, t = 1…T, of DDPM, its exact posteriors and its continuous limit.

    λ_{t|0} = λ_t λ_{t−1|0}      σ²_{t|0} = λ_t² σ²_{t−1|0} + σ_t²        (λ_{0|0} = 1, σ_{0|0} = 0)
    q(x_t | x_{t+1}, x₀) = N(a_t x₀ + b_t x_{t+1}, v_t I)
    a_t = λ_{t|0} σ²_{t+1}/σ²_{t+1|0}    b_t = λ_{t+1} σ²_{t|0}/σ²_{t+1|0}    v_t = σ²_{t|0} σ²_{t+1}/σ²_{t+1|0}

The exact mean of a reverse step (Tweedie), s the score of q_{t+1}, and the variance that is best on average:

    E[x_t | x_{t+1}] = (x_{t+1} + σ²_{t+1} s)/λ_{t+1}        (σ²_{t+1}/λ²_{t+1}) (1 − σ²_{t+1} E‖s‖²/D)

λ_t and σ_t belong to one step of the chain; α and σ of an SDE to a time.

Sources: Ho et al. 2020 (arXiv:2006.11239), section 2, for any λ_t and σ_t; Nichol & Dhariwal 2021 (arXiv:2102.09672);
Song et al. 2021 (arXiv:2010.02502), section 4; Bao et al. 2022 (arXiv:2201.06503), theorem 1; Lin et al. 2024
(arXiv:2305.08891), algorithm 1; Nakkiran et al. 2024 (arXiv:2406.08929).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.model import Model, evaluating
from sde_diffusion.sde import SDE


def linear_betas(steps: int, beta_min: float = 1e-4, beta_max: float = 0.02) -> Tensor:
    """β_t (steps,) in equal steps from beta_min to beta_max. Ho et al. 2020, section 4."""
    return torch.linspace(beta_min, beta_max, _positive("steps", steps), dtype=torch.float64)


def scaled_linear_betas(steps: int, beta_min: float = 0.00085, beta_max: float = 0.012) -> Tensor:
    """β_t (steps,) whose square roots are equally spaced. Rombach et al. 2022 (arXiv:2112.10752), as released."""
    return linear_betas(steps, math.sqrt(beta_min), math.sqrt(beta_max)).square()


def cosine_betas(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """β_t (steps,) for ᾱ_t ∝ cos²(½π (t/T + offset)/(1 + offset)). Nichol & Dhariwal 2021, eq. 17."""
    time = torch.arange(_positive("steps", steps) + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos(0.5 * math.pi * (time + offset) / (1 + offset)).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


BETAS: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
}


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (T,) with √ᾱ_t shifted and scaled so that it is as before at t = 1 and 0 at t = T, where β is then 1.

    Raises:
        ValueError: for fewer than two betas, or betas that ``GaussianChain.ddpm`` refuses.
    """
    if len(betas) < 2:
        raise ValueError(f"betas holds {len(betas)}: need at least 2, as the first stays and the last becomes 1")
    scale = GaussianChain.ddpm(betas).marginal_scales[1:]
    scale = (scale - scale[-1]) * (scale[0] / (scale[0] - scale[-1]))
    previous = torch.cat([scale.new_ones(1), scale[:-1]])
    return 1 - (scale / previous).square()


def interpolate_variance(posterior: Tensor | float, noising: Tensor | float, fraction: Tensor | float) -> Tensor:
    """noising^fraction · posterior^{1 − fraction}: linear in the logarithm. Nichol & Dhariwal 2021, eq. 15."""
    return noising**fraction * posterior ** (1 - fraction)


class GaussianChain:
    """A chain of T steps, its marginals and posteriors, all in float64.

    Attributes:
        scales, stds: λ_t and σ_t, t = 1…T, (T,) each.
        marginal_scales, marginal_stds: λ_{t|0} and σ_{t|0}, t = 0…T, (T + 1,) each.
        times: when the states t = 0…T are, (T + 1,), from 0.
    """

    def __init__(self, scales: Tensor, stds: Tensor, times: Tensor | None = None):
        """Compute the marginals; the times are t/T by default.

        Raises:
            ValueError: unless scales and stds are (T,) with T >= 1, 0 <= λ_t <= 1 and 0 < σ_t < ∞, and times are
                (T + 1,), from 0 and never decreasing.
        """
        if scales.ndim != 1 or scales.shape != stds.shape or len(scales) == 0:
            raise ValueError(f"scales and stds have shapes {tuple(scales.shape)}, {tuple(stds.shape)}: need (T,) twice")
        if not bool(((scales >= 0) & (scales <= 1)).all()):
            raise ValueError(f"scales are in [{scales.min()}, {scales.max()}]: must be in [0, 1]")
        if not bool((stds > 0).all()):
            raise ValueError(f"stds has smallest entry {stds.min()}: must be positive")
        if not bool(stds.isfinite().all()):
            raise ValueError(f"stds has largest entry {stds.max()}: must be finite")
        self.scales, self.stds = scales.double(), stds.double()
        steps = len(scales)
        equal = torch.arange(steps + 1, dtype=torch.float64, device=scales.device) / steps
        self.times = equal if times is None else times.to(equal)
        if self.times.shape != (steps + 1,) or float(self.times[0]) != 0 or not bool((self.times.diff() >= 0).all()):
            raise ValueError(f"times = {times}: need ({steps + 1},) that start at 0 and never decrease")
        self.marginal_scales, variances = _compose(self.scales, self.stds)
        self.marginal_stds = variances.sqrt()

    @classmethod
    def from_sde(cls, sde: SDE, steps: int | Sequence[float]) -> GaussianChain:
        """The chain with the SDE's marginals at given increasing times, or at ``steps`` equal steps up to t_max.

        Raises:
            ValueError: for steps below 1, or times that do not increase, are outside [0, T] or start where the SDE
                has no noise, which is the chain's own x₀.
        """
        if isinstance(steps, int | np.integer):
            steps = _equal_times(sde.t_max, int(steps))
        times = torch.tensor([sde.check_time("steps", t) for t in steps], dtype=torch.float64)
        if len(times) == 0 or not bool((times[1:] > times[:-1]).all()):
            raise ValueError(f"steps = {list(steps)}: must be at least one time, in increasing order")
        alpha, variance = sde.alpha(times), sde.sigma(times).square()
        if not float(variance[0]) > 0:
            raise ValueError(
                f"steps[0] = {float(times[0])}: {sde} has no noise there, and the chain starts from x₀ without being "
                f"told; give the times after it"
            )
        alpha, variance = torch.cat([times.new_ones(1), alpha]), torch.cat([times.new_zeros(1), variance])
        scales = alpha[1:] / alpha[:-1]
        stds = torch.sqrt(variance[1:] - scales.square() * variance[:-1])
        return cls(scales, stds, torch.cat([times.new_zeros(1), times]))

    @classmethod
    def variance_preserving(cls, scales: Tensor) -> GaussianChain:
        """The chain with σ_t² = 1 − λ_t², which keeps data of unit variance so; λ_t (T,) in [0, 1)."""
        scales = scales.double()
        return cls(scales, torch.sqrt((1 - scales) * (1 + scales)))

    @classmethod
    def ddpm(cls, betas: Tensor) -> GaussianChain:
        """The chain with λ_t² = 1 − β_t and σ_t² = β_t.

        Args:
            betas: (T,) in (0, 1), such as those of ``BETAS``; the last may be 1, as ``zero_terminal_snr`` makes it.

        Raises:
            ValueError: for any other betas.
        """
        betas = betas.double()
        if not bool(((betas > 0) & (betas <= 1)).all() & (betas[:-1] < 1).all()):
            raise ValueError(
                f"betas are in [{betas.min()}, {betas.max()}]: must be in (0, 1), of which only the last may be 1"
            )
        return cls(torch.sqrt(1 - betas), torch.sqrt(betas))

    @classmethod
    def constant_rate(cls, steps: int, sigma_q: float = 1.0) -> GaussianChain:
        """The chain with λ_t = 1 and σ_t² = σ_q²/T, whose last state has variance σ_q². Nakkiran et al. 2024.

        Raises:
            ValueError: for steps below 1 or a sigma_q that is not positive.
        """
        if not 0 < sigma_q < math.inf:
            raise ValueError(f"sigma_q = {sigma_q}: must be positive and finite")
        ones = torch.ones(_positive("steps", steps), dtype=torch.float64)
        return cls(ones, sigma_q / math.sqrt(steps) * ones)

    def subsequence(self, indices: Sequence[int] | Tensor) -> GaussianChain:
        """The chain of the states τ_1 < … < τ_S of 1…T, with this one's marginals and times.

        Raises:
            ValueError: unless the indices increase within 1…T.
        """
        states = [0, *(int(i) for i in indices)]
        if len(states) < 2 or states[-1] > len(self) or any(end <= start for start, end in pairwise(states)):
            raise ValueError(f"indices = {states[1:]}: must be at least one, and increase within 1…{len(self)}")
        steps = [_compose(self.scales[start:end], self.stds[start:end]) for start, end in pairwise(states)]
        scales, variances = (torch.stack([values[-1] for values in column]) for column in zip(*steps, strict=True))
        return GaussianChain(scales, variances.sqrt(), self.times[states])

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.scales)

    def __repr__(self) -> str:
        """Its length and when it ends."""
        return f"GaussianChain of {len(self)} steps to time {float(self.times[-1])}"

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior that stands for p_T: 1 where variance is preserved, otherwise σ_{T|0}."""
        total = self.marginal_scales.square() + self.marginal_stds.square()
        return (
            1.0 if torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-9) else float(self.marginal_stds[-1])
        )

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """a_t, b_t and v_t for t = 0…T−1, (T,) each; (1, 0, 0) at t = 0."""
        variance = self.marginal_stds.square()
        share = self.stds.square() / variance[1:]
        return (
            self.marginal_scales[:-1] * share,
            self.scales * variance[:-1] / variance[1:],
            variance[:-1] * share,
        )

    def ddim(self, eta: float) -> tuple[Tensor, Tensor]:
        """√(σ²_{t|0} − ς_t²) and ς_t = η √v_t for t = 0…T−1, (T,) each.

        DDIM's step is x_t = λ_{t|0} x̂₀ + √(σ²_{t|0} − ς_t²) ε̂ + ς_t z. Song et al. 2021, eq. 12 and 16.

        Raises:
            ValueError: unless 0 <= eta <= 1.
        """
        eta = unit_interval("eta", eta)
        _, b, v = self.posterior()
        # σ²_{t|0} = v + b² σ²_{t+1|0}: at η = 1 the difference would cancel.
        return torch.sqrt((1 - eta**2) * v + (b * self.marginal_stds[1:]).square()), eta * v.sqrt()

    def reverse_mean(self, x: Tensor, score: Tensor, t: int) -> Tensor:
        """E[x_t | x_{t+1} = x], of x's shape, from the score of q_{t+1} at x.

        Raises:
            ValueError: for t outside 0…T−1, or a λ_{t+1} of 0, which leaves nothing of x_t in x.
        """
        if not 0 <= t < len(self):
            raise ValueError(f"t = {t}: must be in 0…{len(self) - 1}")
        scale, std = float(self.scales[t]), float(self.stds[t])
        if scale == 0:
            raise ValueError(f"t = {t}: the step from it has scale 0, and its reverse does not follow from the score")
        return (x + std**2 * score) / scale

    def reverse_variance(self, variance: str | float | Tensor, *, decoder: bool = False) -> Tensor:
        """Variance (T,) of a reverse step to t = 0…T−1.

        Args:
            variance: "posterior" (v_t, exact for one data point, and 0 at t = 0), "noising" (σ²_{t+1}, exact for
                N(0, I) data), a number in [0, 1] that interpolates from the first (0) to the second (1) in the
                logarithm, or the variances (T,) themselves.
            decoder: whether the step to t = 0 is a density, which cannot have variance 0: there v_1 then stands for v_0
                (σ_1² in a chain of one step), and for a 0 in variances that are given.

        Raises:
            ValueError: for any other variance.
        """
        posterior, noising = self.posterior()[2], self.stds.square()
        if decoder:
            posterior[0] = posterior[1] if len(self) > 1 else noising[0]
        if isinstance(variance, Tensor):
            if variance.shape != (len(self),) or not bool(((variance >= 0) & variance.isfinite()).all()):
                raise ValueError(f"variance = {variance}: must be ({len(self)},), finite and not negative")
            given = variance.to(posterior)
            return torch.cat([posterior[:1], given[1:]]) if decoder and float(given[0]) == 0 else given
        return interpolate_variance(posterior, noising, check_variance(variance))

    def optimal_variance(self, mean_square_score: Tensor) -> Tensor:
        """The variances (T,) of reverse steps of exact mean that are best on average, and never below v_t.

        With data of covariance C the step's covariance is on average that of x_t given x_{t+1}, and this its mean over
        dimensions. Bao et al. 2022, theorem 1.

        Args:
            mean_square_score: E‖s_t‖²/D for t = 1…T, (T,).

        Raises:
            ValueError: for another shape, negative or infinite values, or a λ_t of 0, after which the score says
                nothing of the state before.
        """
        if mean_square_score.shape != (len(self),) or not bool(
            ((mean_square_score >= 0) & mean_square_score.isfinite()).all()
        ):
            raise ValueError(f"mean_square_score = {mean_square_score}: must be ({len(self)},), finite, not negative")
        if not bool((self.scales > 0).all()):
            raise ValueError("scales: one is 0, and the best variance does not follow from the score after it")
        noising = self.stds.square()
        best = noising / self.scales.square() * (1 - noising * mean_square_score.to(noising))
        # An estimate of the score's square may be too large.
        return torch.maximum(best, self.posterior()[2])

    @torch.no_grad()
    def mean_square_score(self, model: Model, x0: Tensor, seed: int = 0) -> Tensor:
        """Estimate E‖s_t‖²/D for t = 1…T, (T,), with one evaluation of the model for all of x0 at each t.

        Args:
            model: its SDE must have this chain's marginals at ``times``, as that of ``to_sde`` does.
            x0: data (B, *data_shape).
            seed: of the noise.
        """
        generator = torch.Generator(x0.device).manual_seed(seed)
        squares = []
        with evaluating(model):
            for t in self.times[1:].tolist():
                noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
                squares.append(model.score(model.sde.perturb(x0, t, noise), t).square().mean())
        return torch.stack(squares).to(self.stds)

    def eps_weight(self, variance: str | float | Tensor = "posterior") -> Tensor:
        """What ‖ε − ε̂‖² is weighted by in the bound's terms t = 0…T−1, (T,), in nats: a_t² σ²/(2 σ̃_t² λ²) at t + 1.

        For DDPM it is β²/(2 σ̃² (1 − β)(1 − ᾱ)) (Ho et al. 2020, eq. 12). Infinite where nothing of the data is left.

        Args:
            variance: σ̃_t², as ``reverse_variance`` takes it, with ``decoder`` at t = 0.
        """
        return self._weight(self.posterior()[0], self.reverse_variance(variance, decoder=True))

    def ddim_weight(self, eta: float) -> Tensor:
        """The same weights (T,) for DDIM's kernels, of variance ς_t²; at η = 1 they are DDPM's.

        At t = 0 the variance is η² times that of ``reverse_variance`` for a decoder. Song et al. 2021, theorem 1.

        Raises:
            ValueError: unless 0 < eta <= 1: at η = 0 there is no noise, and no finite weight.
        """
        if unit_interval("eta", eta) == 0:
            raise ValueError(f"eta = {eta}: must be above 0, where a step has no noise and its bound is infinite")
        direction, _ = self.ddim(eta)
        of_data = self.marginal_scales[:-1] - direction * self.marginal_scales[1:] / self.marginal_stds[1:]
        return self._weight(of_data, eta**2 * self.reverse_variance("posterior", decoder=True))

    def to_sde(self) -> ChainSDE:
        """An SDE with exactly this chain's marginals at ``times``.

        Raises:
            ValueError: if two times are equal, or a λ_t but the last is 0.
        """
        return ChainSDE(self)

    def _weight(self, of_data: Tensor, variance: Tensor) -> Tensor:
        """The KL's weight on ‖ε − ε̂‖² for means that differ by of_data (x₀ − x̂₀)."""
        noise_to_signal = self.marginal_stds[1:] / self.marginal_scales[1:]
        return (of_data * noise_to_signal).square() / (2 * variance)


class ChainSDE(SDE):
    r"""A chain in continuous time. Within the step i, with w from 0 to 1 over its duration Δ:

        λ = 1 − w (1 − λ_i)      α = α_{i−1} λ      σ² = λ² σ²_{i−1} + w σ_i²
        f = −(1 − λ_i)/(Δ λ)     g² = (σ_i²/Δ) (1 + 2 w (1 − λ_i)/λ)

    At the start of a step f and g² are the chain's own −(1 − λ_i)/Δ and σ_i²/Δ. They jump between steps, α and σ
    do not. Only the last λ_i may be 0.
    """

    def __init__(self, chain: GaussianChain):
        """Tabulate the steps.

        Raises:
            ValueError: if two times are equal, or a λ_t but the last is 0.
        """
        if not bool((chain.times.diff() > 0).all()):
            raise ValueError(f"times = {chain.times.tolist()}: must increase for an SDE")
        if not bool((chain.scales[:-1] > 0).all()):
            raise ValueError("scales: only the last may be 0 for an SDE, or the states after it would be one")
        self.chain, self.T = chain, float(chain.times[-1])
        scales, variances = chain.marginal_scales[:-1], chain.marginal_stds[:-1].square()
        table = torch.stack(
            [
                chain.times[:-1],
                chain.times.diff(),
                chain.scales,
                chain.stds.square(),
                scales,
                variances,
                variances / scales.square(),
            ]
        )
        self._tables = {table.device: table}

    def alpha(self, t: Tensor) -> Tensor:
        """α_{i−1} λ."""
        step = self._step(t)
        return (step.alpha * step.scale).to(t.dtype)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """−α_{i−1} (1 − λ_i)/Δ."""
        step = self._step(t)
        return (-step.alpha * step.shrinkage / step.duration).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """√(λ² σ²_{i−1} + w σ_i²)."""
        return self._step(t).sigma.to(t.dtype)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """(½ σ_i² − λ (1 − λ_i) σ²_{i−1})/(Δ σ)."""
        step = self._step(t)
        rate = 0.5 * step.added - step.scale * step.shrinkage * step.variance
        return (rate / (step.duration * step.sigma)).to(t.dtype)

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """f above."""
        step = self._step(t)
        return (-step.shrinkage / (step.duration * step.scale)).to(t.dtype)

    def diffusion(self, t: Tensor) -> Tensor:
        """g above."""
        step = self._step(t)
        growth = 1 + 2 * step.progress * step.shrinkage / step.scale
        return torch.sqrt(step.added / step.duration * growth).to(t.dtype)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Find the step, then the root w of w = δ λ², with δ = (e^{−log-SNR} − σ²_{i−1}/α²_{i−1}) α²_{i−1}/σ_i²."""
        ratio = torch.exp(-log_snr.double())
        start, duration, last_scale, added, alpha, _, first_ratio = self._lookup(_RATIO, ratio)
        # Finite, so that a log-SNR of minus infinity is the end and not a quotient of infinities.
        delta = ((ratio - first_ratio) * alpha.square() / added).clamp(max=1e300)
        stretched = delta * (1 - last_scale)
        progress = 2 * delta / (1 + 2 * stretched + torch.sqrt(1 + 4 * stretched))
        return (start + progress.clamp(max=1) * duration).clamp(max=self.T).to(log_snr.dtype)

    def discretize(self, steps: int | Sequence[float]) -> GaussianChain:
        """The chain at given times, or at ``steps`` equal steps of [0, T], not only up to t_max; errors as for any SDE.

        With the chain's own times it is the chain again.
        """
        return super().discretize(_equal_times(self.T, int(steps)) if isinstance(steps, int | np.integer) else steps)

    @property
    def prior_std(self) -> float:
        """That of the chain."""
        return self.chain.prior_std

    def __repr__(self) -> str:
        """Its chain."""
        return f"ChainSDE({self.chain})"

    def _step(self, t: Tensor) -> _Step:
        time = t.double()
        start, duration, last_scale, added, alpha, variance, _ = self._lookup(_START, time)
        progress = ((time - start) / duration).clamp(0, 1)
        scale = (1 - progress) + progress * last_scale
        sigma = torch.sqrt(scale.square() * variance + progress * added)
        return _Step(progress, duration, scale, 1 - last_scale, added, alpha, variance, sigma)

    def _lookup(self, row: int, values: Tensor) -> tuple[Tensor, ...]:
        """The columns of the steps that the values fall in, by a row of the table that increases."""
        if values.device not in self._tables:
            self._tables[values.device] = next(iter(self._tables.values())).to(values.device)
        table = self._tables[values.device]
        index = (torch.searchsorted(table[row], values.contiguous(), right=True) - 1).clamp(min=0)
        return table.index_select(1, index.flatten()).reshape(len(table), *values.shape).unbind()


# Rows of a ChainSDE's table that are searched.
_START, _RATIO = 0, -1


class _Step(NamedTuple):
    """Where in which step each time is; all in float64 and of the times' shape.

    Attributes:
        progress: w.
        duration: Δ.
        scale: λ.
        shrinkage: 1 − λ_i.
        added: σ_i².
        alpha, variance: α_{i−1} and σ²_{i−1}, at the step's start.
        sigma: σ.
    """

    progress: Tensor
    duration: Tensor
    scale: Tensor
    shrinkage: Tensor
    added: Tensor
    alpha: Tensor
    variance: Tensor
    sigma: Tensor


def unit_interval(name: str, value: float) -> float:
    """Return value as a float, or raise a ValueError that names the argument if it is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value}: must be in [0, 1]")
    return float(value)


def check_variance(variance: str | float) -> float:
    """Where a reverse variance is between "posterior", 0, and "noising", 1.

    Raises:
        ValueError: if it is neither of these nor a number in [0, 1].
    """
    named = {"posterior": 0.0, "noising": 1.0}
    if isinstance(variance, Real):
        return unit_interval("variance", float(variance))
    if not isinstance(variance, str) or variance not in named:
        raise ValueError(f"variance = {variance!r}: must be one of {', '.join(named)}, a number in [0, 1] or a tensor")
    return named[variance]


def _equal_times(end: float, steps: int) -> list[float]:
    return [end * i / steps for i in range(1, _positive("steps", steps) + 1)]


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} = {value}: must be at least 1")
    return int(value)


def _compose(scales: Tensor, stds: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and variance after 0…T of the steps, (T + 1,) each."""
    variances = [0.0]
    for scale, std in zip(scales.tolist(), stds.tolist(), strict=True):
        variances.append(scale**2 * variances[-1] + std**2)
    return torch.cat([scales.new_ones(1), scales.cumprod(0)]), scales.new_tensor(variances)
