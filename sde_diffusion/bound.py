r"""The variational bound on −log p(x₀) under a model's reverse chain, and progressive coding.

For the chain x_t = λ_t x_{t−1} + σ_t ε, t = 1…T, with the a_t and v_t of its posteriors, in nats an example:

    −log p(x₀) ≤ E[L_T + Σ_{t=1}^{T−1} L_t + L_0]
    L_T = KL(q(x_T | x₀) ‖ N(0, p² I)) = ½ Σ (λ²_{T|0} x₀²/p² + r − 1 − log r),    r = σ²_{T|0}/p²
    L_t = KL(q(x_t | x_{t+1}, x₀) ‖ p(x_t | x_{t+1})) = ½ Σ (a_t² (x₀ − x̂₀)²/σ̃_t² + v_t/σ̃_t² − 1 − log(v_t/σ̃_t²))
    L_0 = −log p(x₀ | x_1),    p(x₀ | x_1) = N(x̂₀, σ̃_0² I)

with sums over dimensions, x̂₀ the model's at x_{t+1} and σ̃_t² the variance of its step. As T → ∞

    Σ L_t → ½ ∫ (1 + SNR) ‖x₀ − x̂₀‖² du,    u = log(1 + SNR) from x_T's to x_1's.

N(0, I) data have a constant integrand in this variable, which is why a part of the terms is sampled evenly in it.

A code of b bits is a point x₀ in a bin, and L_0 the mass that the Gaussian leaves to the bin; the first and the last
bin are open. A model of dequantised data cannot know the point, and pays for its place in the bin once x_1 shows it:
by default x_1 has noise of half a bin, which costs 0.028 bits/dim where the density is flat, and does not blur one that
is confined to a bin (DDPM's x_1 has 1.3 bins). Or else x₀ is dequantised and L_0 a density, as for ``bits_per_dim``.

Sent x_T, …, x_1 one after another, a receiver has spent L_T + … + L_t when x_t is known, and sees x̂₀(x_t) of it:
the rate and the distortion of progressive coding.

Sources: Ho et al. 2020 (arXiv:2006.11239), sections 2, 3.3 and 4.3; Kingma et al. 2021 (arXiv:2107.00630),
section 4; Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.chain import interpolate_variance
from sde_diffusion.data.info import CODE_POINTS, DataInfo
from sde_diffusion.losses import step_kl
from sde_diffusion.model import Model, Prediction, VariancePrediction, check_finite, evaluating, slice_cond
from sde_diffusion.samplers.grids import time_grid
from sde_diffusion.samplers.noise import StepNoise, Streams
from sde_diffusion.sde import SDE, expand_to

CODES = (*CODE_POINTS, "dequantized")


@dataclass(frozen=True)
class Bound:
    """What ``variational_bound`` returns; K transitions lie between the K + 1 times.

    Attributes:
        prior: (B,) L_T, in nats.
        transitions: (B, K) what it costs to go from times[j + 1] to times[j], in nats: L_{j+1}, or the estimate of
            a stratum.
        decoder: (B,) L_0, in nats.
        nats_std_error: (B,) standard error of the sum of these, over the repeats; NaN for one.
        squared_error: (B, K + 1) mean square of x₀ − x̂₀ a dimension, x̂₀ seen from times[j] (with strata, for j > 0
            from somewhere between times[j − 1] and times[j]).
        times: (K + 1,) from that of x_1 to that of x_T.
        dimension: D, the size of one example.
        data: ``model.data``.
        nfe: evaluations of the model for each example.
        seconds: wall-clock time.
    """

    prior: Tensor
    transitions: Tensor
    decoder: Tensor
    nats_std_error: Tensor
    squared_error: Tensor
    times: Tensor
    dimension: int
    data: DataInfo
    nfe: int
    seconds: float

    @property
    def nats(self) -> Tensor:
        """(B,) the bound on −log p(x₀)."""
        return self.prior + self.transitions.sum(1) + self.decoder

    @property
    def unit(self) -> str:
        """Of the numbers below: "bits/dim" for codes, "nats/dim" for continuous data."""
        return "nats/dim" if self.data.bits is None else "bits/dim"

    def per_dimension(self, nats: Tensor) -> Tensor:
        """Nats an example in ``unit``."""
        return nats / (self.dimension * (1.0 if self.data.bits is None else math.log(2)))

    @property
    def per_example(self) -> Tensor:
        """(B,) the bound."""
        return self.per_dimension(self.nats)

    @property
    def per_example_std_error(self) -> Tensor:
        """(B,) the estimator's, over repeats."""
        return self.per_dimension(self.nats_std_error)

    @property
    def mean(self) -> float:
        """Over the examples."""
        return float(self.per_example.double().mean())

    @property
    def std_error(self) -> float:
        """Of the mean, from the estimator alone: how far a repeat with other noise would be."""
        return float(self.per_example_std_error.double().square().sum().sqrt() / len(self.prior))

    @property
    def sampling_error(self) -> float:
        """Of the mean, from one example to another: how far other examples would be; NaN for one."""
        count = len(self.prior)
        return float(self.per_example.double().std() / math.sqrt(count)) if count > 1 else math.nan


