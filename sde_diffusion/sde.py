r"""The family of linear, isotropic diffusions, and its reversal in time.

Data x₀, noise ε ~ N(0, I), time t in [0, T]:

    x_t = α(t) x₀ + σ(t) ε          is the marginal of        dx = f(t) x dt + g(t) dW
    f = α̇/α                         g² = 2 σ (σ̇ − f σ)        log-SNR = log(α²/σ²)

Reverse time (dt < 0), score s = ∇ log p_t, and one knob η ≥ 0 that leaves every marginal p_t unchanged:

    dx = [f x − ½ (1 + η²) g² s] dt + η g dW̄

η = 1 is the reverse SDE, η = 0 the probability-flow ODE. Written with the data and noise predictions,
x = α x̂₀ + σ ε̂ and s = −ε̂/σ, the drift is  α̇ x̂₀ + σ̇ ε̂ + ½ (η g)² ε̂/σ,  whose first two terms stay finite where f and
g do not. η may vary with time. Where g is infinite it is the noise level η(t) g(t) that must be given, as a function
of time: no marginal depends on it either.

Sources: Song et al. 2021 (arXiv:2011.13456), sections 3 and 4 and appendix B; Kingma et al. 2021 (arXiv:2107.00630);
Karras et al. 2022 (arXiv:2206.00364); Ma et al. 2024 (arXiv:2401.08740), for the free noise level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sde_diffusion.chain import GaussianChain
    from sde_diffusion.model import Model

TimeFunction = Callable[[Tensor], Tensor]

# Outside these the weaker of signal and noise is under a thousandth of the stronger, and float32 would keep
# only four digits of it.
_LARGEST_RATIO = 1e3


def expand_to(coefficient: Tensor, x: Tensor) -> Tensor:
    """Give a coefficient of shape () or (B,) the trailing axes that let it multiply x (B, ...)."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1)) if coefficient.ndim else coefficient


# How many numbers of float64 the vectorised loops of a CPU take at once, at the most.
_VECTOR = 16


def row_by_row(function: Callable[[Tensor], tuple[Tensor, ...]], values: Tensor) -> tuple[Tensor, ...]:
    """Functions of values () or (B,), to the same bits wherever in a batch a value stands.

    Some of torch's functions round a loop's last, incomplete vector in their own way. With as many copies as a vector
    holds, none is incomplete.
    """
    return tuple(result[..., 0] for result in function(values[..., None].repeat_interleave(_VECTOR, dim=-1)))


