"""Images to feature vectors in which distances mean something: the penultimate layer of a small classifier.

    image (1, 28, 28) -> conv 32 -> pool -> conv 64 -> pool -> linear 64 = features -> relu, linear = class scores

scaled so that the features of the training images have a mean square of 1.

Pixels are a poor space to compare distributions in: a shift by one pixel is far, a blur near. What a classifier keeps
just before it decides is nearer to what an image shows. A distance between features is comparable with others of the
same network only.

Sources: Heusel et al. 2017 (arXiv:1706.08500) and Bińkowski et al. 2018 (arXiv:1801.01401), who use Inception's
features of photographs; the latter also a small classifier's of digits, as here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.data.datasets import ArrayDataset
from sde_diffusion.storage import CheckpointError, Contents, StoredTensors, fill

FEATURES = ("fashion_mnist",)
_HEADER = "sde_diffusion_features"
# Samples overshoot the range, by half of it at times, and a picture file would clip them; 0 to 255 is a mistake.
_LARGEST = 10.0


class FeatureNetwork(nn.Module):
    """A classifier of grey images of 28 x 28, called for its features.

    Attributes:
        name: what results call the feature space.
        data_shape: (1, 28, 28).
        dimension: length of a feature vector.
    """

    data_shape = (1, 28, 28)

    def __init__(self, name: str = "fashion_mnist", classes: int = 10, dimension: int = 64) -> None:
        """Build it with fresh weights, from torch's global random numbers."""
        super().__init__()
        self.name, self.dimension = name, dimension
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.last = nn.Linear(64 * 7 * 7, dimension)
        self.head = nn.Linear(dimension, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) in [-1, 1] to features (B, dimension); what overshoots is clipped.

        Raises:
            ValueError: for another shape or dtype, or values that are NaN, or so large that the range is another.
        """
        if images.shape[1:] != self.data_shape or not images.is_floating_point():
            raise ValueError(
                f"images must be floats (B, {', '.join(map(str, self.data_shape))}) in [-1, 1]; got {images.dtype}, "
                f"shape {tuple(images.shape)}; DataInfo().points(codes) converts uint8"
            )
        if len(images) and not float(images.abs().max()) <= _LARGEST:
            raise ValueError(
                f"images must be in [-1, 1]; got values from {float(images.min())} to {float(images.max())}"
            )
        return self.last(self.body(images.clamp(-1, 1).to(self.last.weight.dtype)))

    def classify(self, images: Tensor) -> Tensor:
        """Images as for ``forward`` to class scores (B, classes), the logarithms of probabilities up to a constant."""
        return self.head(F.relu(self(images)))


def load_features(
    name: str | os.PathLike[str] = "fashion_mnist", device: torch.device | str | None = None
) -> FeatureNetwork:
    """A trained feature network, in evaluation mode.

    Args:
        name: One of ``FEATURES``, which ship with the package, or a file that ``save_features`` wrote.
        device: Where to put it.

    Raises:
        ValueError: for a name that is neither.
        CheckpointError: if the file is damaged or of another kind.
    """
    path = Path(__file__).with_name(f"{name}.safetensors") if name in FEATURES else Path(name)
    if not path.is_file():
        raise ValueError(f"name = {str(name)!r}: must be one of {', '.join(FEATURES)}, or a file of save_features")
    stored = StoredTensors(path)
    try:
        description = json.loads(stored.header[_HEADER])
        # Its first weights are overwritten, so that drawing them is no reason to disturb the user's random numbers.
        with torch.random.fork_rng([]):
            network = FeatureNetwork(description["name"], description["classes"], description["dimension"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header describes no feature network of this library") from error
    fill(network, stored)
    return network.to(device).eval().requires_grad_(False)


def save_features(network: FeatureNetwork, path: str | os.PathLike[str], **about: Any) -> None:
    """Write a feature network as safetensors, with a header that says how to rebuild it.

    Args:
        network: What to write.
        path: Where to, ending in .safetensors.
        **about: JSON values that say more of it, such as what it was trained on.
    """
    description = {
        "name": network.name,
        "classes": network.head.out_features,
        "dimension": network.dimension,
        **about,
    }
    Contents(network.state_dict(), {_HEADER: json.dumps(description)}).write(Path(path))


@torch.no_grad()
def extract_features(images: Tensor, features: Callable[[Tensor], Tensor], batch_size: int = 500) -> Tensor:
    """Features of many images, a batch at a time.

    Args:
        images: (N, *data_shape) in the model's range, N >= 1.
        features: A network in evaluation mode, or any function, from (B, *data_shape) to (B, D).
        batch_size: Images a call.

    Returns:
        (N, D) float64, in which means and covariances are to be taken.

    Raises:
        ValueError: if there are no images, or features returns another shape.
    """
    if not len(images):
        raise ValueError("images must not be empty")
    vectors = torch.cat([features(batch) for batch in images.split(batch_size)])
    if vectors.ndim != 2 or len(vectors) != len(images):
        raise ValueError(f"features must return (B, D) for B images; got {tuple(vectors.shape)} for {len(images)}")
    return vectors.double()


def train_features(
    dataset: ArrayDataset,
    *,
    epochs: int = 5,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    seed: int = 0,
    callback: Callable[[int, float], None] | None = None,
) -> FeatureNetwork:
    """Train a classifier from scratch: cross-entropy, Adam, a learning rate that rises for a third and falls to zero.

    In the end the features are scaled to a mean square of 1, and the head undoes it. The same seed gives the same
    weights on the same machine with the same number of threads.

    Args:
        dataset: Labelled grey images of 28 x 28, as codes.
        epochs: Passes over them.
        batch_size: Images a step.
        learning_rate: At its peak.
        seed: Of the first weights and the order of the images.
        callback: Called after each epoch with the number of epochs done and the mean loss of the last.

    Raises:
        ValueError: for images without labels.
    """
    if dataset.labels is None:
        raise ValueError(f"dataset {dataset.name!r} has no labels: a classifier needs them")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = FeatureNetwork(dataset.name, dataset.classes)
        orders = [torch.randperm(len(dataset)).split(batch_size) for _ in range(epochs)]
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * len(orders[0]))
    for epoch, order in enumerate(orders, start=1):
        total = torch.zeros(())
        for indices in order:
            scores = network.classify(dataset.data.points(dataset.values[indices]))
            loss = F.cross_entropy(scores, dataset.labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(indices)
        if callback is not None:
            callback(epoch, float(total) / len(dataset))
    _normalise(network, dataset.data.points(dataset.values))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def _normalise(network: FeatureNetwork, images: Tensor) -> None:
    scale = extract_features(images, network).square().mean().sqrt().float()
    for parameter in network.last.parameters():
        parameter.div_(scale)
    # The rectifier between the two lets a factor through.
    network.head.weight.mul_(scale)


@torch.no_grad()
def accuracy(network: FeatureNetwork, dataset: ArrayDataset, batch_size: int = 500) -> float:
    """The fraction of labelled images that the network classifies rightly.

    Raises:
        ValueError: for images without labels.
    """
    if dataset.labels is None:
        raise ValueError(f"dataset {dataset.name!r} has no labels to compare with")
    images = dataset.data.points(dataset.values)
    classes = torch.cat([network.classify(batch).argmax(dim=1) for batch in images.split(batch_size)])
    return float((classes == dataset.labels).double().mean())
