"""Measurements during a run: closed forms, and that nothing but the weights changes them."""

import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sde_diffusion as sd
from sde_diffusion.data import ArrayDataset, DataInfo
from sde_diffusion.evaluation import frechet_distance, likelihood_measure, load_features
from sde_diffusion.losses import (
    WEIGHTINGS,
    Importance,
    LogNormal,
    LogSNRWeighting,
    LossSecondMoment,
    Uniform,
)
from sde_diffusion.samplers.noise import Streams
from sde_diffusion.storage import flatten
from sde_diffusion.training import ConfigError, resolve_config
from sde_diffusion.training.config import RESUMABLE
from sde_diffusion.training.distributed import Ranks
from sde_diffusion.training.held_out import Evaluation, SampleDistance, held_out_likelihood, held_out_loss

SDE = sd.VPSDE()
SIZE, COUNT = 40, 30


class Known(nn.Module):
    """A network that is a given function of x and t, and keeps what it is called with."""

    def __init__(self, function, classes=0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.function, self.classes, self.calls = function, classes, []

    def forward(self, x, t, label=None):
        self.calls.append((x, t, label, self.training))
        return self.function(x, t)


def zero(x, t):
    return torch.zeros_like(x)


def model_of(function, prediction, dataset, classes=0):
    network = Known(function, classes)
    return sd.DiffusionModel(network, SDE, prediction, data_shape=dataset.data_shape, data=dataset.data)


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SIZE, 5, generator=generator, dtype=torch.float64)
    return ArrayDataset(values, labels=torch.arange(SIZE) % 3)


@pytest.fixture(scope="module")
def signs():
    """Data of |x₀|² = D, whatever the example."""
    return ArrayDataset(torch.ones(COUNT, 3, dtype=torch.float64))


@pytest.fixture(scope="module")
def grey():
    """70 random grey images of 28 x 28."""
    generator = torch.Generator().manual_seed(0)
    return ArrayDataset(torch.randint(256, (70, 1, 28, 28), generator=generator, dtype=torch.uint8))


def evaluation_of(train_set, held_out=None, **options):
    config = resolve_config({"evaluation": {"loss_count": 0, **options}})
    return Evaluation(config, WEIGHTINGS["simple"](), Uniform(SDE), train_set, held_out)


@dataclass(frozen=True)
class Thread(Ranks):
    """A rank that is a thread of this process."""

    add_up: Callable | None = None

    def total(self, values):
        assert values.dtype == torch.float64
        return self.add_up(self.rank, values)


def on_ranks(size, work):
    """work(Ranks) of every rank, each in a thread of its own; they add up as processes would."""
    barrier, slots = threading.Barrier(size, timeout=60), [None] * size

    def add_up(rank, values):
        slots[rank] = values
        barrier.wait()
        result = torch.stack(slots).sum(0)
        barrier.wait()
        return result

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Thread(rank, size, add_up=add_up) for rank in range(size)]))


# The loss


def test_an_estimate_of_zero_costs_the_square_of_the_data_at_every_level(dataset):
    loss = held_out_loss(
        model_of(zero, "x0", dataset), dataset, WEIGHTINGS["x0"](), Uniform(SDE), count=SIZE, levels=3, batch_size=7
    )
    expected = float(dataset.values.square().mean())
    assert loss.mean == pytest.approx(expected, rel=1e-13)
    assert loss.at_level.tolist() == pytest.approx([expected] * 3, rel=1e-13)


def test_no_estimate_of_the_noise_costs_its_share_of_the_data(dataset):
    # x̂₀ = x/α = x₀ + (σ/α) ε: the squared error is e^{−log-SNR} |ε|²/D, and |ε|² is that of the example's stream.
    model = model_of(zero, "eps", dataset)
    loss = held_out_loss(model, dataset, WEIGHTINGS["x0"](), Uniform(SDE), count=SIZE, levels=4, seed=3)
    streams = Streams(3, range(SIZE))
    noise = [streams.normal((5,), torch.float64) for _ in range(5)]
    assert not torch.equal(noise[1], noise[2])
    expected = [float(e.square().mean() * math.exp(-snr)) for e, snr in zip(noise[1:], loss.log_snr, strict=True)]
    assert loss.at_level.tolist() == pytest.approx(expected, rel=1e-9)
    # Equal steps, from little noise to much, half a step from either end.
    ends = SDE.log_snr(torch.tensor([SDE.t_min, SDE.t_max], dtype=torch.float64))
    steps = torch.cat([ends[:1], loss.log_snr, ends[1:]]).diff()
    step = float(ends[1] - ends[0]) / 4
    assert steps.tolist() == pytest.approx([step / 2, step, step, step, step / 2], rel=1e-6)


