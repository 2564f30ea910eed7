r"""The discrete chain x_t = λ_t x_{t−1} + σ_t ε, t = 1…T, of DDPM and its exact posteriors.

    λ_{t|0} = λ_t λ_{t−1|0}      σ²_{t|0} = λ_t² σ²_{t−1|0} + σ_t²        (λ_{0|0} = 1, σ_{0|0} = 0)
    q(x_t | x_{t+1}, x₀) = N(a_t x₀ + b_t x_{t+1}, v_t I)
    a_t = λ_{t|0} σ²_{t+1}/σ²_{t+1|0}    b_t = λ_{t+1} σ²_{t|0}/σ²_{t+1|0}    v_t = σ²_{t|0} σ²_{t+1}/σ²_{t+1|0}

λ_t and σ_t belong to one step of the chain; α and σ of an SDE to a time. Source: Ho et al. 2020 (arXiv:2006.11239),
section 2, for any λ_t and σ_t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sde_diffusion.sde import SDE


class GaussianChain:
    """A chain of T steps, its marginals and posteriors, all in float64.

    Attributes:
        scales, stds: λ_t and σ_t, t = 1…T, (T,) each.
        marginal_scales, marginal_stds: λ_{t|0} and σ_{t|0}, t = 0…T, (T + 1,) each.
    """

    def __init__(self, scales: Tensor, stds: Tensor):
        """Compute the marginals.

        Raises:
            ValueError: unless both are (T,) with T >= 1, 0 <= λ_t <= 1 and σ_t > 0.
        """
        if scales.ndim != 1 or scales.shape != stds.shape or len(scales) == 0:
            raise ValueError(f"scales and stds have shapes {tuple(scales.shape)}, {tuple(stds.shape)}: need (T,) twice")
        if not bool(((scales >= 0) & (scales <= 1)).all()):
            raise ValueError(f"scales are in [{scales.min()}, {scales.max()}]: must be in [0, 1]")
        if not bool((stds > 0).all()):
            raise ValueError(f"stds has smallest entry {stds.min()}: must be positive")
        self.scales, self.stds = scales.double(), stds.double()
        self.marginal_scales = torch.cat([self.scales.new_ones(1), self.scales.cumprod(0)])
        variances = [self.scales.new_zeros(())]
        for scale, std in zip(self.scales, self.stds, strict=True):
            variances.append(scale.square() * variances[-1] + std.square())
        self.marginal_stds = torch.stack(variances).sqrt()

    @classmethod
    def from_sde(cls, sde: SDE, steps: int | Sequence[float]) -> GaussianChain:
        """The chain with the SDE's marginals at given increasing times, or at ``steps`` equal steps up to t_max.

        Raises:
            ValueError: for steps below 1, or times that do not increase or are outside [0, T].
        """
        if isinstance(steps, int):
            if steps < 1:
                raise ValueError(f"steps = {steps}: must be at least 1")
            steps = [sde.t_max * i / steps for i in range(1, steps + 1)]
        times = torch.tensor([sde.check_time("steps", t) for t in steps], dtype=torch.float64)
        if len(times) == 0 or not bool((times[1:] > times[:-1]).all()):
            raise ValueError(f"steps = {list(steps)}: must be at least one time, in increasing order")
        alpha = torch.cat([times.new_ones(1), sde.alpha(times)])
        variance = torch.cat([times.new_zeros(1), sde.sigma(times).square()])
        scales = alpha[1:] / alpha[:-1]
        return cls(scales, torch.sqrt(variance[1:] - scales.square() * variance[:-1]))

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.scales)

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """a_t, b_t and v_t for t = 0…T−1, (T,) each; (1, 0, 0) at t = 0."""
        variance = self.marginal_stds.square()
        share = self.stds.square() / variance[1:]
        return (
            self.marginal_scales[:-1] * share,
            self.scales * variance[:-1] / variance[1:],
            variance[:-1] * share,
        )
