"""Draw what each SDE does to the data: python examples/theory_marginals.py.

Over the time t/T: the scale α of the data and σ of the noise, both in units of √(α² + σ²), the log-SNR, and the noise
level g √T. Every SDE goes from data to noise through the same states; they differ in when.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import sde_diffusion as sd


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="outputs/theory_marginals.png", help="file to write")
    output = Path(parser.parse_args().output)
    sdes = [
        sd.VPSDE(),
        sd.SubVPSDE(),
        sd.CosineVPSDE(),
        sd.VESDE(),
        sd.EDMSDE(),
        sd.ConstantVESDE(),
        sd.FlowSDE(),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for sde in sdes:
        t = torch.linspace(0, 1, 400, dtype=torch.float64) * (sde.t_max - sde.t_min) + sde.t_min
        norm = torch.sqrt(sde.alpha(t) ** 2 + sde.sigma(t) ** 2)
        curves = (sde.alpha(t) / norm, sde.sigma(t) / norm, sde.log_snr(t), sde.diffusion(t) * sde.T**0.5)
        for axis, curve in zip(axes, curves, strict=True):
            axis.plot(t / sde.T, curve, label=type(sde).__name__)
    for axis, title in zip(axes, ("α/n: data", "σ/n: noise", "log-SNR", "g √T"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("t/T")
    axes[3].set_yscale("log")
    axes[0].legend(fontsize=7)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    print(f"{len(sdes)} SDEs; see {output}")


if __name__ == "__main__":
    main()