def test_times_are_one_in_each_part_of_their_distribution(signs):
    # With x̂₀ = 0 and |x₀|² = D the error of ε is e^{log-SNR}; weighted, the loss is log-SNR².
    weighting = LogSNRWeighting(lambda log_snr: log_snr.square() * torch.exp(-log_snr))
    model = model_of(zero, "x0", signs)
    loss = held_out_loss(model, signs, weighting, LogNormal(SDE, mean=-0.7, std=0.3), count=COUNT, levels=5)
    # log-SNR is −2 log(σ/α), and u the middles of equal parts.
    normal = torch.special.ndtri((torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT)
    assert loss.mean == pytest.approx(4 * (0.7**2 + 0.3**2 * float(normal.square().mean())), rel=1e-9)
    assert loss.at_level.tolist() == pytest.approx(loss.log_snr.square().tolist(), rel=1e-9)
    # In no order: an ordered data set would have its first examples at one end of time.
    times = torch.cat([t for _, t, *_ in model.network.calls[:1]])
    assert 0 < int((times.diff() > 0).sum()) < COUNT - 1


def test_times_have_their_weights(signs):
    weighting = LogSNRWeighting(lambda log_snr: torch.exp(-log_snr))
    loss = held_out_loss(model_of(zero, "x0", signs), signs, weighting, Importance(SDE), count=COUNT, levels=1)
    u = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    assert loss.mean == pytest.approx(float(Importance(SDE).draw(u)[1].mean()), rel=1e-9)
    assert loss.at_level.tolist() == pytest.approx([1.0], rel=1e-9)


def test_times_that_are_learnt_do_not_change_what_is_measured(dataset):
    learning = LossSecondMoment(SDE, bins=4, history=1)
    learning.update(torch.tensor([0.1, 0.3, 0.6, 0.9]), torch.tensor([1.0, 5.0, 2.0, 100.0]))
    model = model_of(lambda x, t: x * t[:, None], "eps", dataset)
    options = {"count": COUNT, "levels": 0}
    learnt, uniform = (
        held_out_loss(model, dataset, WEIGHTINGS["simple"](), times, **options) for times in (learning, Uniform(SDE))
    )
    assert learnt.mean == uniform.mean
    assert learnt.at_level.shape == (0,)


@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (7, 1), (4, 3), (64, 4), (1, 32)])
def test_neither_batches_nor_ranks_change_the_loss(dataset, batch_size, ranks):
    model = model_of(lambda x, t: x * t[:, None].sin(), "eps", dataset)

    def measure(**options):
        return held_out_loss(model, dataset, WEIGHTINGS["vlb"](), LogNormal(SDE), count=COUNT, levels=3, **options)

    expected = measure()
    for loss in on_ranks(ranks, lambda ranks: measure(ranks=ranks, batch_size=batch_size)):
        assert loss.mean == pytest.approx(expected.mean, rel=1e-12)
        assert loss.at_level.tolist() == pytest.approx(expected.at_level.tolist(), rel=1e-12)


def test_codes_are_dequantised_and_labels_passed():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(16, (10, 4), generator=generator, dtype=torch.uint8)
    dataset = ArrayDataset(values, torch.arange(10) % 3, DataInfo(low=-2.0, high=2.0, bits=4))
    model = model_of(zero, "x0", dataset, classes=3)
    loss = held_out_loss(model, dataset, WEIGHTINGS["x0"](), Uniform(SDE), count=5, levels=2, seed=1)
    # Every second one, as five are asked for.
    x0 = dataset.data.dequantize(values[::2], Streams(1, range(0, 10, 2)).uniform((4,), torch.float64))
    assert loss.mean == pytest.approx(float(x0.square().mean()), rel=1e-13)
    assert len(model.network.calls) == 3
    for _, _, label, is_training in model.network.calls:
        assert label.tolist() == [0, 2, 1, 0, 2]
        assert not is_training
    assert model.network.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count = 0: must be at least 1"),
        ({"levels": -1}, "levels = -1: must be at least 0"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
    ],
)
def test_wrong_numbers_are_named(signs, options, message):
    with pytest.raises(ValueError, match=message):
        held_out_loss(
            model_of(zero, "x0", signs), signs, WEIGHTINGS["x0"](), Uniform(SDE), **{"count": COUNT, **options}
        )


