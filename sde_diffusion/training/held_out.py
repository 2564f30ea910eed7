r"""How good a model is while it is trained: measurements on data that it is not trained on, and when to stop.

    held-out loss     the training objective, with times, noise and dequantisation that never change

        (1/n) Σ w_i loss(x_i, t_i, ε_i)         t_i, w_i from u_i = (π(i) + ½)/n,  π a fixed permutation

    loss at a level   its unweighted mean at one log-SNR, in the middle of each of K equal cells of
                      [log-SNR(t_max), log-SNR(t_min)]
    likelihood        −log p a dimension, by the probability-flow ODE (``sde_diffusion.likelihood``)
    Fréchet distance  of the features of n samples to those of the training data (``sde_diffusion.evaluation``)

As nothing is drawn anew, the numbers of two evaluations differ by their weights alone, and their difference is far more
accurate than either number. The levels do not depend on how training draws its times: they compare runs whose
objectives differ in that. A sampler of times that learns would make the objective another at every step; its weighted
mean is that of uniform times, which are taken in its place.

Early stopping: a run ends when as many evaluations in a row as it has patience for have not gone below the smallest
held-out loss before them.

Ranks share examples and samples, and meet only to add up: no number depends on how many there are, but for rounding.

Sources: one time in each part of their distribution, Kingma et al. 2021 (arXiv:2107.00630); patience, Goodfellow et al.
2016 ("Deep Learning"), algorithm 7.1; Fréchet distances of samples, Heusel et al. 2017 (arXiv:1706.08500).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.utils.data import default_collate

from sde_diffusion.data.datasets import DataSource
from sde_diffusion.evaluation import (
    FEATURES,
    DatasetResult,
    FeatureNetwork,
    Moments,
    extract_features,
    gaussian_frechet,
    likelihood_measure,
    load_features,
)
from sde_diffusion.losses import Importance, TimeSampler, Uniform, Weighting, denoising_loss
from sde_diffusion.model import DiffusionModel, evaluating
from sde_diffusion.ode import SolverError
from sde_diffusion.samplers.noise import Streams, unmixed_random_numbers
from sde_diffusion.samplers.sample import sample
from sde_diffusion.training.config import ConfigError
from sde_diffusion.training.distributed import Ranks

# One seed for every run, so that runs of other seeds can be compared.
_SEED = 0
_SAMPLING_NFE = 20
_ALONE = Ranks()


@dataclass(frozen=True)
class HeldOutLoss:
    """What ``held_out_loss`` returns.

    Attributes:
        mean: the training objective.
        log_snr: (levels,) float64, the noise levels, from little noise to much.
        at_level: (levels,) float64, the mean loss there, without weights of times.
    """

    mean: float
    log_snr: Tensor
    at_level: Tensor


@torch.no_grad()
def held_out_loss(
    model: DiffusionModel,
    dataset: DataSource,
    weighting: Weighting,
    times: TimeSampler,
    *,
    count: int,
    levels: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    ranks: Ranks = _ALONE,
) -> HeldOutLoss:
    """The loss of examples that are not trained on, at fixed times and with fixed noise.

    Example i of the data set draws from stream i of the seed, so the result is the same for every batch size and
    number of ranks, but for rounding.

    Args:
        model: what to measure; its network is given the labels if it has ``classes``.
        dataset: the examples; ``count`` of them at even distances are taken, or all if it has fewer.
        weighting: that of training.
        times: the distribution of training times; uniform times are taken for one that learns.
        count: number of examples.
        levels: number of noise levels.
        seed: of the noise, the dequantisation and the order of the times.
        batch_size: examples evaluated together; their losses at all levels take one evaluation each.
        ranks: who shares the examples; each has the result.

    Raises:
        ValueError: for a number out of range, or data without the labels that the network takes.
    """
    chosen = _chosen(dataset, count)
    for name, number in (("levels", levels), ("seed", seed)):
        if number < 0:
            raise ValueError(f"{name} = {number}: must be at least 0")
    fixed = Uniform(model.sde) if times.state_dict() else times
    u = (np.random.default_rng(seed).permutation(len(chosen)) + 0.5) / len(chosen)
    # Uniform in log-SNR.
    level_times, _ = Importance(model.sde).draw((torch.arange(levels, dtype=torch.float64) + 0.5) / max(1, levels))
    dtype = torch.promote_types(model.dtype, torch.float32)
    losses = torch.zeros(1 + levels, len(chosen), dtype=torch.float64, device=model.device)
    with evaluating(model):
        for batch in _batches(dataset, chosen, batch_size, ranks):
            streams = Streams(seed, batch.indices, model.device)
            x0 = _model_space(dataset, batch.values.to(model.device), streams, dtype)
            cond = _cond(model, batch.label)
            t, weight = fixed.draw(torch.from_numpy(u[batch.places]).to(x0))
            rows = [weight * denoising_loss(model, x0, t, streams.normal(x0.shape[1:], dtype), weighting, **cond)]
            for level in level_times.to(x0):
                noise = streams.normal(x0.shape[1:], dtype)
                rows.append(denoising_loss(model, x0, level.expand(len(x0)), noise, weighting, **cond))
            losses[:, batch.places] = torch.stack(rows).double()
    # Every rank has zeros at the examples of the others.
    means = ranks.total(losses).mean(1).cpu()
    return HeldOutLoss(float(means[0]), model.sde.log_snr(level_times), means[1:])


def held_out_likelihood(
    model: DiffusionModel,
    dataset: DataSource,
    *,
    count: int,
    seed: int = 0,
    batch_size: int = 64,
    ranks: Ranks = _ALONE,
) -> DatasetResult:
    """Bits or nats a dimension of examples that are not trained on, given their labels if the network takes them.

    Arguments and errors as for ``held_out_loss``. Where the solver fails the examples of the batch are NaN, with a
    warning: a model in training is no reason to end it.
    """
    chosen = _chosen(dataset, count)
    names = ("nats_per_dim" if model.data.bits is None else "bits_per_dim", "std_error", "solver_error")
    columns = torch.zeros(len(names), len(chosen), dtype=torch.float64, device=model.device)
    for batch in _batches(dataset, chosen, batch_size, ranks):
        measure = likelihood_measure(model, seed=seed, cond=_cond(model, batch.label))
        try:
            measured = measure(batch.values.to(model.device), batch.indices)
        except SolverError as error:
            warnings.warn(f"likelihood: {error}", stacklevel=2)
            columns[:, batch.places] = math.nan
        else:
            columns[:, batch.places] = torch.stack([measured[name] for name in names]).to(columns)
    table = dict(zip(names, ranks.total(columns).cpu(), strict=True))
    # Settings and a directory belong to results that are written.
    return DatasetResult(names[0], table, settings={}, ranks=ranks.size, directory=Path())


class SampleDistance:
    """Fréchet distance of a model's samples to the training data, whose features are computed once.

    The samples are those of ``sample(model, count, nfe=20, seed=seed)``, of all classes alike if the network has some.
    As the distance is too large by about a constant over ``count``, only numbers of one count can be compared.
    """

    def __init__(
        self,
        features: FeatureNetwork,
        train_set: DataSource,
        *,
        count: int,
        seed: int = 0,
        batch_size: int = 64,
        ranks: Ranks = _ALONE,
    ):
        """Take the network and the data; nothing is computed yet.

        Args:
            features: a feature network for data of this shape.
            train_set: the reference, all of it; codes as the points in the middle of their bins.
            count: number of samples.
            seed: of the samples.
            batch_size: images evaluated together.
            ranks: who shares samples and reference.

        Raises:
            ConfigError: for data that the network is not for, or too few samples or data for a covariance.
        """
        shape, data = tuple(train_set.data_shape), train_set.data
        if shape != features.data_shape or (data.low, data.high) != (-1, 1):
            raise ConfigError(
                f"evaluation.features = {features.name!r}: is for data of shape {features.data_shape} in [-1, 1]; "
                f"these have shape {shape}, in [{data.low}, {data.high}]"
            )
        for name, number in (("evaluation.frechet_count", count), ("training examples", len(train_set))):
            if number <= features.dimension:
                raise ConfigError(
                    f"{name} = {number}: must be at least {features.dimension + 1} for {features.dimension} features"
                )
        self.features, self.train_set = features, train_set
        self.count, self.seed, self.batch_size, self.ranks = count, seed, batch_size, ranks
        self._reference: Moments | None = None

    def __call__(self, model: DiffusionModel) -> float:
        """The distance; NaN, with a warning, where the model's samples are not finite."""
        self.features.to(model.device)
        if self._reference is None:
            self._reference = self._moments_of_data(model.device)
        moments, reference = _merged(self._moments_of_samples(model), self.ranks), self._reference
        if not bool(moments.scatter.isfinite().all()):
            return math.nan
        return float(gaussian_frechet(moments.mean, moments.covariance, reference.mean, reference.covariance))

    def _moments_of_data(self, device: torch.device) -> Moments:
        moments, data = Moments(self.features.dimension, device), self.train_set.data
        for batch in _batches(self.train_set, list(range(len(self.train_set))), self.batch_size, self.ranks):
            values = batch.values.to(device)
            images = values if data.bits is None else data.points(values)
            moments.update(extract_features(images, self.features))
        return _merged(moments, self.ranks)

    def _moments_of_samples(self, model: DiffusionModel) -> Moments:
        classes = getattr(model.network, "classes", 0)
        try:
            drawn = sample(
                model,
                self.count,
                nfe=_SAMPLING_NFE,
                cond={"label": torch.arange(self.count) % classes} if classes else None,
                batch_size=self.batch_size,
                shard=(self.ranks.rank, self.ranks.size),
                seed=self.seed,
            )
        except SolverError as error:
            warnings.warn(f"samples: {error}", stacklevel=3)
            # The other ranks are to know, and not to wait.
            moments = Moments(self.features.dimension, model.device)
            moments.count, moments.mean = 1, moments.mean + math.nan
            return moments
        # As the network does itself, but that it refuses what is far outside, as early samples may be.
        return Moments.of(extract_features(drawn.samples.clamp(-1, 1), self.features, self.batch_size))