class SDE:
    """A diffusion given by its marginals; a subclass need define only ``alpha`` and ``sigma``.

    Both map a tensor of times of any shape to a tensor of the same shape and dtype. Everything else has a default
    here, by differentiation or bisection, which a subclass overrides where a closed form is known. σ/α must rise
    with t.
    """

    T: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data in x_t."""
        raise NotImplementedError(f"{type(self).__name__} must define alpha(t)")

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in x_t."""
        raise NotImplementedError(f"{type(self).__name__} must define sigma(t)")

    def alpha_dot(self, t: Tensor) -> Tensor:
        """dα/dt."""
        return derivative(self.alpha, t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """dσ/dt."""
        return derivative(self.sigma, t)

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """f(t) of the drift f(t) x."""
        return self.alpha_dot(t) / self.alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""
        sigma = self.sigma(t)
        return torch.sqrt(2 * sigma * (self.sigma_dot(t) - self.drift_coefficient(t) * sigma))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(α²/σ²), which falls with t."""
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of ``log_snr``; values beyond its range give 0 or T."""
        target = log_snr.double()
        low, high = torch.zeros_like(target), torch.full_like(target, self.T)
        for _ in range(80):
            middle = (low + high) / 2
            is_early = self.log_snr(middle) > target
            low, high = torch.where(is_early, middle, low), torch.where(is_early, high, middle)
        return torch.where(low == 0, low, high).to(log_snr.dtype)

    @cached_property
    def t_min(self) -> float:
        """First time at which the noise is large enough, beside the data, for float32."""
        return float(self.t_from_log_snr(torch.tensor(2 * math.log(_LARGEST_RATIO), dtype=torch.float64)).clamp(min=0))

    @cached_property
    def t_max(self) -> float:
        """Last time at which the data are large enough, beside the noise, for float32."""
        last = self.t_from_log_snr(torch.tensor(-2 * math.log(_LARGEST_RATIO), dtype=torch.float64))
        return min(float(last), self.T)

    def drift(self, x: Tensor, t: Tensor | float) -> Tensor:
        """f(t) x, of x's shape (B, ...); t is () or (B,)."""
        return expand_to(self.drift_coefficient(self.as_time(t, x)), x) * x

    def marginal(self, x0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and standard deviation, () or (B, 1, ...), of x_t given x₀."""
        t = self.as_time(t, x0)
        return expand_to(self.alpha(t), x0) * x0, expand_to(self.sigma(t), x0)

    def perturb(self, x0: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """x_t = α x₀ + σ ε for the given ε, of x₀'s shape."""
        mean, std = self.marginal(x0, t)
        return mean + std * noise

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std² I) that stands for p_T."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def sample_prior(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw x_T of the given shape from the prior."""
        return self.prior_std * torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log density (B,) of the prior, in nats, at x (B, ...)."""
        scaled = x.flatten(1) / self.prior_std
        return -0.5 * scaled.square().sum(1) - scaled.shape[1] * math.log(self.prior_std * math.sqrt(2 * math.pi))

    def time_change(self, log_noise: Tensor) -> tuple[Tensor, Tensor]:
        """(t, dt/du) at u = log(σ/α), the variable in which the ODE is smoothest and noise enters at a constant rate.

        g² dt/du = 2 σ², whatever the SDE.
        """
        t = self.t_from_log_snr(-2 * log_noise)
        return t, 1 / (self.sigma_dot(t) / self.sigma(t) - self.drift_coefficient(t))

    def log_noise(self, t: float) -> float:
        """u = log(σ/α) at a number t."""
        return -0.5 * float(self.log_snr(torch.tensor(t, dtype=torch.float64)))

    def t_from_log_noise(self, u: float) -> float:
        """The number t at which u = log(σ/α)."""
        return float(self.t_from_log_snr(torch.tensor(-2 * u, dtype=torch.float64)))

    def added_share(self, s: Tensor, t: Tensor) -> Tensor:
        """Share of the noise at t that was added after s < t: 1 − SNR(t)/SNR(s), of their shape."""
        return -torch.expm1(self.log_snr(t) - self.log_snr(s))

    def posterior_mean(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of E[x_s | x_t, x₀] = a x₀ + b x_t, of the shape of s < t.

        a = α_s share and b = (α_t/α_s) σ_s²/σ_t², with the share of ``added_share``; but (1, 0) at s = 0, as the first
        state of a chain is the data even where σ(0) is not 0. Ho et al. 2020 (arXiv:2006.11239), eq. 7.
        """
        alpha_s = self.alpha(s)
        a = alpha_s * self.added_share(s, t)
        b = self.alpha(t) / alpha_s * (self.sigma(s) / self.sigma(t)).square()
        return torch.where(s > 0, a, 1.0), torch.where(s > 0, b, 0.0)

    def reverse_diffusion(self, t: Tensor, eta: float | TimeFunction) -> Tensor:
        """Noise of the reverse SDE at t, of t's shape: η g(t) for a number η, else the level eta(t) itself.

        Raises:
            ValueError: if eta(t) is not a tensor of t's shape.
        """
        if not callable(eta):
            # Not 0 · g, as g may be infinite.
            return eta * self.diffusion(t) if eta else torch.zeros_like(t)
        level = eta(t)
        if not isinstance(level, Tensor) or level.shape != t.shape:
            got = tuple(level.shape) if isinstance(level, Tensor) else repr(level)
            raise ValueError(f"eta(t) = {got} for t of shape {tuple(t.shape)}: must be a tensor of that shape")
        return level

    def reverse_rates(self, t: Tensor, eta: float | TimeFunction) -> tuple[Tensor, Tensor]:
        """What multiplies x̂₀ and ε̂ in the reverse drift: (α̇, σ̇ + ½ w²/σ) with w = ``reverse_diffusion(t, eta)``."""
        noise_rate = self.sigma_dot(t)
        # The ODE is regular at times where g²/σ is not.
        if callable(eta) or eta:
            noise_rate = noise_rate + 0.5 * self.reverse_diffusion(t, eta).square() / self.sigma(t)
        return self.alpha_dot(t), noise_rate

    def reverse(self, model: Model, eta: float | TimeFunction = 1.0) -> ReverseSDE:
        """The diffusion run backwards with the model's score; see ``ReverseSDE`` for η."""
        return ReverseSDE(self, model, eta)

    def discretize(self, steps: int | Sequence[float]) -> GaussianChain:
        """The discrete chain with this SDE's exact marginals at ``steps`` equal steps of [0, t_max], or at given times.

        Raises:
            ValueError: if ``steps`` is not positive, or the times are not increasing in (0, T].
        """
        from sde_diffusion.chain import GaussianChain

        return GaussianChain.from_sde(self, steps)

    def as_time(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Time as a tensor of x's dtype and device.

        Raises:
            ValueError: if t is a number outside [0, T], a tensor that is neither () nor (B,), or x is not of a floating
                dtype. The values of a tensor are not checked: reading them would wait for the device.
        """
        if not x.is_floating_point():
            raise ValueError(f"data have dtype {x.dtype}: need a floating dtype")
        if isinstance(t, Tensor):
            if t.shape not in ((), (1,), x.shape[:1]):
                raise ValueError(f"t has shape {tuple(t.shape)}: need () or ({len(x)},), one time for each example")
            return t.to(device=x.device, dtype=x.dtype)
        return torch.full((), self.check_time("t", t), device=x.device, dtype=x.dtype)

    def check_time(self, name: str, t: float) -> float:
        """Return t, or raise a ValueError that names the argument if it is not in [0, T]."""
        if not 0 <= t <= self.T:
            raise ValueError(f"{name} = {t} is outside the range [0, {self.T}] of {self}")
        return float(t)

    def __repr__(self) -> str:
        """Name and parameters, as one would write them."""
        parameters = ", ".join(
            f"{k}={v}" for k, v in vars(self).items() if k not in ("t_min", "t_max") and not k.startswith("_")
        )
        return f"{type(self).__name__}({parameters})"


class ReverseSDE:
    """dx = [f x − ½ (1 + η²) g² s] dt + η g dW̄, to be run from t = T down to 0."""

    def __init__(self, sde: SDE, model: Model, eta: float | TimeFunction = 1.0):
        """Reverse ``sde`` with the score of ``model``.

        Args:
            sde: the diffusion.
            model: what knows its score.
            eta: a number η >= 0 that scales the noise g: 1 for the reverse SDE, 0 for the ODE. Or a function of time,
                which is then the whole noise level w(t) = η(t) g(t): a tensor of t's shape, at least 0, in the units
                of g. A finite w can start at T where g(T) is infinite; where σ(t) is 0, w must be 0 too.

        Raises:
            ValueError: for a number that is negative or not finite.
        """
        self.sde, self.model, self.eta = sde, model, check_eta(eta)

    def drift(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The bracket above, of x's shape (B, ...); t is () or (B,)."""
        t = self.sde.as_time(t, x)
        data_rate, noise_rate = self.sde.reverse_rates(t, self.eta)
        x0, eps = self.model.predict(x, t, **cond)
        return expand_to(data_rate, x) * x0 + expand_to(noise_rate, x) * eps

    def diffusion(self, t: Tensor) -> Tensor:
        """η g(t), or the noise level that was given in its place."""
        return self.sde.reverse_diffusion(t, self.eta)


def drift_in_log_noise(
    sde: SDE,
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    u: Tensor,
    eta: float | TimeFunction = 0.0,
) -> Tensor:
    """The reverse drift over u = log(σ/α) in place of t, with predict(x, t) -> (x̂₀, ε̂); its noise is η √2 σ dW̄.

    That of a noise level w(t) given as eta is w √(dt/du) dW̄.

    Args:
        sde: the diffusion.
        predict: the model's primitive.
        x: state (B, ...).
        u: () or (B,), in float64.
        eta: as in ``ReverseSDE``; 0 for the probability-flow ODE.
    """

    def rates(u: Tensor) -> tuple[Tensor, ...]:
        t, dt_du = sde.time_change(u)
        data_rate, noise_rate = sde.reverse_rates(t, eta)
        return t, data_rate * dt_du, noise_rate * dt_du

    t, data_rate, noise_rate = (value.to(x.dtype) for value in row_by_row(rates, u))
    x0, eps = predict(x, t)
    return expand_to(data_rate, x) * x0 + expand_to(noise_rate, x) * eps


class _LinearBeta(SDE):
    """β(t) = β_min + t (β_max − β_min), its integral B(t), and the inverse of that; α = e^{−B/2}."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        """Set the noise rate at t = 0 and t = 1.

        Raises:
            ValueError: unless 0 < beta_min <= beta_max.
        """
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"beta_min = {beta_min}, beta_max = {beta_max}: need 0 < beta_min <= beta_max")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def beta(self, t: Tensor) -> Tensor:
        """β(t)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def beta_integral(self, t: Tensor) -> Tensor:
        """B(t) = ∫₀ᵗ β."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def t_from_beta_integral(self, integral: Tensor) -> Tensor:
        """The root t of B(t) = integral, in the form without cancellation near 0; T beyond B(T)."""
        slope = self.beta_max - self.beta_min
        integral = integral.clamp(max=0.5 * (self.beta_min + self.beta_max))
        t = 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))
        return t.clamp(max=self.T)

    def alpha(self, t: Tensor) -> Tensor:
        """e^{−B/2}."""
        return torch.exp(-0.5 * self.beta_integral(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """−½ β α."""
        return -0.5 * self.beta(t) * self.alpha(t)

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """−½ β."""
        return -0.5 * self.beta(t)

    prior_std = 1.0


class VPSDE(_LinearBeta):
    """Variance preserving: α² + σ² = 1, g² = β; the limit of DDPM. Song et al. 2021, eq. 11."""

    def sigma(self, t: Tensor) -> Tensor:
        """√(1 − e^{−B})."""
        return torch.sqrt(-torch.expm1(-self.beta_integral(t)))

    def sigma_dot(self, t: Tensor) -> Tensor:
        """½ β α²/σ."""
        return 0.5 * self.beta(t) * self.alpha(t).square() / self.sigma(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """√β."""
        return torch.sqrt(self.beta(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """−B − log(1 − e^{−B})."""
        integral = self.beta_integral(t)
        return -integral - torch.log(-torch.expm1(-integral))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """B = log(1 + e^{−log-SNR}), then its root."""
        return self.t_from_beta_integral(torch.nn.functional.softplus(-log_snr, threshold=50))


class SubVPSDE(_LinearBeta):
    """σ = 1 − e^{−B}, a variance never above VP's; g² = β (1 − e^{−2B}). Song et al. 2021, eq. 12."""

    def sigma(self, t: Tensor) -> Tensor:
        """1 − e^{−B}."""
        return -torch.expm1(-self.beta_integral(t))

    def sigma_dot(self, t: Tensor) -> Tensor:
        """β α²."""
        return self.beta(t) * self.alpha(t).square()

    def diffusion(self, t: Tensor) -> Tensor:
        """√(β (1 − e^{−2B}))."""
        return torch.sqrt(self.beta(t) * -torch.expm1(-2 * self.beta_integral(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        """−B − 2 log(1 − e^{−B})."""
        integral = self.beta_integral(t)
        return -integral - 2 * torch.log(-torch.expm1(-integral))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """B = 2 asinh(½ e^{−½ log-SNR}), then its root."""
        return self.t_from_beta_integral(2 * torch.asinh(0.5 * torch.exp(-0.5 * log_snr)))


class VESDE(SDE):
    """Variance exploding: α = 1, σ = σ_min (σ_max/σ_min)^t. Song et al. 2021, eq. 9.

    σ(0) = σ_min is not 0: the family is exact when x(0) is read as data already blurred by σ_min.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        """Set the noise at t = 0 and t = 1, in the units of the data.

        Raises:
            ValueError: unless 0 < sigma_min < sigma_max.
        """
        self.sigma_min, self.sigma_max = _noise_range(sigma_min, sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """σ_min (σ_max/σ_min)^t."""
        return self.sigma_min * torch.exp(t * self._log_ratio)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """σ log(σ_max/σ_min)."""
        return self.sigma(t) * self._log_ratio

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """log(σ/σ_min)/log(σ_max/σ_min) with log σ = −½ log-SNR."""
        return ((-0.5 * log_snr - math.log(self.sigma_min)) / self._log_ratio).clamp(0, self.T)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)


class EDMSDE(SDE):
    """α = 1, σ = t: time is the noise level itself, from σ_min to T = σ_max. Karras et al. 2022."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        """Set the first and last noise level used, in the units of the data.

        Raises:
            ValueError: unless 0 < sigma_min < sigma_max.
        """
        self.sigma_min, self.sigma_max = _noise_range(sigma_min, sigma_max)
        self.T = self.sigma_max

    @property
    def t_min(self) -> float:
        """σ_min."""
        return self.sigma_min

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def sigma_dot(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """e^{−½ log-SNR}."""
        return torch.exp(-0.5 * log_snr).clamp(max=self.T)

    def __repr__(self) -> str:
        """Name and parameters, as one would write them."""
        return f"EDMSDE(sigma_min={self.sigma_min}, sigma_max={self.sigma_max})"


class CosineVPSDE(SDE):
    r"""Variance preserving with α a cosine: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, in continuous time.

    With offset s, φ(t) = c (t + s), c = π/(2 (1 + s)) and φ₀ = φ(0):

        α = cos φ/cos φ₀ = sin(c (1 − t))/cos φ₀        σ² = sin(c t) sin(c (t + 2s))/cos² φ₀
        g² = −2f = 2c tan φ, infinite at t = 1

    the products of sines being what does not cancel at either end.
    """

    def __init__(self, offset: float = 0.008):
        """Set s, which keeps σ from rising too fast at t = 0.

        Raises:
            ValueError: if it is negative or not finite.
        """
        self.offset = non_negative("offset", offset)

    prior_std = 1.0

    @property
    def _frequency(self) -> float:
        return 0.5 * math.pi / (1 + self.offset)

    @property
    def _phase(self) -> float:
        return self._frequency * self.offset

    def alpha(self, t: Tensor) -> Tensor:
        """cos φ/cos φ₀."""
        return torch.sin(self._frequency * (1 - t)) / math.cos(self._phase)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """−c sin φ/cos φ₀."""
        return -self._frequency * torch.sin(self._frequency * (t + self.offset)) / math.cos(self._phase)

    def sigma(self, t: Tensor) -> Tensor:
        """√(1 − α²)."""
        sines = torch.sin(self._frequency * t) * torch.sin(self._frequency * (t + 2 * self.offset))
        return torch.sqrt(sines) / math.cos(self._phase)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """−α α̇/σ."""
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """−c tan φ, with cos φ = sin(c (1 − t))."""
        angle = self._frequency * (t + self.offset)
        return -self._frequency * torch.sin(angle) / torch.sin(self._frequency * (1 - t))

    def diffusion(self, t: Tensor) -> Tensor:
        """√(2c tan φ)."""
        return torch.sqrt(-2 * self.drift_coefficient(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """Logarithms of the sines."""
        noise = torch.sin(self._frequency * t).log() + torch.sin(self._frequency * (t + 2 * self.offset)).log()
        return 2 * torch.sin(self._frequency * (1 - t)).log() - noise

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """The angle c t = φ − φ₀, from its sine σ² cos φ₀/(sin φ + α sin φ₀) and cosine α cos² φ₀ + sin φ sin φ₀."""
        alpha, variance = torch.sqrt(torch.sigmoid(log_snr)), torch.sigmoid(-log_snr)
        sin_phase, cos_phase = math.sin(self._phase), math.cos(self._phase)
        sin = torch.sqrt(sin_phase**2 + variance * cos_phase**2)
        cosine = (alpha * cos_phase**2 + sin * sin_phase) * (sin + alpha * sin_phase)
        return (torch.atan2(variance * cos_phase, cosine) / self._frequency).clamp(max=self.T)


class ConstantVESDE(SDE):
    """Noise at a constant rate: α = 1, σ² = σ_q² t, g = σ_q. Nakkiran et al. 2024 (arXiv:2406.08929)."""

    def __init__(self, sigma_q: float = 50.0):
        """Set the noise at t = 1, in the units of the data.

        Raises:
            ValueError: unless it is positive and finite.
        """
        if not 0 < sigma_q < math.inf:
            raise ValueError(f"sigma_q = {sigma_q}: must be positive and finite")
        self.sigma_q = float(sigma_q)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """σ_q √t."""
        return self.sigma_q * torch.sqrt(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """½ σ_q/√t."""
        return 0.5 * self.sigma_q / torch.sqrt(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """σ_q."""
        return torch.full_like(t, self.sigma_q)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """e^{−log-SNR}/σ_q²."""
        return (torch.exp(-log_snr) / self.sigma_q**2).clamp(max=self.T)


class FlowSDE(SDE):
    """The straight path from data to noise: α = 1 − t, σ = t, f = −1/(1 − t), g² = 2t/(1 − t).

    Its ODE, rectified flow, has the velocity ε̂ − x̂₀ and is regular over all of [0, 1]. Its g is infinite at t = 1:
    stochastic solvers start at t_max, or anywhere with a finite noise level w(t) in place of g, given as eta, such as
    w = √(2t). Liu et al. 2022 (arXiv:2209.03003); Lipman et al. 2022 (arXiv:2210.02747).
    """

    def alpha(self, t: Tensor) -> Tensor:
        """1 − t."""
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        """−1."""
        return -torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def sigma_dot(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """−1/(1 − t)."""
        return -1 / (1 - t)

    def diffusion(self, t: Tensor) -> Tensor:
        """√(2t/(1 − t))."""
        return torch.sqrt(2 * t / (1 - t))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """1/(1 + e^{½ log-SNR})."""
        return torch.sigmoid(-0.5 * log_snr)


# What a config can name; the fields of its section are the class's arguments. A user's own is one line:
# SDES["mine"] = MySDE, whose arguments have defaults that a config file can hold.
SDES: dict[str, type[SDE]] = {
    "vp": VPSDE,
    "subvp": SubVPSDE,
    "ve": VESDE,
    "edm": EDMSDE,
    "cosine": CosineVPSDE,
    "constant_ve": ConstantVESDE,
    "flow": FlowSDE,
}


def derivative(function: TimeFunction, t: Tensor) -> Tensor:
    """Elementwise derivative by forward-mode differentiation."""
    # Forward mode turns a float32 () into float64.
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1].to(t.dtype)


def non_negative(name: str, value: float) -> float:
    """Return value as a float, or raise a ValueError that names the argument if it is negative or not finite."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} = {value}: must be finite and at least 0")
    return float(value)


def check_eta(eta: float | TimeFunction) -> float | TimeFunction:
    """Return eta if it is a function, or as a float; a ValueError if the number is negative or not finite."""
    return eta if callable(eta) else non_negative("eta", eta)


def _noise_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: need 0 < sigma_min < sigma_max")
    return float(sigma_min), float(sigma_max)
