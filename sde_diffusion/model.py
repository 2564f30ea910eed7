r"""What knows the score: a model's one primitive is the pair (x̂₀, ε̂) with x = α x̂₀ + σ ε̂.

    s = −ε̂/σ                                    score
    u = α̇ x̂₀ + σ̇ ε̂                              velocity of the probability-flow ODE

A network puts out F, a combination of x₀ and ε. With x, these are two equations for the pair (α, σ at time t):

    eps      F = ε                     ε̂ = F                      x̂₀ = (x − σ F)/α            Ho et al. 2020
    x0       F = x₀                    x̂₀ = F                     ε̂ = (x − α F)/σ             Ho et al. 2020
    v        F = α ε − σ x₀            x̂₀ = (α x − σ F)/n²        ε̂ = (σ x + α F)/n²          Salimans & Ho 2022
    score    F = −ε/σ                  ε̂ = −σ F                   x̂₀ = (x + σ² F)/α           Song et al. 2021
    flow     F = α̇ x₀ + σ̇ ε            x̂₀ = (σ̇ x − σ F)/d         ε̂ = (α F − α̇ x)/d           Lipman et al. 2023
    edm      F = (σ x₀/σ_d − α σ_d ε)/n_d
                                       x̂₀ = σ_d (α σ_d x/n_d + σ F)/n_d
                                       ε̂ = (σ x/n_d − α σ_d F)/n_d                            Karras et al. 2022
    mean     F = a x₀ + b x            x̂₀ = (F − b x)/a           ε̂ = (x − α x̂₀)/σ            Ho et al. 2020, eq. 7

with n² = α² + σ², n_d² = σ² + α² σ_d² and d = α σ̇ − α̇ σ. The network of "edm" sees x/n_d and ¼ log(σ/α); in the
variables x' = x/α and σ' = σ/α its lines are that paper's c_in, c_skip, c_out and c_noise, written so that nothing
cancels at either end of time. "mean" is E[x_s | x_t] of the state at s = t − Δ, with the posterior's

    share = 1 − SNR_t/SNR_s        a = α_s share        b = (α_t/α_s) σ_s²/σ_t²        (a = 1, b = 0 for s ≤ 0)

A network with twice the channels also learns the variance of a reverse step, by its second half, in [−1, 1]:

    log σ̃² = fraction log σ²_{t+1} + (1 − fraction) log v_t        fraction = (output + 1)/2

between the two that are right for data of one point (v) and of N(0, I); Nichol & Dhariwal 2021 (arXiv:2102.09672),
equation 15. Sources: arXiv:2006.11239, 2202.00512, 2011.13456, 2210.02747, 2206.00364.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sde_diffusion.data.info import DataInfo
from sde_diffusion.sde import SDE, expand_to


class Prediction(NamedTuple):
    """The data and the noise that a model sees in x; both of x's shape (B, ...)."""

    x0: Tensor
    eps: Tensor


class VariancePrediction(Prediction):
    """The same pair, from a network that learns variances too: ``fraction``, of x's shape, is where log σ̃² lies."""

    fraction: Tensor

    def __new__(cls, x0: Tensor, eps: Tensor, fraction: Tensor) -> VariancePrediction:
        """Join the pair and the fraction, 0 for the posterior's variance and 1 for the noising one."""
        self = super().__new__(cls, x0, eps)
        self.fraction = fraction
        return self


def combination(*terms: tuple[float | Tensor, Tensor]) -> Tensor:
    """Σ factor · tensor, all of one shape, in the memory of one; factors are numbers, or () tensors."""
    (factor, tensor), *others = terms
    total = factor * tensor
    for factor, tensor in others:
        total = total + factor * tensor if isinstance(factor, Tensor) else total.add_(tensor, alpha=factor)
    return total


class Model(ABC):
    """Anything with an SDE and a ``predict``. t is () or (B,) or a number; results have x's shape (B, ...)."""

    sde: SDE
    data_shape: tuple[int, ...]
    data: DataInfo = DataInfo(bits=None)
    # Where files that belong to it are, if it came from a file.
    directory: Path | None = None

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> Prediction:
        """Estimate x₀ and ε from x at time t."""

    def coefficients(self, times: Tensor) -> dict[str, Tensor]:
        """Numbers that depend on time alone, once for a whole run: columns (N,) by name, one of them "t".

        Args:
            times: (N,) in float64, on the host.
        """
        return {"t": times}

    def predict_at(self, x: Tensor, c: SimpleNamespace, **cond: Any) -> Prediction:
        """``predict`` at a time whose coefficients c are known; c.t is a () tensor."""
        return self.predict(x, c.t, **cond)

    def combine_at(self, x: Tensor, c: SimpleNamespace, data: float, noise: float, **cond: Any) -> Tensor:
        """data x̂₀ + noise ε̂ at a time whose coefficients c are known."""
        x0, eps = self.predict_at(x, c, **cond)
        # The one that is not wanted may be infinite, at an end of time.
        if isinstance(noise, float) and noise == 0:
            return data * x0
        if isinstance(data, float) and data == 0:
            return noise * eps
        return combination((data, x0), (noise, eps))

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

    def check_time(self, name: str, t: float) -> float:
        """Return t, or raise a ValueError that names the argument if the pair is not determined there.

        It is not outside [0, T]. A network's output may not determine it where α or σ is 0.
        """
        return self.sde.check_time(name, t)

    def check_data(self, name: str, x: Tensor) -> None:
        """Raise a ValueError that names the argument unless x is a floating (B, *data_shape)."""
        if x.ndim != len(self.data_shape) + 1 or tuple(x.shape[1:]) != tuple(self.data_shape):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: need (B, {', '.join(map(str, self.data_shape))})")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}: need a floating dtype")