@dataclass(frozen=True)
class RateDistortion:
    """What ``rate_distortion`` returns: the curve from x_T, which shows next to nothing, to x_1.

    Attributes:
        times: (K + 1,) of the states x_t, decreasing.
        rate: (K + 1,) what has been spent when x_t is known, in bits a dimension.
        distortion: (K + 1,) root mean square of x₀ − x̂₀(x_t), on the scale of [0, 255] for data of any bit depth, in
            the model's units for continuous data.
    """

    times: Tensor
    rate: Tensor
    distortion: Tensor


@torch.no_grad()
def variational_bound(
    model: Model,
    images: Tensor,
    *,
    steps: float | None = None,
    grid: str | Sequence[float] = "log_snr",
    t_min: float | None = None,
    variance: str | float | Tensor = "posterior",
    decoder_variance: float | None = None,
    codes: str = "centres",
    terms: int | None = None,
    repeats: int = 2,
    cond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Bound:
    """Bound −log p(x₀) under the chain of a model: of codes, if ``model.data.bits`` is set, or of continuous data.

    Example j's noise comes from stream indices[j] of the seed, whatever the batch size. An evaluation of all terms
    takes T calls of the model a repeat. DDPM's chain is that of ``steps=1000, grid="t", t_min=sde.t_max / 1000``.

    Args:
        model: a trained or exact model.
        images: (B, *data_shape), integer codes, or floating for continuous data.
        steps: T, 1000 by default; ``math.inf`` for the limit, which needs ``terms``.
        grid: "log_snr", "angle" or "t", in which x_1…x_T are equally spaced, or their decreasing times.
        t_min: the time of x_1; by default that of noise of half a bin for codes as points, or else the SDE's t_min.
        variance: σ̃², "posterior", "noising", a number in [0, 1] between them, numbers (T,) with σ̃_0² first, or
            "learned" by the network. All are one in the limit.
        decoder_variance: σ̃_0²; by default σ_1², or what a ``variance`` of numbers or "learned" has for it.
        codes: the point that is x₀ for a code: the "centres" of dequantisation's bins; the "endpoints" lattice, from
            low to high, for models that were trained on it, as DDPM's were; or "dequantized", anywhere in the bin.
        terms: how many of the T − 1 transitions to evaluate, each from a stratum; all by default.
        repeats: number of independent estimates, whose mean and spread are taken.
        cond: keyword arguments for the model; tensors of length B are cut into batches.
        batch_size: examples evaluated together; all by default.
        seed: of the noise, the strata and the dequantisation.
        indices: of the streams, B numbers, so that a part of a data set draws what it does in the whole; 0…B − 1 by
            default.

    Raises:
        ValueError: naming the argument that is wrong, its value and what is allowed.
    """
    for name, number in (("terms", terms), ("repeats", repeats), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} = {number}: must be at least 1")
    indices = range(len(images)) if indices is None else indices
    if len(indices) != len(images):
        raise ValueError(f"indices has length {len(indices)}: must be {len(images)}, one for each example")
    coding = _coding(model, images, codes)
    times = _times(model.sde, coding.bin_width, steps, grid, t_min, terms)
    for t in (times[0], times[-1]):
        model.check_time("grid", t)
    path = _path(model, times, steps == math.inf, variance, decoder_variance, terms)
    batch_size, started, batches = batch_size or len(images), time.perf_counter(), []
    with evaluating(model):
        for first in range(0, len(images), batch_size):
            place = range(first, min(len(images), first + batch_size))
            streams = Streams(seed, indices[first : place.stop], model.device)
            batch = images[first : place.stop].to(model.device)
            predict = partial(model.predict, **slice_cond(cond, len(images), place, model.device))
            estimates = [_estimate(predict, path, coding, batch, streams) for _ in range(repeats)]
            batches.append([torch.stack(parts) for parts in zip(*estimates, strict=True)])
    prior, transitions, decoder, squared_error = (torch.cat(parts, 1) for parts in zip(*batches, strict=True))
    totals = (prior + transitions.sum(2) + decoder).double()
    return Bound(
        prior.mean(0),
        transitions.mean(0),
        decoder.mean(0),
        totals.std(0) / math.sqrt(repeats) if repeats > 1 else torch.full_like(totals[0], math.nan),
        squared_error.mean(0),
        path.times,
        math.prod(model.data_shape),
        model.data,
        repeats * len(path.times),
        time.perf_counter() - started,
    )


def rate_distortion(bound: Bound) -> RateDistortion:
    """Progressive coding's curve, averaged over the examples of a bound. Ho et al. 2020, section 4.3."""
    prior, transitions = bound.prior.double().mean(), bound.transitions.double().mean(0)
    nats = prior + torch.cat([prior.new_zeros(1), transitions.flip(0).cumsum(0)])
    scale = 1.0 if bound.data.bits is None else 255 / (bound.data.high - bound.data.low)
    distortion = scale * bound.squared_error.double().mean(0).sqrt().flip(0)
    return RateDistortion(bound.times.flip(0), nats / (bound.dimension * math.log(2)), distortion)


def log_bin_mass(lower: Tensor, upper: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Log of the mass that N(mean, variance) has between two edges, elementwise; exact far out in its tails too.

    Args:
        lower: below ``upper``, or −∞.
        upper: the other edge, or ∞.
        mean: of the Gaussian.
        variance: positive.
    """
    std = variance.sqrt()
    lower, upper = (lower - mean) / std, (upper - mean) / std
    # The mass is the same on the other side of 0, and on the left Φ keeps all its digits.
    is_right = lower + upper > 0
    lower, upper = torch.where(is_right, -upper, lower), torch.where(is_right, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))


class _Coding:
    """What x₀ is and what the decoder's term costs: here continuous data, and a density."""

    bin_width: float | None = None

    def __init__(self, model: Model, images: Tensor):
        model.check_data("images", images)
        check_finite("images", images)

    def x0(self, images: Tensor, streams: Streams) -> Tensor:
        """(B, *data_shape), in the model's units."""
        return images

    def cost(self, images: Tensor, x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """−log p(x₀ | x_1), elementwise in nats."""
        return 0.5 * ((x0 - mean).square() / variance + torch.log(2 * math.pi * variance))


class _Dequantized(_Coding):
    """Codes anywhere in their bins, and the density times a bin's width."""

    def __init__(self, model: Model, images: Tensor):
        model.data.check_codes("images", images)
        if images.shape[1:] != tuple(model.data_shape):
            raise ValueError(
                f"images has shape {tuple(images.shape)}: need (B, {', '.join(map(str, model.data_shape))})"
            )
        self.data, self.dtype = model.data, model.dtype

    def x0(self, images: Tensor, streams: Streams) -> Tensor:
        return self.data.dequantize(images, streams.uniform(images.shape[1:], self.dtype))

    def cost(self, images: Tensor, x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return super().cost(images, x0, mean, variance) - self.data.log_scale


class _Points(_Dequantized):
    """Codes at a point of their bin, and the mass of the bin."""

    def __init__(self, model: Model, images: Tensor, kind: str):
        super().__init__(model, images)
        self.kind, self.bin_width = kind, math.exp(model.data.log_scale)

    def x0(self, images: Tensor, streams: Streams) -> Tensor:
        return self.data.points(images, self.kind, self.dtype)

    def cost(self, images: Tensor, x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return -log_bin_mass(*self.data.bin_edges(images, x0, self.kind), mean, variance)


def _coding(model: Model, images: Tensor, codes: str) -> _Coding:
    if len(images) == 0:
        raise ValueError("images holds 0 examples: must hold at least 1")
    if codes not in CODES:
        raise ValueError(f"codes = {codes!r}: must be one of {', '.join(CODES)}")
    if model.data.bits is None:
        return _Coding(model, images)
    return _Dequantized(model, images) if codes == "dequantized" else _Points(model, images, codes)


def _times(
    sde: SDE,
    bin_width: float | None,
    steps: float | None,
    grid: str | Sequence[float],
    t_min: float | None,
    terms: int | None,
) -> list[float]:
    """The increasing times of x_1…x_T; of x_1 and x_T in the limit."""
    if not isinstance(grid, str):
        if not steps is t_min is None:
            raise ValueError("grid is given as times: steps and t_min cannot be given too")
        return time_grid(sde, grid, sde.t_max, sde.t_min, 1)[::-1]
    steps = 1000 if steps is None else steps
    if steps == math.inf and terms is None:
        raise ValueError("steps = inf: give terms, the number of times at which to look")
    if steps != math.inf and not (steps >= 2 and steps == int(steps)):
        raise ValueError(f"steps = {steps}: must be a whole number of at least 2, or inf")
    if t_min is None:
        t_min = sde.t_min if bin_width is None else max(sde.t_min, sde.t_from_log_noise(math.log(bin_width / 2)))
    elif not math.isfinite(sde.log_noise(sde.check_time("t_min", t_min))) or t_min >= sde.t_max:
        raise ValueError(f"t_min = {t_min}: there must be noise, and it must be below t_max = {sde.t_max}")
    return time_grid(sde, grid, sde.t_max, t_min, 1 if steps == math.inf else int(steps) - 1)[::-1]


class _Steps(NamedTuple):
    """Steps down from x = α x₀ + σ ε at a time, their KL's a, v and σ̃², and the estimator's weight; of equal shapes."""

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    v: Tensor
    variance: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Path:
    """What is to be evaluated.

    Attributes:
        times: (K + 1,) as in ``Bound``.
        decoder: the step from x_1 to x₀, (1,).
        draw: the transitions, (K,) or (B, K), from the data's side on.
        final: λ_{T|0} and σ_{T|0}, in units of the prior's standard deviation.
        is_learned: whether the network interpolates between v and ``variance``.
    """

    times: Tensor
    decoder: _Steps
    draw: Callable[[Streams], _Steps]
    final: tuple[float, float]
    is_learned: bool


def _path(
    model: Model,
    times: list[float],
    is_limit: bool,
    variance: str | float | Tensor,
    decoder_variance: float | None,
    terms: int | None,
) -> _Path:
    """The coefficients, in float64 on the model's device, of the chain through increasing ``times``."""
    sde, chain, is_learned = model.sde, model.sde.discretize(times), variance == "learned"
    if is_learned and not getattr(model, "learned_variance", False):
        raise ValueError("variance = 'learned': the model must have learned_variance=True")
    a, _, v = chain.posterior()
    noising = chain.stds.square()
    v[0] = chain.reverse_variance("posterior", decoder=True)[0]
    chosen = chain.reverse_variance("noising" if is_learned else variance, decoder=True)
    if decoder_variance is not None:
        if not 0 < decoder_variance < math.inf:
            raise ValueError(f"decoder_variance = {decoder_variance}: must be positive and finite")
        v[0] = chosen[0] = decoder_variance
    elif not isinstance(variance, Tensor):
        chosen[0] = noising[0]
    columns = (chain.times[1:], chain.marginal_scales[1:], chain.marginal_stds[1:], a, v, chosen, torch.ones_like(v))
    decoder, steps = (
        _Steps(*(column[part].to(model.device) for column in columns)) for part in (slice(1), slice(1, None))
    )
    path = _Path(
        chain.times[1:],
        decoder,
        lambda streams: steps,
        (float(chain.marginal_scales[-1]) / sde.prior_std, float(chain.marginal_stds[-1]) / sde.prior_std),
        is_learned,
    )
    if terms is None:
        return path
    information = torch.log1p((chain.marginal_scales[1:] / chain.marginal_stds[1:]).square()).to(model.device)
    strata = _Strata(float(information[0]), float(information[-1]), terms)
    draw = partial(_draw_limit, sde, strata) if is_limit else partial(_draw_steps, steps, information, strata)
    return replace(path, times=strata.times(sde), draw=draw)


@dataclass(frozen=True)
class _Strata:
    """Equal intervals of u = log(1 + SNR), from the data's side on."""

    first: float
    last: float
    count: int

    @property
    def width(self) -> float:
        """Of each."""
        return (self.first - self.last) / self.count

    def draw(self, streams: Streams) -> Tensor:
        """A u (B, count) in each, in float64."""
        uniform = streams.uniform((self.count,), torch.float64)
        return self.first - self.width * (torch.arange(self.count, device=uniform.device) + uniform)

    def times(self, sde: SDE) -> Tensor:
        """(count + 1,) of their borders."""
        return _time_of(sde, torch.linspace(self.first, self.last, self.count + 1, dtype=torch.float64))


def _time_of(sde: SDE, u: Tensor) -> Tensor:
    return sde.t_from_log_snr(torch.log(torch.expm1(u)))


def _draw_steps(steps: _Steps, information: Tensor, strata: _Strata, streams: Streams) -> _Steps:
    """The chain's step in which each u lies, weighted by the stratum's width over the step's."""
    index = torch.searchsorted(-information, -strata.draw(streams)).clamp(1, len(information) - 1) - 1
    return _Steps(*(column[index] for column in steps))._replace(weight=-strata.width / information.diff()[index])


def _draw_limit(sde: SDE, strata: _Strata, streams: Streams) -> _Steps:
    """½ (1 + SNR) ‖x₀ − x̂₀‖² Δu at each u, which is the KL of a step with a² = (1 + SNR) Δu and σ̃² = v = 1."""
    u = strata.draw(streams)
    t, one = _time_of(sde, u), torch.ones_like(u)
    return _Steps(t, sde.alpha(t), sde.sigma(t), torch.sqrt(strata.width * torch.exp(u)), one, one, one)


def _estimate(
    predict: Callable[[Tensor, Tensor], Prediction], path: _Path, coding: _Coding, images: Tensor, streams: Streams
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One draw of L_T (B,), the transitions (B, K), L_0 (B,) and the squared errors (B, K + 1)."""
    x0 = coding.x0(images, streams)
    noise = StepNoise(streams, x0.shape[1:], x0.dtype)
    transitions = path.draw(streams)

    def look(step: _Steps) -> tuple[Tensor, _Steps]:
        """x̂₀ at the step's time, and its coefficients in the shape that multiplies x₀."""
        spread = _Steps(*(expand_to(column.to(x0), x0) for column in step))
        prediction = predict(spread.alpha * x0 + spread.sigma * noise(), step.time.to(x0))
        if path.is_learned and isinstance(prediction, VariancePrediction):
            spread = spread._replace(variance=interpolate_variance(spread.v, spread.variance, prediction.fraction))
        return prediction.x0, spread

    mean, step = look(path.decoder)
    decoder = coding.cost(images, x0, mean, step.variance).flatten(1).sum(1)
    costs, errors = [], [(x0 - mean).square().flatten(1).mean(1)]
    for column in zip(*(values.unbind(-1) for values in transitions), strict=True):
        mean, step = look(_Steps(*column))
        kl = step_kl(x0 - mean, step.a, step.v, step.variance)
        costs.append((step.weight * kl).flatten(1).sum(1))
        errors.append((x0 - mean).square().flatten(1).mean(1))
    scale, std = path.final
    prior = 0.5 * scale**2 * x0.square().flatten(1).sum(1) + x0[0].numel() * (0.5 * (std**2 - 1) - math.log(std))
    return prior, torch.stack(costs, 1), decoder, torch.stack(errors, 1)
