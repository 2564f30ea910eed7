r"""Distributions whose diffusion is known exactly: the ground truth for every solver and likelihood.

For x = α x₀ + σ ε, and with J the Jacobian of the denoiser E[x₀ | x]:

    E[ε | x] = (x − α E[x₀ | x])/σ            tr J = (α/σ²) tr Cov[x₀ | x]            (Tweedie, to second order)
    ∇·u = α̇ tr J + σ̇ (D − α tr J)/σ           divergence of the probability-flow velocity

A mixture Σ w_k N(m_k, C_k) stays one, with means α m_k and covariances S_k = α² C_k + σ² I:

    E[x₀ | x, k] = m_k + α C_k S_k⁻¹ (x − α m_k)        E[ε | x, k] = σ S_k⁻¹ (x − α m_k)
    Cov[x₀ | x, k] = σ² C_k S_k⁻¹                       p(k | x) ∝ w_k N(x; α m_k, S_k)

N points x⁽ⁱ⁾ are the mixture of N with C = 0:  p(i | x) = softmax_i(−‖x − α x⁽ⁱ⁾‖²/2σ²).

One step of a chain is reversed exactly by drawing x₀ ~ q(x₀ | x_{t+1}) and then x_t, whose law given both is Gaussian.
For N points this is the mixture

    q(x_t | x_{t+1}) = Σ_i p(i | x_{t+1}) N(a_t x⁽ⁱ⁾ + b_t x_{t+1}, v_t I)

For small steps it is nearly one Gaussian, of the mixture's mean and of the variance σ²_{t+1} of the step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sde_diffusion.model import Model, Prediction, check_finite
from sde_diffusion.sde import SDE, expand_to

if TYPE_CHECKING:
    from sde_diffusion.chain import GaussianChain


class Distribution(ABC):
    """A distribution of data with exact answers at every (α, σ), each () or (B,)."""

    data_shape: tuple[int, ...]

    @abstractmethod
    def predict(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        """(E[x₀ | x], E[ε | x]), of x's shape (B, *data_shape)."""

    @abstractmethod
    def traces(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """tr J and D − α tr J, (B,) each: both, as the difference cancels near the data."""

    @abstractmethod
    def log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Log density (B,), in nats, of α x₀ + σ ε at x (B, *data_shape)."""

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw x₀ (n, *data_shape) on the generator's device."""

    @abstractmethod
    def draw_given(self, x: Tensor, alpha: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        """Draw x₀ ~ q(x₀ | α x₀ + σ ε = x), of x's shape (B, *data_shape)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its tensors are."""

    def reverse_step(self, x: Tensor, t: int, chain: GaussianChain, generator: torch.Generator) -> Tensor:
        """Draw x_t ~ q(x_t | x_{t+1} = x), exactly, for a chain whose x₀ has this distribution.

        Args:
            x: state t + 1, (B, *data_shape).
            t: 0…T−1.
            chain: the noising process.
            generator: of the random numbers, on x's device.

        Raises:
            ValueError: for t outside 0…T−1.
        """
        if not 0 <= t < len(chain):
            raise ValueError(f"t = {t}: must be in 0…{len(chain) - 1}")
        a, b, v = (coefficient[t].to(x) for coefficient in chain.posterior())
        x0 = self.draw_given(x, chain.marginal_scales[t + 1].to(x), chain.marginal_stds[t + 1].to(x), generator)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return a * x0 + b * x + v.sqrt() * noise

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw x₀ (n, *data_shape)."""
        return self.draw(n, torch.Generator(self.device).manual_seed(seed))

    def under(self, sde: SDE) -> ExactModel:
        """This distribution noised by ``sde``, as a model."""
        return ExactModel(self, sde)


class ExactModel(Model):
    """A distribution under an SDE: the same interface as a network's, with the exact density besides."""

    def __init__(self, distribution: Distribution, sde: SDE):
        """Join them."""
        self.distribution, self.sde, self.data_shape = distribution, sde, distribution.data_shape

    @property
    def device(self) -> torch.device:
        """That of the distribution's tensors."""
        return self.distribution.device

    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> Prediction:
        """E[x₀ | x] and E[ε | x], exactly.

        Raises:
            ValueError: for conditioning, which an exact model does not take, or a wrong shape.
        """
        if cond:
            raise ValueError(f"cond = {sorted(cond)}: an exact model takes no conditioning")
        self.check_data("x", x)
        return self.distribution.predict(x, *self._scales(x, t))

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """log p_t(x) (B,), in nats."""
        self.check_data("x", x)
        return self.distribution.log_prob(x, *self._scales(x, t))

    def divergence(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Divergence (B,) of ``velocity`` at x."""
        self.check_data("x", x)
        t = self.sde.as_time(t, x)
        alpha, sigma = self._scales(x, t)
        of_data, of_noise = self.distribution.traces(x, alpha, sigma)
        return self.sde.alpha_dot(t) * of_data + self.sde.sigma_dot(t) * of_noise / sigma

    def sample(self, n: int, t: float = 0.0, seed: int = 0) -> Tensor:
        """Draw x_t (n, *data_shape)."""
        generator = torch.Generator(self.distribution.device).manual_seed(seed)
        x0 = self.distribution.draw(n, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        return self.sde.perturb(x0, t, noise)

    def _scales(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = self.sde.as_time(t, x)
        return self.sde.alpha(t), self.sde.sigma(t)


class GaussianMixture(Distribution):
    """Σ w_k N(m_k, C_k) with full covariances."""

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor | None = None):
        """Decompose the covariances once.

        Args:
            means: (K, *data_shape).
            covariances: (K, D, D) with D the size of one example.
            weights: (K,), positive, scaled to sum to one; equal by default.

        Raises:
            ValueError: for shapes that do not agree, means that are not floating or none, weights that are not
                positive, or covariances that are not symmetric and positive semi-definite.
        """
        if means.ndim < 2 or len(means) == 0 or not means.is_floating_point():
            raise ValueError(
                f"means has shape {tuple(means.shape)}, dtype {means.dtype}: need a floating (K, *data_shape), K >= 1"
            )
        check_finite("means", means)
        components, self.data_shape = len(means), tuple(means.shape[1:])
        flat = means.flatten(1)
        dimension = flat.shape[1]
        weights = torch.full_like(flat[:, 0], 1 / components) if weights is None else weights
        if covariances.shape != (components, dimension, dimension):
            raise ValueError(
                f"covariances has shape {tuple(covariances.shape)}: need {(components, dimension, dimension)}"
            )
        if weights.shape != (components,) or not bool((weights > 0).all()):
            raise ValueError(f"weights = {weights}: need {components} positive numbers")
        check_finite("covariances", covariances)
        # In float64: the smallest eigenvalues of a float32 covariance are otherwise lost.
        eigenvalues, eigenvectors = torch.linalg.eigh(covariances.double())
        if not torch.allclose(covariances, covariances.mT) or bool((eigenvalues < -1e-6 * eigenvalues.max()).any()):
            raise ValueError("covariances: each must be symmetric and positive semi-definite")
        self.means, self.weights = flat, weights / weights.sum()
        self.eigenvalues = eigenvalues.clamp(min=0).to(flat.dtype)
        self.eigenvectors = eigenvectors.to(flat.dtype)

    def predict(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        """Each component's answer, weighted by p(k | x)."""
        rotated, variance = self._rotate(x, alpha, sigma)
        weight = torch.softmax(self._log_joint(rotated, variance), 1)
        whitened = weight[..., None] * rotated / variance
        shift = self._rotate_back(self.eigenvalues.to(x) * whitened)
        x0 = weight @ self.means.to(x) + alpha.reshape(-1, 1) * shift
        eps = sigma.reshape(-1, 1) * self._rotate_back(whitened)
        return Prediction(x0.reshape(x.shape), eps.reshape(x.shape))

    def traces(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """From the spread within components, σ² C_k S_k⁻¹, and that of their means about the mean."""
        rotated, variance = self._rotate(x, alpha, sigma)
        weight = torch.softmax(self._log_joint(rotated, variance), 1)
        eigenvalues = self.eigenvalues.to(x)
        shift = torch.einsum("kij,bkj->bki", self.eigenvectors.to(x), eigenvalues * rotated / variance)
        component_mean = self.means.to(x) + alpha.reshape(-1, 1, 1) * shift
        mean = torch.einsum("bk,bki->bi", weight, component_mean)
        within = (weight * (eigenvalues / variance).sum(-1)).sum(1)
        without = (weight * (1 / variance).sum(-1)).sum(1) * sigma.square()
        between = (weight * (component_mean - mean[:, None]).square().sum(-1)).sum(1) / sigma.square()
        return alpha * (within + between), without - alpha.square() * between

    def log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log Σ w_k N(x; α m_k, S_k)."""
        rotated, variance = self._rotate(x, alpha, sigma)
        constant = 0.5 * rotated.shape[-1] * math.log(2 * math.pi)
        return torch.logsumexp(self._log_joint(rotated, variance), 1) - constant

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.means.device

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Pick a component, then draw from it."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, device=self.device, dtype=self.means.dtype)
        x = self.means[component]
        for k, (vectors, eigenvalues) in enumerate(zip(self.eigenvectors, self.eigenvalues, strict=True)):
            rows = component == k
            x[rows] += (eigenvalues.sqrt() * z[rows]) @ vectors.T
        return x.reshape(n, *self.data_shape)

    def draw_given(self, x: Tensor, alpha: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a component from p(k | x), and then from its Gaussian posterior."""
        rotated, variance = self._rotate(x, alpha, sigma)
        weight = torch.softmax(self._log_joint(rotated, variance), 1)
        component = torch.multinomial(weight, 1, generator=generator)[:, 0]
        rows = torch.arange(len(x), device=x.device)
        rotated, share = rotated[rows, component], self.eigenvalues.to(x)[component] / variance[rows, component]
        z = torch.randn(rotated.shape, generator=generator, device=x.device, dtype=x.dtype)
        coordinates = alpha.reshape(-1, 1) * share * rotated + sigma.reshape(-1, 1) * share.sqrt() * z
        offset = torch.einsum("bij,bj->bi", self.eigenvectors.to(x)[component], coordinates)
        return (self.means.to(x)[component] + offset).reshape(x.shape)

    def _rotate(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x − α m_k in each component's eigenbasis, and the variances there; both (B, K, D)."""
        centred = x.flatten(1)[:, None] - alpha.reshape(-1, 1, 1) * self.means.to(x)
        rotated = torch.einsum("kij,bki->bkj", self.eigenvectors.to(x), centred)
        scaled = alpha.square().reshape(-1, 1, 1) * self.eigenvalues.to(x)
        return rotated, (scaled + sigma.square().reshape(-1, 1, 1)).expand_as(rotated)

    def _rotate_back(self, rotated: Tensor) -> Tensor:
        """Sum over components, each taken out of its eigenbasis; (B, K, D) to (B, D)."""
        return torch.einsum("kij,bkj->bi", self.eigenvectors.to(rotated), rotated)

    def _log_joint(self, rotated: Tensor, variance: Tensor) -> Tensor:
        """log w_k N(x; α m_k, S_k) up to the constant; (B, K)."""
        return self.weights.to(rotated).log() - 0.5 * (rotated.square() / variance + variance.log()).sum(-1)


class Gaussian(GaussianMixture):
    """N(m, C), the mixture of one."""

    def __init__(self, mean: Tensor, covariance: Tensor):
        """Set mean (*data_shape) and covariance (D, D); errors as for the mixture."""
        super().__init__(mean[None], covariance[None])


class Empirical(Distribution):
    """N equally likely points: the exact model of a data set, which generates nothing but its points."""

    def __init__(self, points: Tensor, chunk: int = 4096):
        """Keep the points.

        Args:
            points: (N, *data_shape).
            chunk: points taken at a time; memory grows with B·chunk, not with B·N.

        Raises:
            ValueError: unless points is floating, finite and has at least one, or for a chunk below 1.
        """
        if points.ndim < 2 or len(points) == 0 or not points.is_floating_point():
            raise ValueError(
                f"points has shape {tuple(points.shape)}, dtype {points.dtype}: need floating (N, *data_shape), N >= 1"
            )
        check_finite("points", points)
        if chunk < 1:
            raise ValueError(f"chunk = {chunk}: must be at least 1")
        self.points, self.chunk, self.data_shape = points.flatten(1), chunk, tuple(points.shape[1:])

    def predict(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        """The points' softmax average, and the noise that it leaves; at σ = 0, where x is a point, x and 0."""
        sigma = _not_zero(sigma)
        x0 = self._moments(x, alpha, sigma)[0].to(x.dtype).reshape(x.shape)
        return Prediction(x0, (x - expand_to(alpha, x) * x0) / expand_to(sigma, x))

    def traces(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """From the points' variance."""
        mean, square = self._moments(x, alpha, sigma)
        variance = (square - mean.square().sum(1)).clamp(min=0).to(x.dtype)
        trace = alpha * variance / sigma.square()
        return trace, self.points.shape[1] - alpha * trace

    def log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log (1/N) Σ N(x; α x⁽ⁱ⁾, σ² I); not a number at σ = 0, where there is no density."""
        total = torch.stack([torch.logsumexp(w, 1) for _, w in self._chunks(x, alpha, sigma)]).logsumexp(0)
        dimension = self.points.shape[1]
        constant = dimension * (torch.log(sigma.double()) + 0.5 * math.log(2 * math.pi)) + math.log(len(self.points))
        return (total - constant).to(x.dtype)

    def posterior_weights(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """p(i | x) (B, N), for few enough points that it fits in memory."""
        return torch.cat([w for _, w in self._chunks(x, alpha, _not_zero(sigma))], 1).softmax(1).to(x.dtype)

    @property
    def device(self) -> torch.device:
        """Where its points are."""
        return self.points.device

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points with replacement."""
        index = torch.randint(len(self.points), (n,), generator=generator, device=self.device)
        return self.points[index].reshape(n, *self.data_shape)

    def draw_given(self, x: Tensor, alpha: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        """Draw points with probabilities p(i | x), in one pass over the chunks."""
        total = x.new_full((len(x),), -math.inf, dtype=torch.float64)
        drawn = torch.zeros_like(x.flatten(1))
        for points, log_weight in self._chunks(x, alpha, _not_zero(sigma)):
            weight_here = torch.logsumexp(log_weight, 1)
            total = torch.logaddexp(total, weight_here)
            within = torch.exp(log_weight - weight_here[:, None])
            candidate = points[torch.multinomial(within, 1, generator=generator)[:, 0]].to(x)
            # The chunk's share of all weight so far: in the end every chunk has been kept with its share of all.
            u = torch.rand(len(x), generator=generator, device=x.device, dtype=torch.float64)
            drawn = torch.where((u < torch.exp(weight_here - total))[:, None], candidate, drawn)
        return drawn.reshape(x.shape)

    def _moments(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Averages of the points (B, D) and of their squared norms (B,), accumulated chunk by chunk in float64."""
        total = x.new_full((len(x),), -math.inf, dtype=torch.float64)
        mean, square = torch.zeros_like(x.flatten(1), dtype=torch.float64), torch.zeros_like(total)
        for points, log_weight in self._chunks(x, alpha, sigma):
            updated = torch.logaddexp(total, torch.logsumexp(log_weight, 1))
            weight, keep = torch.exp(log_weight - updated[:, None]), torch.exp(total - updated)
            mean = keep[:, None] * mean + weight @ points
            square = keep * square + weight @ points.square().sum(1)
            total = updated
        return mean, square

    def _chunks(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Points (C, D) with −‖x − α x⁽ⁱ⁾‖²/2σ² (B, C).

        In float64: the expanded square loses at small σ all that float32 holds, and the direct one needs (B, C, D).
        """
        flat, scale = x.flatten(1).double(), alpha.double().reshape(-1, 1)
        for points in self.points.to(flat.device).split(self.chunk):
            points = points.double()
            cross = flat @ points.T
            distance = flat.square().sum(1, keepdim=True) - 2 * scale * cross + scale.square() * points.square().sum(1)
            yield points, -distance / (2 * sigma.double().square().reshape(-1, 1))


def _not_zero(sigma: Tensor) -> Tensor:
    """σ, or for 0 the smallest number whose square is not 0: the limit in which only the nearest point counts."""
    return sigma.clamp(min=math.sqrt(torch.finfo(sigma.dtype).tiny))