class Wrapped(Model):
    """A model that changes what another one predicts; a subclass defines ``predict``."""

    def __init__(self, model: Model):
        """Take the other's SDE, data, device and dtype."""
        self.model, self.sde, self.data_shape, self.data = model, model.sde, model.data_shape, model.data

    @property
    def device(self) -> torch.device:
        """That of the other."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the other."""
        return self.model.dtype

    def check_time(self, name: str, t: float) -> float:
        """As the other does."""
        return self.model.check_time(name, t)


def check_finite(name: str, x: Tensor) -> None:
    """Raise a ValueError that names the first of the examples (B, ...) that is not finite; waits for the device."""
    finite = torch.isfinite(x.flatten(1)).all(1)
    if not bool(finite.all()):
        raise ValueError(f"{name}[{int((~finite).nonzero()[0])}] holds NaN or infinite values")


class Parametrization:
    """What a network puts out at times t: its output F from the pair, and the pair from F."""

    def __init__(self, model: DiffusionModel, t: Tensor, x: Tensor):
        """Compute the coefficients for t, () or (B,), in the shape that multiplies x (B, ...)."""
        self.alpha, self.sigma = expand_to(model.sde.alpha(t), x), expand_to(model.sde.sigma(t), x)

    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is called with."""
        return x, t

    def output(self, x0: Tensor, eps: Tensor) -> Tensor:
        """F, all of x's shape."""
        raise NotImplementedError(f"{type(self).__name__} must define output(x0, eps)")

    def pair(self, output: Tensor, x: Tensor) -> Prediction:
        """The pair with α x̂₀ + σ ε̂ = x whose ``output`` this is."""
        raise NotImplementedError(f"{type(self).__name__} must define pair(output, x)")


