"""Train a small model on real images, sample from it and score test images: what `make demo` runs."""

import time
from pathlib import Path

import torch

import sde_diffusion as sd
from sde_diffusion.data import fashion_mnist
from sde_diffusion.data.pictures import save_picture

ROOT = Path(__file__).parent.parent
WORKDIR = ROOT / "runs" / "demo"


def main() -> None:
    """Train configs/demo.py (or find it trained), draw 64 samples by ODE, print bits/dim of 8 test images."""
    started = time.perf_counter()
    config = sd.load_config_file(ROOT / "configs" / "demo.py")
    config.workdir = str(WORKDIR)
    result = sd.train(config, callbacks=[report])
    parameters = sum(p.numel() for p in result.model.parameters())
    print(f"{result.step} steps of {config.train.batch_size} images, {parameters / 1e6:.2f} M parameters")

    drawn = sd.sample(result.model, 64, solver="ode", rtol=1e-3, atol=1e-3)
    picture = WORKDIR / "samples.png"
    save_picture(drawn.samples, result.model.data, picture)
    print(f"64 samples by ODE: nfe {drawn.nfe}, {drawn.seconds:.0f} seconds; see {picture.relative_to(ROOT)}")

    test = fashion_mnist("test")
    images = torch.stack([test[i][0] for i in range(8)])
    bits = sd.bits_per_dim(result.model, images)
    print(f"bits/dim of 8 test images: {bits.mean:.3f} ± {bits.std_error:.4f} (probes), solver {bits.solver_error:.4f}")
    print(f"  ± {bits.sampling_error:.3f} from one image to another; density at t_min = {bits.t_min:.1e}")
    print(f"all in {time.perf_counter() - started:.0f} seconds")


def report(result: sd.TrainResult) -> None:
    """Print a line of metrics, for a terminal that shows no progress bar."""
    line = result.metrics
    print(f"step {result.step}: loss {line['loss']:.3f}, {line['images_per_second']:.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
