"""A multilayer perceptron for data of few dimensions, such as points in the plane.

    h_1 = A_1 [x, features(t)] + embedding of the condition
    h_{k+1} = A_{k+1} φ(h_k), k = 1 .. depth - 1
    output = A φ(h_depth)

with affine maps A and activation φ. The time features are the sinusoidal ones of `blocks`, or t itself.

The network of Nakkiran et al. ("Step-by-Step Diffusion", 2024), ReLU layers of width 128 with t as one more
input, is ``MLP((2,), width=128, depth=3, activation="relu", time_scale=1.0, embedding=0)``, reading their
"3-layer" as three hidden layers. No layer starts at zero here: without residual connections that would leave
the hidden layers without a gradient.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from sde_diffusion.networks.blocks import ConditionEmbedding, SinusoidalEmbedding, check_at_least, check_inputs

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """A network of data of any shape, flattened, called as network(x, t, label, vector)."""

    def __init__(
        self,
        data_shape: Sequence[int],
        width: int = 128,
        depth: int = 3,
        activation: str = "silu",
        time_scale: float = 1000.0,
        embedding: int = 64,
        classes: int = 0,
        out_channels: int | None = None,
        vector: int = 0,
    ) -> None:
        """Build the network.

        Args:
            data_shape: shape of one datum, for example (2,).
            width: units of each hidden layer.
            depth: number of hidden layers.
            activation: "silu", "relu", "gelu" or "tanh". A likelihood needs a smooth one, that is not "relu".
            time_scale: factor on t; 1000 suits times in [0, 1] with sinusoidal features.
            embedding: number of sinusoidal time features, even and at least 4; 0 for time_scale * t alone.
            classes: number of class labels; 0 for a network that takes none.
            out_channels: length of the output's first axis; None for that of the data.
            vector: length of the vector that each datum is conditioned on; 0 for none.

        Raises:
            ValueError: for an argument out of its range, or out_channels for data without an axis.
        """
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        check_at_least(width=(width, 1), depth=(depth, 1), classes=(classes, 0), vector=(vector, 0))
        if embedding and (embedding < 4 or embedding % 2):
            raise ValueError(f"embedding must be 0, or even and at least 4; got {embedding}")

        if out_channels is not None and (out_channels < 1 or not len(data_shape)):
            raise ValueError(f"out_channels must be at least 1, for data with an axis; got {out_channels}")

        self.data_shape, self.classes, self.vector, self.time_scale = tuple(data_shape), classes, vector, time_scale
        self.out_shape = self.data_shape if out_channels is None else (out_channels, *self.data_shape[1:])
        size = prod(self.data_shape)
        self.time_features = SinusoidalEmbedding(embedding, time_scale) if embedding else None
        self.input = nn.Linear(size + (embedding or 1), width)
        self.condition = ConditionEmbedding(classes, vector, width)
        layers: list[nn.Module] = []
        for units in [width] * (depth - 1) + [prod(self.out_shape)]:
            layers += [ACTIVATIONS[activation](), nn.Linear(width, units)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        """Data (B, *data_shape), times (B,) and conditions, where it has them, to (B, *out_shape).

        A label (B,) in [0, classes) names a class; None for the batch, or `classes` for a datum, means no label. The
        vectors are (B, vector); None means zeros.

        Raises:
            ValueError: if a shape is wrong, or for a label without classes.
        """
        check_inputs(self, x, t, label, vector)
        time = self.time_scale * t[:, None] if self.time_features is None else self.time_features(t)
        h = self.input(torch.cat([x.reshape(len(x), prod(self.data_shape)), time.to(x.dtype)], dim=1))
        return self.layers(h + self.condition(label, vector)).reshape(len(x), *self.out_shape)
