"""Variance of the likelihood-weighted loss by how its times are drawn: python benchmarks/loss_variance.py.

The predictor is the exact one of the 2-D mixture, put off by a tenth in five directions that stand for parameters.
The mean is that of independent uniform times for every row; the standard error says how far from it chance alone
would bring it. The ratios compare the variance of a batch's loss, and the summed variances of its gradient, with those
of independent uniform times, larger being better.

Uniform times see a few enormous losses just above t_min, which a direct estimate of their variance misses. So for
independent times of density p it is computed from draws by importance: E_p[(L/p)²] = E_q[(L/p)² p/q].
"""

import argparse
from collections.abc import Callable

import torch
from mixtures import ring
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.losses import SPREADS, Importance, LossSecondMoment, TimeSampler, Uniform, denoising_loss

MIXTURE = ring()
DIRECTIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, log_snr: torch.ones_like(x),
    lambda x, log_snr: x,
    lambda x, log_snr: torch.sin(3 * x),
    lambda x, log_snr: torch.sigmoid(log_snr) * x,
    lambda x, log_snr: torch.sigmoid(-log_snr) * torch.cos(x),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()
    print("| SDE | times | spread | mean loss, nats/dim | std error | 1/variance of loss | 1/variance of gradient |")
    print("|---|---|---|---|---|---|---|")
    for sde in (sd.VPSDE(), sd.SubVPSDE(), sd.VESDE(), sd.CosineVPSDE(), sd.FlowSDE()):
        report(sde, arguments.batches, arguments.batch_size)


def report(sde: sd.SDE, batches: int, batch_size: int) -> None:
    """Print the rows of one SDE."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(batches, batch_size, generator=generator, dtype=torch.float64)
    t, weight = Importance(sde).draw(u.flatten())
    # Loss and slopes (N, 6) at times of density q, and the density of uniform times over q.
    values = losses_and_slopes(sde, t, generator)
    samplers = {"uniform": Uniform(sde), "importance": Importance(sde), "loss_second_moment": learnt(sde, generator)}
    reference = torch.ones(6)
    for name, sampler in samplers.items():
        # The sampler's own weight, uniform density over p.
        own = weight if name == "importance" else weight_at(sampler, t)
        mean = (weight[:, None] * values).mean(0)
        variance = ((weight * own)[:, None] * values.square()).mean(0) - mean.square()
        reference = variance if name == "uniform" else reference
        drawn, drawn_weight = sampler.draw(torch.rand(len(t), generator=generator, dtype=torch.float64))
        direct = (drawn_weight * losses_and_slopes(sde, drawn, generator)[:, 0]).mean()
        row(sde, name, "independent", direct, variance, reference, len(t))
    for name in ("stratified", "antithetic"):
        t, weight = Importance(sde).draw(torch.stack([SPREADS[name](batch) for batch in u]).flatten())
        values = weight[:, None] * losses_and_slopes(sde, t, generator)
        means = values.reshape(batches, batch_size, -1).mean(1)
        row(sde, "importance", name, values[:, 0].mean(), batch_size * means.var(0), reference, len(t))


def row(sde: sd.SDE, times: str, spread: str, mean: Tensor, variance: Tensor, reference: Tensor, count: int) -> None:
    """Print one row from the variances (6,) of an example's loss and slopes, or those of a batch times its size."""
    error, gradient = (variance[0] / count).sqrt(), reference[1:].sum() / variance[1:].sum()
    ratio = reference[0] / variance[0]
    print(f"| {type(sde).__name__} | {times} | {spread} | {mean:.3f} | {error:.3f} | {ratio:.1f} | {gradient:.1f} |")


def losses_and_slopes(sde: sd.SDE, t: Tensor, generator: torch.Generator) -> Tensor:
    """Likelihood-weighted losses and their slopes by each direction (N, 6), at times (N,), for fresh data and noise."""
    x0 = MIXTURE.draw(len(t), generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    x = sde.perturb(x0, t, noise)
    exact, log_snr = MIXTURE.under(sde).eps(x, t), sde.log_snr(t)[:, None]
    scaled = x / torch.sqrt(sde.alpha(t).square() + sde.sigma(t).square())[:, None]
    features = torch.stack([direction(scaled, log_snr) for direction in DIRECTIONS])

    def losses(theta: Tensor) -> tuple[Tensor, Tensor]:
        eps = exact + torch.einsum("k,kbd->bd", theta, features)
        model = sd.DiffusionModel(lambda x, t: eps, sde, "eps", data_shape=(2,))
        value = denoising_loss(model, x0, t, noise, "likelihood")
        return value, value

    slopes, value = torch.func.jacfwd(losses, has_aux=True)(torch.full((len(DIRECTIONS),), 0.1, dtype=x.dtype))
    return torch.cat([value[:, None], slopes], 1)


def learnt(sde: sd.SDE, generator: torch.Generator, steps: int = 100) -> LossSecondMoment:
    """A sampler after ``steps`` steps of 1000 examples."""
    sampler = LossSecondMoment(sde)
    for _ in range(steps):
        t, _ = sampler.draw(torch.rand(1000, generator=generator, dtype=torch.float64))
        sampler.update(t, losses_and_slopes(sde, t, generator)[:, 0])
    return sampler


def weight_at(sampler: TimeSampler, t: Tensor) -> Tensor:
    """Uniform density over the sampler's (N,), at given times."""
    if not isinstance(sampler, LossSecondMoment):
        return torch.ones_like(t)
    p = sampler.probabilities()
    share = (t - sampler.sde.t_min) / (sampler.sde.t_max - sampler.sde.t_min)
    return 1 / (len(p) * p[(len(p) * share).long().clamp(0, len(p) - 1)])


if __name__ == "__main__":
    main()