class Evaluation:
    """What the section ``evaluation`` of a config asks to be measured of a model, again and again."""

    def __init__(
        self,
        config: ConfigDict,
        weighting: Weighting,
        times: TimeSampler,
        train_set: DataSource,
        held_out: DataSource | None,
        ranks: Ranks = _ALONE,
    ):
        """Check that it can be measured; nothing is computed yet.

        Args:
            config: a resolved config.
            weighting: that of training.
            times: the distribution of training times.
            train_set: what the model is trained on.
            held_out: what it is not trained on, if there are such data.
            ranks: who shares the work.

        Raises:
            ConfigError: for measurements that these data do not allow, saying which and why.
        """
        self.options, self.weighting, self.times, self.held_out = config.evaluation, weighting, times, held_out
        self.ranks = ranks
        _check_held_out(self.options, train_set, held_out)
        self.distance = None
        if self.options.frechet_count:
            self.distance = SampleDistance(
                _feature_network(self.options.features, train_set),
                train_set,
                count=self.options.frechet_count,
                seed=_SEED,
                batch_size=self.options.batch_size,
                ranks=self.ranks,
            )

    def check(self, model: DiffusionModel) -> None:
        """Raise a ConfigError if the network takes labels that the held-out data do not have."""
        classes = getattr(model.network, "classes", 0)
        if self.held_out is not None and classes and not 0 < self.held_out.classes <= classes:
            raise ConfigError(f"network.classes = {classes}: the held-out data have {self.held_out.classes} classes")

    def run(self, model: DiffusionModel) -> dict[str, float]:
        """Measure a model; every rank calls it, with all the weights, and has the numbers.

        Args:
            model: the one with averaged weights. Its mode and torch's random numbers are as before, after.

        Returns:
            What was asked for, by name, all finite; "evaluation_seconds" is the wall-clock time of this rank:

            * "held_out_loss", and "held_out_loss/log_snr=-3.50" for each level;
            * "bits_per_dim", or "nats_per_dim" of continuous data, with "/std_error", "/solver_error" and
              "/sampling_error" of it, as ``DatasetResult`` has them;
            * "frechet_distance".

            A number that is not finite is left out, with a warning.
        """
        started = time.perf_counter()
        self.check(model)
        # A network of the user's own may draw random numbers outside training too.
        with unmixed_random_numbers(model.device):
            numbers = self._loss(model) | self._likelihood(model)
            if self.distance is not None:
                numbers["frechet_distance"] = self.distance(model)
        numbers["evaluation_seconds"] = time.perf_counter() - started
        wrong = [name for name, number in numbers.items() if not math.isfinite(number)]
        if wrong:
            warnings.warn(f"evaluation: {', '.join(wrong)} not finite", stacklevel=2)
        return {name: number for name, number in numbers.items() if name not in wrong}

    def stops(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Whether ``evaluation.patience`` evaluations have passed since the one of the smallest held-out loss.

        Args:
            lines: the numbers of all evaluations of the run so far, in order; those of before an interruption too.
                Lines without a held-out loss do not count.
        """
        losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
        patience = self.options.patience
        return 0 < patience < len(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def _loss(self, model: DiffusionModel) -> dict[str, float]:
        options = self.options
        if not options.loss_count or self.held_out is None:
            return {}
        loss = held_out_loss(
            model,
            self.held_out,
            self.weighting,
            self.times,
            count=options.loss_count,
            levels=options.levels,
            seed=_SEED,
            batch_size=options.batch_size,
            ranks=self.ranks,
        )
        levels = zip(loss.log_snr.tolist(), loss.at_level.tolist(), strict=True)
        return {"held_out_loss": loss.mean} | {f"held_out_loss/log_snr={snr:z.2f}": mean for snr, mean in levels}

    def _likelihood(self, model: DiffusionModel) -> dict[str, float]:
        options = self.options
        if not options.likelihood_count or self.held_out is None:
            return {}
        result = held_out_likelihood(
            model,
            self.held_out,
            count=options.likelihood_count,
            seed=_SEED,
            batch_size=options.batch_size,
            ranks=self.ranks,
        )
        errors = {name: getattr(result, name) for name in ("std_error", "solver_error", "sampling_error")}
        # A single example does not tell how others would be.
        errors = {name: error for name, error in errors.items() if result.count > 1 or name != "sampling_error"}
        return {result.quantity: result.mean} | {f"{result.quantity}/{name}": error for name, error in errors.items()}


class _Batch(NamedTuple):
    """Some examples: their places among those chosen, their indices in the data set, values and labels."""

    places: list[int]
    indices: list[int]
    values: Tensor
    label: Tensor | None


def _chosen(dataset: DataSource, count: int) -> list[int]:
    """The indices of so many examples at even distances: the first ones of a sorted folder would be of one kind."""
    if count < 1:
        raise ValueError(f"count = {count}: must be at least 1")
    count = min(count, len(dataset))
    return [place * len(dataset) // count for place in range(count)]


def _batches(dataset: DataSource, chosen: Sequence[int], batch_size: int, ranks: Ranks) -> Iterator[_Batch]:
    """A rank's share of the chosen examples, every so many-th."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: must be at least 1")
    own = range(ranks.rank, len(chosen), ranks.size)
    for first in range(0, len(own), batch_size):
        places = list(own[first : first + batch_size])
        indices = [chosen[place] for place in places]
        items = default_collate([dataset[index] for index in indices])
        values, label = (items, None) if isinstance(items, Tensor) else items
        yield _Batch(places, indices, values, label)


def _model_space(dataset: DataSource, values: Tensor, streams: Streams, dtype: torch.dtype) -> Tensor:
    """Examples (B, *data_shape) as the model takes them: codes are dequantised."""
    if dataset.data.bits is None:
        return values.to(dtype)
    return dataset.data.dequantize(values, streams.uniform(values.shape[1:], dtype))


def _cond(model: DiffusionModel, label: Tensor | None) -> dict[str, Tensor]:
    """What the network is given beside an example (B, ...): its label (B,), if it takes one."""
    if not getattr(model.network, "classes", 0):
        return {}
    if label is None:
        raise ValueError("the network takes labels, but the held-out data have none")
    return {"label": label.to(model.device)}


def _merged(moments: Moments, ranks: Ranks) -> Moments:
    """The moments of what all ranks have seen, from sums: those of ``Moments.merge``, about the mean of all."""
    merged = Moments(len(moments.mean), moments.mean.device)
    count = ranks.total(torch.full_like(moments.mean[:1], moments.count))
    merged.mean = ranks.total(moments.count * moments.mean) / count
    step = moments.mean - merged.mean
    merged.scatter = ranks.total(moments.scatter + moments.count * torch.outer(step, step))
    merged.count = int(count)
    return merged


def _check_held_out(options: ConfigDict, train_set: DataSource, held_out: DataSource | None) -> None:
    """Refuse what cannot be measured on these data."""
    if held_out is None:
        for name in ("loss_count", "likelihood_count"):
            if options[name]:
                raise ConfigError(
                    f"evaluation.{name} = {options[name]}: needs held-out data, of which there are none; "
                    "give train(..., held_out=), or set it to 0"
                )
        return
    given, needed = ((tuple(dataset.data_shape), dataset.data) for dataset in (held_out, train_set))
    if given != needed:
        raise ConfigError(
            f"held_out: its examples have shape {given[0]} and {given[1]}; those trained on {needed[0]} and {needed[1]}"
        )


def _feature_network(name: str, train_set: DataSource) -> FeatureNetwork:
    """The feature network of this name; by default the one for data of this shape."""
    if not name and tuple(train_set.data_shape) != FeatureNetwork.data_shape:
        raise ConfigError(
            f"evaluation.features = '': there is no feature network for data of shape {tuple(train_set.data_shape)}; "
            f"name a file of save_features, or one of {', '.join(FEATURES)}, or set evaluation.frechet_count = 0"
        )
    try:
        return load_features(name or FEATURES[0])
    except ValueError as error:
        raise ConfigError(f"evaluation.features = {name!r}: {error}") from error