class _Eps(Parametrization):
    def output(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps

    def pair(self, output: Tensor, x: Tensor) -> Prediction:
        return Prediction((x - self.sigma * output) / self.alpha, output)


class _X0(Parametrization):
    def output(self, x0: Tensor, eps: Tensor) -> Tensor:
        return x0

    def pair(self, output: Tensor, x: Tensor) -> Prediction:
        return Prediction(output, (x - self.alpha * output) / self.sigma)


class _V(Parametrization):
    def output(self, x0: Tensor, eps: Tensor) -> Tensor:
        return self.alpha * eps - self.sigma * x0

    def pair(self, output: Tensor, x: Tensor) -> Prediction:
        square = self.alpha.square() + self.sigma.square()
        return Prediction(
            (self.alpha * x - self.sigma * output) / square,
            (self.sigma * x + self.alpha * output) / square,
        )


class _Score(_Eps):
    def output(self, x0: Tensor, eps: Tensor) -> Tensor:
        return -eps / self.sigma

    def pair(self, output: Tensor, x: Tensor) -> Prediction:
        return super().pair(-self.sigma * output, x)


class _Flow(Parametrization):
    def __init__(self, model: DiffusionModel, t: Tensor, x: Tensor):
        super().__init__(model, t, x)
        self.alpha_dot, self.sigma_dot = expand_to(model.sde.alpha_dot(t), x), expand_to(model.sde.sigma_dot(t), x)

    def output(self, x0: Tensor, eps: Tensor) -> Tensor:
        return self.alpha_dot * x0 + self.sigma_dot * eps

    def pair(self, output: Tensor, x: Tensor) -> Prediction:
        determinant = self.alpha * self.sigma_dot - self.alpha_dot * self.sigma
        return Prediction(
            (self.sigma_dot * x - self.sigma * output) / determinant,
            (self.alpha * output - self.alpha_dot * x) / determinant,
        )


class _EDM(Parametrization):
    def __init__(self, model: DiffusionModel, t: Tensor, x: Tensor):
        super().__init__(model, t, x)
        self.sigma_data, self.log_snr = model.sigma_data, model.sde.log_snr(t)
        self.norm = torch.sqrt(self.sigma.square() + (self.sigma_data * self.alpha).square())
        self.signal, self.noise = self.sigma_data * self.alpha / self.norm, self.sigma / self.norm

    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # Infinite where α or σ is 0, which no network could take.
        return x / self.norm, (-self.log_snr / 8).clamp(-_LARGEST_C_NOISE, _LARGEST_C_NOISE)

    def output(self, x0: Tensor, eps: Tensor) -> Tensor:
        return self.noise * x0 / self.sigma_data - self.signal * eps

    def pair(self, output: Tensor, x: Tensor) -> Prediction:
        return Prediction(
            self.sigma_data * (self.signal * x / self.norm + self.noise * output),
            self.noise * x / self.norm - self.signal * output,
        )


class _Mean(_X0):
    def __init__(self, model: DiffusionModel, t: Tensor, x: Tensor):
        super().__init__(model, t, x)
        # In float64: t − Δ, and the share of the noise that is added in between, cancel.
        t = t.double()
        s = (t - model.mean_step).clamp(min=0)
        a, b = model.sde.posterior_mean(s, t)
        alpha_s = torch.where(s > 0, model.sde.alpha(s), 1.0)
        self.alpha_s, self.a, self.b = (expand_to(value.to(x), x) for value in (alpha_s, a, b))

    def output(self, x0: Tensor, eps: Tensor) -> Tensor:
        # a + b α_t = α_s: the mean of x_s given x₀ is α_s x₀.
        return self.alpha_s * x0 + self.b * self.sigma * eps

    def pair(self, output: Tensor, x: Tensor) -> Prediction:
        return super().pair((output - self.b * x) / self.a, x)


# ¼ log of float32's largest number: beyond it lie no σ/α but 0 and infinity.
_LARGEST_C_NOISE = 0.25 * math.log(torch.finfo(torch.float32).max)

PREDICTIONS: dict[str, type[Parametrization]] = {
    "eps": _Eps,
    "x0": _X0,
    "v": _V,
    "score": _Score,
    "flow": _Flow,
    "edm": _EDM,
    "mean": _Mean,
}


class DiffusionModel(nn.Module, Model):
    """A network with the SDE it is trained for, what it predicts, and the shape and range of its data.

    The network is called as ``network(x, t, **cond)`` with x (B, *data_shape) and t (B,); for "edm" it is given
    x/n_d and ¼ log(σ/α) in their place. Its output has x's shape, or twice the channels, which are the first axis
    of an example, if it learns variances. It runs in its parameters' dtype, whatever x's is.
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
        mean_step: float = 1e-3,
        learned_variance: bool = False,
    ):
        """Join network and SDE.

        Args:
            network: a module, or any function of (x, t, **cond).
            sde: the noising process.
            prediction: a key of ``PREDICTIONS``: "eps", "x0", "v", "score", "flow", "edm" or "mean".
            data_shape: shape of one example.
            data: range and bit depth of the data; the default is real-valued data.
            sigma_data: σ_d, the standard deviation of the data a dimension; only "edm" uses it.
            mean_step: Δ, how much earlier the state is that "mean" predicts, which is x₀ for t <= Δ; only "mean"
                uses it.
            learned_variance: whether the second half of the network's channels chooses a reverse step's variance.

        Raises:
            ValueError: for an unknown prediction, a sigma_data or mean_step that is not positive, or learned
                variances of data without an axis.
        """
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction = {prediction!r}: must be one of {', '.join(PREDICTIONS)}")
        for name, value in (("sigma_data", sigma_data), ("mean_step", mean_step)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: must be positive and finite")
        if learned_variance and not len(data_shape):
            raise ValueError("learned_variance = True: data_shape = () has no axis of channels to double")
        self.network, self.sde, self.prediction = network, sde, prediction
        self.data_shape, self.data = tuple(data_shape), data or DataInfo(bits=None)
        self.sigma_data, self.mean_step, self.learned_variance = float(sigma_data), float(mean_step), learned_variance

    @property
    def device(self) -> torch.device:
        """That of the network's parameters."""
        return next((p.device for p in self.parameters()), torch.get_default_device())

    @property
    def dtype(self) -> torch.dtype:
        """That of the network's parameters."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def predict(self, x: Tensor, t: Tensor | float, **cond: Any) -> Prediction:
        """Estimate x₀ and ε; keyword arguments, such as ``label``, go to the network.

        With learned variances the pair is a ``VariancePrediction``, with their ``fraction``.
        """
        self.check_data("x", x)
        t = self.sde.as_time(t, x)
        parametrization = PREDICTIONS[self.prediction](self, t, x)
        output = self._run(*parametrization.network_input(x, t), cond)
        if not self.learned_variance:
            return parametrization.pair(output, x)
        output, variance = output.chunk(2, dim=1)
        return VariancePrediction(*parametrization.pair(output, x), (variance + 1) / 2)

    def coefficients(self, times: Tensor) -> dict[str, Tensor]:
        """What the network is called with, and the pair as x̂₀ = data_x x + data_f F and ε̂ = noise_x x + noise_f F."""
        one = times.new_ones(len(times), 1)
        scale, t = PREDICTIONS[self.prediction](self, times, one).network_input(one, times)
        columns = {"t": t} | self._gains(self.prediction, times)
        return columns if bool((scale == 1).all()) else columns | {"scale": scale[:, 0]}

    def predict_at(self, x: Tensor, c: SimpleNamespace, **cond: Any) -> Prediction:
        """``predict`` at a time whose coefficients c are known."""
        output, variance = self._output_at(x, c, cond)
        x0 = combination((c.data_x, x), (c.data_f, output))
        eps = combination((c.noise_x, x), (c.noise_f, output))
        return Prediction(x0, eps) if variance is None else VariancePrediction(x0, eps, (variance + 1) / 2)

    def combine_at(self, x: Tensor, c: SimpleNamespace, data: float, noise: float, **cond: Any) -> Tensor:
        """data x̂₀ + noise ε̂, of which the factors of x and F are added up first."""
        output, _ = self._output_at(x, c, cond)
        on_x = data * c.data_x + noise * c.noise_x
        on_output = data * c.data_f + noise * c.noise_f
        return combination((on_x, x), (on_output, output))

    def _output_at(self, x: Tensor, c: SimpleNamespace, cond: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """F, and what it says of variances."""
        output = self._run(c.scale * x if hasattr(c, "scale") else x, c.t, cond)
        if not self.learned_variance:
            return output, None
        output, variance = output.chunk(2, dim=1)
        return output, variance

    def output_for(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """What the network should put out for this x₀ and ε (B, *data_shape) at t, () or (B,): the regression target.

        It is the inverse of ``predict``, and of their shape: it holds no target for learned variances.
        """
        self.check_data("x0", x0)
        self.check_data("eps", eps)
        return PREDICTIONS[self.prediction](self, self.sde.as_time(t, x0), x0).output(x0, eps)

    def check_time(self, name: str, t: float) -> float:
        """Return t, or raise a ValueError that names the argument if it is outside [0, T] or no pair follows there.

        An output cannot determine both parts of the pair where it says no more than x does: "eps" and "score" at
        α = 0, "x0" and "mean" at σ = 0.
        """
        super().check_time(name, t)
        if not self._determines(self.prediction, t):
            able = [prediction for prediction in PREDICTIONS if self._determines(prediction, t)]
            raise ValueError(
                f"{name} = {t}: prediction {self.prediction!r} does not determine x0 and eps there, at an end of "
                f"{self.sde}: need a time in [{self.sde.t_min}, {self.sde.t_max}], or one of {', '.join(able)}"
            )
        return float(t)

    def _determines(self, prediction: str, t: float) -> bool:
        """Whether the pair is finite at t, and no rounding error of x or F grows to all there is of it."""
        gains = torch.stack([*self._gains(prediction, torch.tensor([t], dtype=torch.float64)).values()])
        return bool((gains.abs() < 1 / torch.finfo(self.dtype).eps).all())

    def _gains(self, prediction: str, times: Tensor) -> dict[str, Tensor]:
        """Of x and of F in x̂₀ and ε̂, at times (N,): four columns (N,)."""
        one = times.new_ones(len(times), 1)
        parametrization = PREDICTIONS[prediction](self, times, one)
        of_x, of_output = parametrization.pair(0 * one, one), parametrization.pair(one, 0 * one)
        gains = {"data_x": of_x.x0, "noise_x": of_x.eps, "data_f": of_output.x0, "noise_f": of_output.eps}
        return {name: gain[:, 0] for name, gain in gains.items()}

    def _run(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        dtype = next(self.parameters(), x).dtype
        # A call that converts nothing still costs as much as a small operation.
        given = x if x.dtype == dtype else x.to(dtype)
        # Eight bits would not tell neighbouring times apart.
        time_dtype = dtype if dtype.itemsize >= 4 else torch.float32
        t = t if t.dtype == time_dtype else t.to(time_dtype)
        output = self.network(given, t.expand(len(x)), **cond)
        shape = (len(x), 2 * x.shape[1], *x.shape[2:]) if self.learned_variance else x.shape
        if output.shape != shape:
            raise ValueError(f"network returned shape {tuple(output.shape)}: must be {tuple(shape)}")
        return output if output.dtype == x.dtype else output.to(x.dtype)


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


def take_cond(cond: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """The conditioning of rows (n,) of a batch: tensors that belong to its examples are indexed, other values kept."""
    return {name: value[rows] if isinstance(value, Tensor) and value.ndim else value for name, value in cond.items()}


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