# The likelihood


def test_the_likelihood_of_a_gaussian_is_its_closed_form(dataset):
    # Of data from N(0, I) the variance-preserving x_t is N(0, I) too, and E[ε | x_t] = σ x_t.
    model = model_of(lambda x, t: SDE.sigma(t)[:, None] * x, "eps", dataset)
    result = held_out_likelihood(model, dataset, count=4, batch_size=3)
    # Of every tenth example; in five dimensions the trace is exact.
    expected = 0.5 * math.log(2 * math.pi) + 0.5 * dataset.values[::10].square().mean(1)
    assert result.quantity == "nats_per_dim"
    assert result.values.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert result.std_error == 0
    assert result.sampling_error == pytest.approx(float(expected.std()) / math.sqrt(4), abs=1e-6)


def test_the_likelihood_of_codes_is_that_of_the_measure_whatever_the_ranks(grey):
    few = ArrayDataset(grey.values[:4, :, :3, :3], torch.arange(4) % 2)
    model = model_of(lambda x, t: SDE.sigma(t)[:, None, None, None] * x, "eps", few, classes=2)
    expected = likelihood_measure(model, seed=5, cond={"label": few.labels})(few.values, [0, 1, 2, 3])
    for result in on_ranks(3, lambda ranks: held_out_likelihood(model, few, count=4, seed=5, ranks=ranks)):
        assert (result.quantity, result.unit, result.ranks) == ("bits_per_dim", "bits/dim", 3)
        for name in ("bits_per_dim", "std_error", "solver_error"):
            assert result.columns[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-9, abs=1e-12)
    assert {tuple(label.tolist()) for _, _, label, _ in model.network.calls} >= {(0,), (1,)}


# The distance


def test_the_distance_is_that_of_the_samples_whatever_the_ranks(grey):
    model = model_of(lambda x, t: SDE.sigma(t)[:, None, None, None] * x, "eps", grey)
    features = load_features()
    samples = sd.sample(model, 66, nfe=20, seed=2).samples
    images = grey.data.points(grey.values)
    expected = frechet_distance(samples.clamp(-1, 1).float(), images, features, bootstrap=20).distance

    def measure(ranks):
        distance = SampleDistance(features, grey, count=66, seed=2, batch_size=16, ranks=ranks)
        return [distance(model), distance(model)]

    # Features are float32, and a covariance of 66 vectors in 64 dimensions has eigenvalues down to their rounding.
    for pair in on_ranks(3, measure):
        assert pair == pytest.approx([expected, expected], rel=1e-4)
    assert measure(Ranks()) == pytest.approx([expected, expected], rel=1e-4)


def test_features_of_the_data_are_computed_once_and_wild_samples_have_some(grey):
    features, seen = load_features(), []
    features.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    distance = SampleDistance(features, grey, count=66, batch_size=70)
    # Samples near 100, which the network would not take for images.
    wild = model_of(lambda x, t: 100 * torch.ones_like(x), "x0", grey)
    assert distance(wild) == distance(wild) > 0
    assert seen == [70, 66, 66]


def test_classes_are_drawn_alike(grey):
    model = model_of(zero, "x0", grey, classes=4)
    SampleDistance(load_features(), grey, count=68, batch_size=68)(model)
    assert model.network.calls[0][2].bincount().tolist() == [17, 17, 17, 17]


# All of it


