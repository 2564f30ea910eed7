"""Draw a diffusion and its reversals over the exact density: python examples/theory_reverse.py.

A mixture of two Gaussians on the line under the cosine SDE. Left, paths of the forward SDE; then the reverse SDE with
all of its noise (η = 1), with half of it, and without (the probability-flow ODE). All four have the same density at
every time, which is the shading; the paths do not.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import sde_diffusion as sd
from sde_diffusion.exact import ExactModel


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", type=int, default=12, help="paths drawn")
    parser.add_argument("--steps", type=int, default=500, help="steps of a path")
    parser.add_argument("--output", default="outputs/theory_reverse.png", help="file to write")
    arguments = parser.parse_args()

    means = torch.tensor([[-1.0], [1.2]], dtype=torch.float64)
    covariances = torch.tensor([[[0.02]], [[0.06]]], dtype=torch.float64)
    model = sd.GaussianMixture(means, covariances, torch.tensor([0.4, 0.6], dtype=torch.float64)).under(
        sd.CosineVPSDE()
    )
    panels = [("forward SDE", forward(model, arguments.paths, arguments.steps))]
    for title, eta in (("reverse SDE, η = 1", 1.0), ("η = ½", 0.5), ("ODE, η = 0", 0.0)):
        panels.append((title, backward(model, arguments.paths, arguments.steps, eta)))

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), sharey=True, layout="constrained")
    times, places = torch.linspace(0, 0.99, 200, dtype=torch.float64), torch.linspace(-3, 3, 200, dtype=torch.float64)
    density = torch.stack([model.log_prob(places[:, None], t).exp() for t in times], 1)
    for axis, (title, (t, x)) in zip(axes, panels, strict=True):
        axis.imshow(density.sqrt(), origin="lower", extent=(0, 0.99, -3, 3), aspect="auto", cmap="Blues")
        axis.plot(t, x, linewidth=0.7, color="black", alpha=0.6)
        axis.set_title(title)
        axis.set_xlabel("t")
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=80)
    print(f"{arguments.paths} paths of {arguments.steps} steps; see {output}")


def forward(model: ExactModel, paths: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Times and states of the noising process, step by step through its chain."""
    chain = model.sde.discretize(steps)
    generator = torch.Generator().manual_seed(1)
    states = [model.sample(paths, seed=1)]
    for scale, std in zip(chain.scales, chain.stds, strict=True):
        noise = torch.randn(paths, 1, generator=generator, dtype=torch.float64)
        states.append(scale * states[-1] + std * noise)
    return chain.times, torch.stack(states)[..., 0]


def backward(model: ExactModel, paths: int, steps: int, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Times and states from noise to data, by Euler-Maruyama."""
    out = sd.sample(model, paths, solver="em", eta=eta, steps=steps, trajectory=True, dtype=torch.float64, seed=2)
    assert out.trajectory is not None
    return torch.tensor(out.times), out.trajectory[..., 0]


if __name__ == "__main__":
    main()
