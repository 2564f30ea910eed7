r"""What knows the score: a model's one primitive is the pair (x̂₀, ε̂) with x = α x̂₀ + σ ε̂.

    s = −ε̂/σ                                    score
    u = α̇ x̂₀ + σ̇ ε̂                              velocity of the probability-flow ODE

A network puts out one of these, and the pair follows (α, σ at time t):

    eps      ε̂ = F                               x̂₀ = (x − σ F)/α              Ho et al. 2020
    x0       x̂₀ = F                              ε̂ = (x − α F)/σ
    v        x̂₀ = (α x − σ F)/(α² + σ²)          ε̂ = (σ x + α F)/(α² + σ²)     Salimans & Ho 2022
    score    ε̂ = −σ F                            x̂₀ = (x + σ² F)/α             Song et al. 2021
    edm      x̂₀ = α σ_d² x/n² + σ σ_d F/n        ε̂ = σ x/n² − α σ_d F/n        Karras et al. 2022

with n² = σ² + α² σ_d² in the last, whose network sees x/n and ¼ log(σ/α). In the variables x' = x/α and σ' = σ/α
these are that paper's c_in, c_skip, c_out and c_noise; written this way nothing cancels at either end of time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sde_diffusion.data.info import DataInfo
from sde_diffusion.sde import SDE, expand_to


class Prediction(NamedTuple):
    """The data and the noise that a model sees in x; both of x's shape (B, ...)."""

    x0: Tensor
    eps: Tensor


class Model(ABC):
    """Anything with an SDE and a ``predict``. t is () or (B,) or a number; results have x's shape (B, ...)."""

    sde: SDE
    data_shape: tuple[int, ...]
    data: DataInfo = DataInfo(bits=None)

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> Prediction:
        """Estimate x₀ and ε from x at time t."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.get_default_device()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in by default."""
        return torch.get_default_dtype()

    def denoise(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """x̂₀, the estimate of E[x₀ | x_t = x]."""
        return self.predict(x, t, **cond).x0

    def eps(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """ε̂, the estimate of E[ε | x_t = x]."""
        return self.predict(x, t, **cond).eps

    def score(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """−ε̂/σ, the estimate of ∇ log p_t(x)."""
        return -self.eps(x, t, **cond) / expand_to(self.sde.sigma(self.sde.as_time(t, x)), x)

    def velocity(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """α̇ x̂₀ + σ̇ ε̂, the right-hand side dx/dt of the probability-flow ODE."""
        return self.sde.reverse(self, eta=0.0).drift(x, t, **cond)

    def check_data(self, name: str, x: Tensor) -> None:
        """Raise a ValueError that names the argument unless x is a floating (B, *data_shape)."""
        if x.ndim != len(self.data_shape) + 1 or tuple(x.shape[1:]) != tuple(self.data_shape):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: need (B, {', '.join(map(str, self.data_shape))})")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}: need a floating dtype")


def check_finite(name: str, x: Tensor) -> None:
    """Raise a ValueError that names the first of the examples (B, ...) that is not finite; waits for the device."""
    finite = torch.isfinite(x.flatten(1)).all(1)
    if not bool(finite.all()):
        raise ValueError(f"{name}[{int((~finite).nonzero()[0])}] holds NaN or infinite values")


def _from_eps(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    return Prediction((x - sigma * output) / alpha, output)


def _from_x0(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    return Prediction(output, (x - alpha * output) / sigma)


def _from_v(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    square = alpha.square() + sigma.square()
    return Prediction((alpha * x - sigma * output) / square, (sigma * x + alpha * output) / square)


def _from_score(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    return _from_eps(-sigma * output, x, alpha, sigma)


_FROM_OUTPUT: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Prediction]] = {
    "eps": _from_eps,
    "x0": _from_x0,
    "v": _from_v,
    "score": _from_score,
}
PREDICTIONS = (*_FROM_OUTPUT, "edm")


class DiffusionModel(nn.Module, Model):
    """A network with the SDE it is trained for, what it predicts, and the shape and range of its data.

    The network is called as ``network(x, t, **cond)`` with x (B, *data_shape) and t (B,); for "edm" it is given x/n
    and ¼ log(σ/α) in their place. Its output has x's shape. It runs in its parameters' dtype, whatever x's is.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        sde: SDE,
        prediction: str = "edm",
        *,
        data_shape: Sequence[int],
        data: DataInfo | None = None,
        sigma_data: float = 0.5,
    ):
        """Join network and SDE.

        Args:
            network: a module, or any function of (x, t, **cond).
            sde: the noising process.
            prediction: one of "eps", "x0", "v", "score", "edm".
            data_shape: shape of one example.
            data: range and bit depth of the data; the default is real-valued data.
            sigma_data: σ_d, the standard deviation of the data a dimension; only "edm" uses it.

        Raises:
            ValueError: for an unknown prediction or a sigma_data that is not positive.
        """
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction = {prediction!r}: must be one of {', '.join(PREDICTIONS)}")
        if not sigma_data > 0:
            raise ValueError(f"sigma_data = {sigma_data}: must be positive")
        self.network, self.sde, self.prediction = network, sde, prediction
        self.data_shape, self.data = tuple(data_shape), data or DataInfo(bits=None)
        self.sigma_data = float(sigma_data)

    @property
    def device(self) -> torch.device:
        """That of the network's parameters."""
        return next((p.device for p in self.parameters()), torch.get_default_device())

    @property
    def dtype(self) -> torch.dtype:
        """That of the network's parameters."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> Prediction:
        """Estimate x₀ and ε; keyword arguments, such as ``label``, go to the network."""
        self.check_data("x", x)
        t = self.sde.as_time(t, x)
        alpha, sigma = expand_to(self.sde.alpha(t), x), expand_to(self.sde.sigma(t), x)
        if self.prediction != "edm":
            return _FROM_OUTPUT[self.prediction](self._run(x, t, cond), x, alpha, sigma)
        norm = torch.sqrt(sigma.square() + (self.sigma_data * alpha).square())
        output = self._run(x / norm, -self.sde.log_snr(t) / 8, cond)
        signal, noise = self.sigma_data * alpha / norm, sigma / norm
        return Prediction(
            self.sigma_data * (signal * x / norm + noise * output),
            noise * x / norm - signal * output,
        )

    def _run(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        parameter = next(self.parameters(), x)
        output = self.network(x.to(parameter.dtype), t.to(parameter.dtype).expand(len(x)), **cond)
        if output.shape != x.shape:
            raise ValueError(f"network returned shape {tuple(output.shape)}: must be that of x, {tuple(x.shape)}")
        return output.to(x.dtype)


def slice_cond(
    cond: Mapping[str, Any] | None, n: int, indices: range, device: torch.device | None = None
) -> dict[str, Any]:
    """The part of the conditioning for examples ``indices`` of n: tensors are cut and moved, other values kept.

    Raises:
        ValueError: for a tensor whose length is not n.
    """
    batch = {}
    for name, value in (cond or {}).items():
        if isinstance(value, Tensor) and value.ndim:
            if len(value) != n:
                raise ValueError(f"cond[{name!r}] has length {len(value)}: must be {n}, one for each example")
            value = value[indices.start : indices.stop].to(device)
        batch[name] = value
    return batch


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model in evaluation mode, without dropout, and every part of it back in its own mode after."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
