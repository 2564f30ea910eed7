"""Make the slice of Fashion-MNIST in the package: python scripts/embed_fashion_mnist.py SOURCE_FOLDER.

SOURCE_FOLDER holds the four original idx files, as in the Debian package dataset-fashion-mnist. The first
10,000 training and 2,000 test images go, with their labels, to sde_diffusion/data/fashion_mnist_slice/. Run
it from the checkout's root with the package importable (pip install -e . or PYTHONPATH=.).
"""

import argparse
from pathlib import Path

from sde_diffusion.data.fashion_mnist import SLICE_FOLDER
from sde_diffusion.data.idx import read_idx, write_idx

COUNTS = {"train": 10_000, "t10k": 2_000}
TARGET = Path(__file__).parents[1] / "sde_diffusion" / "data" / SLICE_FOLDER


def main() -> None:
    """Read the command line, write the four files and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source_folder", type=Path)
    source = parser.parse_args().source_folder
    TARGET.mkdir(exist_ok=True)
    for prefix, count in COUNTS.items():
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{prefix}-{kind}-ubyte.gz"
            write_idx(TARGET / name, read_idx(source / name)[:count])
            print(f"{name}: {(TARGET / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
