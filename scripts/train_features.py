"""Train the feature network that ships with the package: SDE_DIFFUSION_DATA=FOLDER python scripts/train_features.py.

FOLDER holds the four original idx files of Fashion-MNIST; without it, the slice in the package is trained on. Writes
sde_diffusion/evaluation/fashion_mnist.safetensors, or --output. The weights are the same bit by bit only on
the same kind of processor with one thread (OMP_NUM_THREADS=1).
"""

import argparse
from pathlib import Path

from sde_diffusion.data import fashion_mnist
from sde_diffusion.evaluation.features import accuracy, save_features, train_features

TARGET = Path(__file__).parents[1] / "sde_diffusion" / "evaluation" / "fashion_mnist.safetensors"


def main() -> None:
    """Read the command line, train, write the weights and print the accuracy on the test images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    train, test = fashion_mnist("train"), fashion_mnist("test")
    network = train_features(
        train,
        epochs=arguments.epochs,
        seed=arguments.seed,
        callback=lambda epoch, loss: print(f"epoch {epoch}: mean loss {loss:.4f}", flush=True),
    )
    correct = accuracy(network, test)
    save_features(
        network,
        arguments.output,
        trained_on=f"{len(train)} training images of Fashion-MNIST, {arguments.epochs} epochs, seed {arguments.seed}",
        test_accuracy=correct,
        test_images=len(test),
    )
    print(f"{100 * correct:.2f} % of {len(test)} test images right; wrote {arguments.output}")


if __name__ == "__main__":
    main()
