"""Rank images by likelihood, and see it fail at finding outliers: python examples/outliers.py.

Test images are compared with what is none: constant images, and test images of less contrast, blurred, upside down,
inverted or noisy. A model that knows its data might be expected to give all these less density. In fact the simplest,
constant or of little contrast, get more of it than real ones do: an area under the ROC curve below 0.5 for −log p.
Typicality asks whether a density is what those of real images are, neither lower nor higher. It tells the more, the
more images of one kind are judged together, but sees nothing that leaves the density as it is.

Two minutes on a CPU. Pictures: the least and the most likely test images, and histograms of all kinds.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d

import sde_diffusion as sd
from sde_diffusion.data import fashion_mnist
from sde_diffusion.data.pictures import image_grid
from sde_diffusion.evaluation.typicality import roc_area, typicality


def main() -> None:
    """Score all kinds of images, print the table, write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="run to load in place of the model that ships with the package")
    parser.add_argument("--count", type=int, default=24, help="images of each kind (default: %(default)s)")
    parser.add_argument("--together", type=int, default=4, help="images judged together (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of the solver (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of the solver, in nats a dimension")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and of the probes")
    parser.add_argument("--output", default="outputs/outliers.png", help="picture of the histograms")
    parser.add_argument("--ranking", default="outputs/ranking.png", help="picture of the ranked images")
    arguments = parser.parse_args()

    model = sd.load(arguments.workdir or sd.pretrained("fashion_mnist"))
    test, generator = fashion_mnist("test"), torch.Generator().manual_seed(arguments.seed)
    chosen = torch.randperm(len(test), generator=generator)[: 2 * arguments.count].tolist()
    reference, images = torch.stack([test[i][0] for i in chosen]).split(arguments.count)
    kinds = {"reference": reference, "real": images} | outliers(images, generator)
    # Good to some 0.02 bits/dim, where images differ by 1.
    options = {"probes": 2, "steps": arguments.steps, "nodes": 2, "atol": arguments.tolerance, "batch_size": 16}
    bits, seconds = {}, 0.0
    for name, codes in kinds.items():
        result = sd.bits_per_dim(model, codes, seed=arguments.seed, **options)
        bits[name], seconds = result.per_example, seconds + result.seconds
    print_table(bits, arguments.together)
    print(f"{len(kinds)} kinds of {arguments.count} images: {seconds:.0f} seconds")

    real = torch.cat([reference, images])
    order = torch.cat([bits["reference"], bits["real"]]).argsort()
    shown = min(12, len(real) // 2)
    save_ranking(real[order[:shown]], real[order[-shown:]], Path(arguments.ranking))
    save_histograms(bits, Path(arguments.output))
    print(f"wrote {Path(arguments.ranking)}: the {shown} most likely above, the {shown} least likely below")
    print(f"wrote {Path(arguments.output)}")


def outliers(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Codes (N, 1, H, W) of images that are not data, made from those that are."""
    grey = torch.linspace(0, 255, len(images)).round().to(torch.uint8)
    noisy = images + 32 * torch.randn(images.shape, generator=generator)
    blurred = avg_pool2d(images.float(), 9, stride=1, padding=4, count_include_pad=False)
    return {
        "constant": grey[:, None, None, None].expand_as(images).contiguous(),
        "quarter of the contrast": images // 4,
        "blurred, 9 x 9": blurred.round().to(torch.uint8),
        "upside down": images.flip(2),
        "inverted": 255 - images,
        "noisy": noisy.clamp(0, 255).round().to(torch.uint8),
    }


def print_table(bits: dict[str, Tensor], together: int) -> None:
    """One line a kind: its bits/dim, and how well each score finds it among the real images."""
    reference, real = bits["reference"], bits["real"]
    print("area under the ROC curve of outliers against real images, each image by itself and by the mean")
    print(f"of {together}, ± its standard error:")
    print(f"{'':24} bits/dim   −log p        typicality    typicality of {together}")
    for name, values in bits.items():
        line = f"{name:24} {float(values.mean()):8.2f}"
        if name not in ("reference", "real"):
            areas = [roc_area(real, values)]
            for size in (1, together):
                areas.append(roc_area(*(typicality(batches(v, size), reference).score for v in (real, values))))
            line += "".join(f"   {area.area:.2f} ± {area.std_error:.2f}" for area in areas)
        print(line)


def batches(values: Tensor, size: int) -> Tensor:
    """(N,) values as (N // size, size)."""
    return values[: len(values) // size * size].reshape(-1, size)


def save_ranking(most: Tensor, least: Tensor, path: Path) -> None:
    """A row of codes (N, 1, H, W) above another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(torch.cat([most, least]), columns=len(most), zoom=3).save(path)


def save_histograms(bits: dict[str, Tensor], path: Path) -> None:
    """Of each kind, below one another, with that of real images in grey behind."""
    real = torch.cat([bits["reference"], bits["real"]])
    kinds = {name: values for name, values in bits.items() if name not in ("reference", "real")}
    edges = torch.linspace(0, float(torch.cat([real, *kinds.values()]).max()) + 0.1, 31).numpy()
    figure = Figure(figsize=(6, 1.2 * len(kinds) + 0.6), layout="constrained")
    panels = figure.subplots(len(kinds), sharex=True)
    for axes, (name, values) in zip(panels, kinds.items(), strict=True):
        axes.hist(real, edges, density=True, color="silver")
        axes.hist(values, edges, density=True, histtype="step", color="crimson", linewidth=1.5)
        axes.set_title(name, fontsize=9, loc="left", pad=2)
        axes.set_yticks([])
    panels[-1].set_xlabel("bits/dim, real images in grey: less is more likely")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