def test_a_run_measures_what_is_asked_for_and_disturbs_nothing(dataset):
    def noisy(x, t):
        return x * t[:, None] + 0 * torch.rand(())

    model = model_of(noisy, "eps", dataset, classes=3)
    evaluation = evaluation_of(dataset, dataset, loss_count=8, levels=2, likelihood_count=1)
    before = torch.get_rng_state()
    first, again = evaluation.run(model), evaluation.run(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.network.training
    assert not any(is_training for *_, is_training in model.network.calls)
    assert first.pop("evaluation_seconds") > 0
    assert again.pop("evaluation_seconds") > 0
    assert first == again
    names = ["held_out_loss", "held_out_loss/log_snr=7.85", "held_out_loss/log_snr=-4.08"]
    assert list(first) == [*names, "nats_per_dim", "nats_per_dim/std_error", "nats_per_dim/solver_error"]
    json.dumps(first, allow_nan=False)


def test_nothing_is_measured_unless_asked_for(dataset):
    assert list(evaluation_of(dataset).run(model_of(zero, "x0", dataset))) == ["evaluation_seconds"]


@pytest.mark.filterwarnings("ignore:(likelihood|samples). ")
def test_what_is_not_finite_is_left_out(dataset, grey, monkeypatch):
    def broken(x, t):
        return x * math.nan

    def fail(model, **options):
        def measure(examples, indices):
            raise sd.SolverError(f"no step for example {indices[0]}")

        return measure

    evaluation = evaluation_of(dataset, dataset, loss_count=4, levels=0)
    with pytest.warns(UserWarning, match="held_out_loss not finite"):
        assert list(evaluation.run(model_of(broken, "eps", dataset))) == ["evaluation_seconds"]
    with pytest.warns(UserWarning, match="frechet_distance not finite"):
        assert list(evaluation_of(grey, frechet_count=65).run(model_of(broken, "eps", grey))) == ["evaluation_seconds"]
    monkeypatch.setattr("sde_diffusion.training.held_out.likelihood_measure", fail)
    evaluation = evaluation_of(dataset, dataset, likelihood_count=2)
    with pytest.warns(UserWarning, match="nats_per_dim, nats_per_dim/std_error, .* not finite") as warned:
        assert list(evaluation.run(model_of(zero, "x0", dataset))) == ["evaluation_seconds"]
    assert "likelihood: no step for example 0" in str(warned[0].message)


@pytest.mark.filterwarnings("ignore:samples. ")
def test_a_rank_whose_samples_fail_does_not_keep_the_others_waiting(grey):
    def measure(ranks):
        function = (lambda x, t: x * math.nan) if ranks.rank == 1 else zero
        return SampleDistance(load_features(), grey, count=66, ranks=ranks)(model_of(function, "x0", grey))

    assert all(math.isnan(distance) for distance in on_ranks(2, measure))


@pytest.mark.parametrize(
    ("patience", "losses", "stops"),
    [
        (0, [1.0, 2.0, 3.0, 4.0], False),
        (2, [], False),
        (2, [1.0], False),
        (2, [1.0, 2.0], False),
        (2, [1.0, 2.0, 3.0], True),
        (2, [1.0, 1.0, 1.0], True),  # as good is not better
        (2, [3.0, 4.0, 2.0, 3.0], False),
        (2, [3.0, 4.0, 2.0, 3.0, 2.5], True),
        (2, [3.0, 4.0, 5.0, 2.0], False),  # it should have ended before; going on, it begins anew
        (1, [3.0, 3.5], True),
    ],
)
def test_a_run_ends_when_its_patience_does(dataset, patience, losses, stops):
    evaluation = evaluation_of(dataset, dataset, every=1, loss_count=1, patience=patience)
    lines = [{"step": step, "held_out_loss": loss} for step, loss in enumerate(losses)]
    assert evaluation.stops(lines) == stops
    # Other lines do not count.
    assert evaluation.stops([{"step": 0, "loss": 9.0}, *lines, {"step": 9, "loss": 0.1}]) == stops


@pytest.mark.parametrize(
    ("options", "held_out", "message"),
    [
        ({"loss_count": 5}, None, r"evaluation\.loss_count = 5: needs held-out data"),
        ({"likelihood_count": 5}, None, r"evaluation\.likelihood_count = 5: needs held-out data"),
        ({"loss_count": 5}, torch.zeros(3, 4), r"held_out: its examples have shape \(4,\) .*; those trained on \(5,\)"),
        ({"frechet_count": 100}, None, r"evaluation\.features = '': there is no .* shape \(5,\); .* fashion_mnist"),
        ({"frechet_count": 100, "features": "fashion_mnist"}, None, r"'fashion_mnist': is for data of shape \(1, 28,"),
        ({"frechet_count": 100, "features": "inception"}, None, r"evaluation\.features = 'inception': .*fashion_mnist"),
    ],
)
def test_what_cannot_be_measured_is_refused(dataset, options, held_out, message):
    held_out = None if held_out is None else ArrayDataset(held_out)
    with pytest.raises(ConfigError, match=message):
        evaluation_of(dataset, held_out, **options)


def test_too_few_images_for_a_covariance_and_another_range_are_refused(grey):
    with pytest.raises(ConfigError, match=r"evaluation\.frechet_count = 64: must be at least 65 for 64 features"):
        evaluation_of(grey, frechet_count=64)
    with pytest.raises(ConfigError, match="training examples = 9: must be at least 65"):
        evaluation_of(ArrayDataset(grey.values[:9]), frechet_count=65)
    shifted = ArrayDataset(grey.values, data=DataInfo(low=0.0, high=1.0))
    with pytest.raises(ConfigError, match=r"in \[-1, 1\]; these have shape \(1, 28, 28\), in \[0.0, 1.0\]"):
        evaluation_of(shifted, frechet_count=65)


def test_labels_must_be_there_for_a_network_that_takes_them(dataset):
    bare, model = ArrayDataset(dataset.values), model_of(zero, "x0", dataset, classes=2)
    with pytest.raises(ConfigError, match=r"network\.classes = 2: the held-out data have 0 classes"):
        evaluation_of(bare, bare, loss_count=4).check(model)
    with pytest.raises(ConfigError, match=r"network\.classes = 2: the held-out data have 3 classes"):
        evaluation_of(dataset, dataset, loss_count=4).run(model)
    with pytest.raises(ValueError, match="the held-out data have none"):
        held_out_loss(model, bare, WEIGHTINGS["x0"](), Uniform(SDE), count=4)


# In a run


def test_evaluation_changes_no_step(tiny):
    plain, evaluated = (
        sd.train(tiny(train={"precision": "bfloat16"}, evaluation=evaluation))
        for evaluation in ({}, {"every": 3, "loss_count": 4, "levels": 2, "likelihood_count": 1})
    )
    assert {"step", "held_out_loss", "nats_per_dim"} < evaluated.evaluation.keys()
    for one, other in zip(plain.model.parameters(), evaluated.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_ends_early_and_does_not_go_on_unless_given_more_patience(tiny, tmp_path):
    def run(patience):
        # No weight changes, and so no loss.
        config = tiny(optim={"lr": 1e-30}, evaluation={"every": 2, "loss_count": 4, "levels": 0, "patience": patience})
        return sd.train({**config, "workdir": str(tmp_path)})

    assert run(patience=2).step == 6
    assert run(patience=2).step == 6
    assert run(patience=3).step == 8
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert len({line["held_out_loss"] for line in lines}) == 1


# The section of the config


@pytest.mark.parametrize("field", ["every", "loss_count", "levels", "likelihood_count", "frechet_count", "patience"])
def test_counts_are_not_negative(field):
    with pytest.raises(ConfigError, match=rf"evaluation\.{field} = -1: must be at least 0"):
        resolve_config({"evaluation": {field: -1}})


def test_a_batch_is_not_empty():
    with pytest.raises(ConfigError, match=r"evaluation\.batch_size = 0: must be positive"):
        resolve_config({"evaluation": {"batch_size": 0}})


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 5, "loss_count": 0}])
def test_patience_needs_something_to_wait_for(options):
    with pytest.raises(ConfigError, match=r"evaluation\.patience = 3: needs held-out losses"):
        resolve_config({"evaluation": {"patience": 3, **options}})
    assert resolve_config({"evaluation": {"patience": 3, "every": 5}}).evaluation.patience == 3


def test_evaluation_can_be_changed_in_a_run():
    fields = {field for field in flatten(resolve_config({}).to_dict()) if field.startswith("evaluation.")}
    assert fields
    assert fields <= RESUMABLE
