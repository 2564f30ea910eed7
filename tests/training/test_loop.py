import copy
import itertools
import json
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset

from sde_diffusion import VPSDE, sample, train
from sde_diffusion.data import ArrayDataset, DataInfo, load_dataset
from sde_diffusion.losses import SPREADS, TIMES, WEIGHTINGS, denoising_loss
from sde_diffusion.model import PREDICTIONS
from sde_diffusion.sde import SDES
from sde_diffusion.storage import Contents
from sde_diffusion.training import Callback, CheckpointError, ConfigError, TrainingError, load
from sde_diffusion.training.checkpoint import newest_checkpoint

# Times at which x is the datum within a thousandth or so.
NEARLY_CLEAN = {"weighting": "simple", "time": {"name": "log_normal", "mean": -6.0, "std": 0.01}}


class Stop(Exception):
    """What a test interrupts a run with."""


def stop_at(step):
    def callback(result):
        if result.step == step:
            raise Stop

    return callback


def interrupt(config, step, dataset=None, network=None):
    with pytest.raises(Stop):
        train(config, dataset=dataset, network=network, callbacks=[stop_at(step)])


def metrics(workdir):
    """The lines of metrics.jsonl without the time they took."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("images_per_second") > 0
        shares = [line.pop(name) for name in [*line] if name.startswith("share_")]
        assert len(shares) == 5
        assert 0 < sum(shares) <= 1
    return lines


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_run(one, other):
    """Same tensors in the last checkpoint, and the same metrics, bit for bit."""
    assert [path.name for path in sorted(newest_checkpoint(one).iterdir())] == [
        path.name for path in sorted(newest_checkpoint(other).iterdir())
    ]
    for name in (path.name for path in newest_checkpoint(one).glob("*.safetensors")):
        expected, found = (load_file(newest_checkpoint(workdir) / name) for workdir in (one, other))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), f"{name}: {key}"
    assert (newest_checkpoint(one) / "state.json").read_bytes() == (
        newest_checkpoint(other) / "state.json"
    ).read_bytes()
    assert metrics(one) == metrics(other)


# Resuming


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(kind, tmp_path, workers):
    config, dataset = kind
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train({**config, "workdir": str(whole)}, dataset=dataset)
    config = {**config, "workdir": str(parts), "train": {**config["train"], "workers": workers}}
    interrupt(config, 2, dataset)  # before the first checkpoint
    interrupt(config, 3, dataset)  # right after it
    interrupt(config, 5, dataset)  # right before the second
    result = train(config, dataset=dataset)
    assert_same_run(whole, parts)
    assert [line["step"] for line in metrics(parts)] == list(range(1, 9))
    for name, tensor in load_file(newest_checkpoint(whole) / "model.safetensors").items():
        assert torch.equal(result.model.state_dict()[name], tensor)


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(3, 4), (4, 3), (5, 2), (7, 8)])
def test_metrics_are_the_same_where_lines_and_checkpoints_fall_apart(tiny, tmp_path, log_every, checkpoint_every):
    options = {"log_every": log_every, "checkpoint_every": checkpoint_every, "steps": 12}
    whole, parts = (tiny(workdir=str(tmp_path / name), train=options) for name in ("whole", "parts"))
    train(whole)
    interrupt(parts, log_every)
    interrupt(parts, 2 * log_every if 2 * log_every < 12 else 12)
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_and_flip_resume_too(tiny, images, tmp_path, precision):
    whole, parts = (
        tiny(workdir=str(tmp_path / name), flip=True, train={"precision": precision}) for name in ("whole", "parts")
    )
    train(whole, dataset=images)
    interrupt(parts, 4, images)
    train(parts, dataset=images)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_scale_of_a_float16_loss_resumes_too(tiny, tmp_path):
    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.calls = nn.Parameter(torch.tensor(0.5)), 0

        def forward(self, x, t):
            self.calls += 1
            if self.calls == 2:
                self.scale.register_hook(lambda gradient: gradient * math.inf)
            return self.scale * x

    whole, parts = (tiny(workdir=str(tmp_path / name), train={"precision": "float16"}) for name in ("whole", "parts"))
    network = Overflowing()
    train(whole, network=network)
    interrupt(parts, 4, network=Overflowing())
    later = Overflowing()
    later.calls = 3
    # The hook that the second call leaves behind, from the fourth step on.
    later.scale.register_hook(lambda gradient: gradient * math.inf)
    train(parts, network=later)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    scales = [line["loss_scale"] for line in metrics(tmp_path / "whole")]
    assert scales == [2.0 ** (16 - step) for step in range(8)]
    assert json.loads((newest_checkpoint(tmp_path / "parts") / "state.json").read_text())["scaler"]["scale"] == 2.0**9


@pytest.mark.parametrize(
    "loss",
    [
        {"time": {"name": "loss_second_moment", "bins": 3, "history": 2}},
        {"time": "importance", "weighting": "likelihood", "spread": "stratified"},
        {"time": {"name": "loss_second_moment", "bins": 3, "history": 2}, "spread": "antithetic"},
    ],
    ids=["second moment", "stratified", "antithetic"],
)
def test_samplers_of_times_resume_too(tiny, tmp_path, loss):
    whole, parts = (tiny(workdir=str(tmp_path / name), loss=loss) for name in ("whole", "parts"))
    train(whole)
    interrupt(parts, 4)
    interrupt(parts, 7)
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    learnt = newest_checkpoint(tmp_path / "parts") / "times.safetensors"
    assert learnt.exists() == (loss["time"] != "importance")
    if learnt.exists():
        # All bins are full, so that what was stored decides on the times.
        assert load_file(learnt)["counts"].min() >= 2
        assert load_file(learnt)["counts"].sum() == 8 * 4


def test_weights_in_channels_last_resume_too(tiny, images, tmp_path):
    def network():
        torch.manual_seed(1)
        return Convolutions().to(memory_format=torch.channels_last)

    whole, parts = (tiny(workdir=str(tmp_path / name)) for name in ("whole", "parts"))
    train(whole, network=network(), dataset=images)
    interrupt(parts, 4, images, network())
    result = train(parts, network=network(), dataset=images)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert result.raw_model.network.inner.weight.is_contiguous(memory_format=torch.channels_last)
    assert not result.raw_model.network.inner.weight.is_contiguous()


def test_a_finished_run_takes_no_step(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path))
    first = train(config)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.*")}
    again = train(config, callbacks=[stop_at(8)])
    assert (first.step, again.step) == (8, 8)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    for name, tensor in first.raw_model.state_dict().items():
        assert torch.equal(tensor, again.raw_model.state_dict()[name])
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.*")} == before
    assert len(metrics(tmp_path)) == 8


def test_half_a_line_of_metrics_is_written_again(tiny, tmp_path):
    whole, parts = (tiny(workdir=str(tmp_path / name)) for name in ("whole", "parts"))
    train(whole)
    interrupt(parts, 5)
    path = tmp_path / "parts/metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("section", "change", "field"),
    [
        ("optim", {"lr": 0.02}, r"optim\.lr = 0\.02: the run in .* has 0\.01"),
        ("seed", 1, r"seed = 1: the run in .* has 0"),
        ("flip", True, r"flip = True"),
        ("ema", {"decay": 0.5}, r"ema\.decay = 0\.5"),
        ("train", {"steps": 9}, r"train\.steps = 9: the run in .* has 8"),
        ("train", {"batch_size": 5}, r"train\.batch_size = 5"),
        ("train", {"precision": "bfloat16"}, r"train\.precision = 'bfloat16'"),
        ("network", {"name": "mlp", "width": 8}, r"network\.depth = 3: .* has 2"),
        ("data", {"name": "moons", "size": 50}, r"data\.name = 'moons': .* has 'spiral'"),
        ("sde", {"name": "ve"}, r"sde\.beta_max = None: .* has 20\.0"),
        ("loss", {"weighting": "simple"}, r"loss\.weighting\.name = 'simple': the run in .* has 'edm'"),
        ("loss", {"spread": "stratified"}, r"loss\.spread = 'stratified': .* has 'independent'"),
    ],
)
def test_a_run_does_not_go_on_under_another_config(tiny, tmp_path, section, change, field):
    config = tiny(workdir=str(tmp_path))
    interrupt(config, 3)
    with pytest.raises(ConfigError, match=field):
        train(tiny(**{"workdir": str(tmp_path), section: change}))
    train(config)


def test_a_run_begun_before_an_option_existed_had_its_default(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path))
    interrupt(config, 3)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["network"]["activation"], stored["optim"]["weight_decay"], stored["loss"]["spread"]
    del stored["model"]["mean_step"], stored["model"]["learned_variance"]
    assert stored["loss"]["weighting"] == {"name": "edm"}
    stored["loss"]["weighting"] = "edm"
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"optim\.weight_decay = 0\.1: the run in .* has 0\.0"):
        train(tiny(workdir=str(tmp_path), optim={"weight_decay": 0.1}))
    assert train(config).step == 8


def test_what_changes_no_step_may_change(tiny, tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(tiny(workdir=str(whole)))
    interrupt(tiny(workdir=str(tmp_path / "parts"), train={"log_every": 1}), 4)
    (tmp_path / "parts").rename(moved)
    options = {
        "device": "cpu",
        "workers": 1,
        "checkpoint_every": 5,
        "keep_checkpoints": 7,
        "sample_every": 8,
        "sample_count": 3,
    }
    train(tiny(workdir=str(moved), train=options))
    assert_same_run(whole, moved)
    train(tiny(workdir=str(moved), train={"log_every": 3}))


def test_checkpoints_of_another_network_are_refused(tiny, recorder, tmp_path):
    config = tiny(workdir=str(tmp_path))
    train(config, network=nn.ModuleList([recorder()])[0])
    with pytest.raises(ConfigError, match=r"network\.activation = 'silu'"):
        train(config)
    other = recorder()
    other.more = nn.Parameter(torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"raw\.safetensors: tensor network\.more: the file has nothing"):
        train(config, network=other)


# Accumulation


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_a_batch_make_the_same_steps(tiny, images, recorder, tmp_path, parts):
    loss = {"spread": "stratified", "time": {"name": "loss_second_moment", "bins": 3, "history": 2}}
    networks = {1: recorder(classes=3), parts: recorder(classes=3)}
    for count, network in networks.items():
        workdir = str(tmp_path / str(count))
        options = {"label_dropout": 0.5, "accumulation": count}
        train(tiny(workdir=workdir, loss=loss, train=options), network=network, dataset=images)
    one, other = networks.values()
    assert [len(network.calls) for network in (one, other)] == [8, 8 * parts]
    (x, t, label), (others_x, others_t, others_label) = (
        [torch.cat(column) for column in zip(*network.calls, strict=True)] for network in (one, other)
    )
    assert torch.equal(label, others_label)
    assert set(label.tolist()) == {0, 1, 2, 3}
    # Times depend on losses learnt, and those on weights: sums in another order.
    torch.testing.assert_close(others_t, t, rtol=1e-5, atol=0)
    torch.testing.assert_close(others_x, x, rtol=1e-4, atol=1e-5)
    for found, expected in zip(metrics(tmp_path / str(parts)), metrics(tmp_path / "1"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for name in ("raw.safetensors", "model.safetensors", "times.safetensors"):
        expected, found = (load_file(newest_checkpoint(tmp_path / str(count)) / name) for count in (1, parts))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_each_part_drops_units_of_its_own(tiny):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.dropout, self.kept = nn.Parameter(torch.ones(2)), nn.Dropout(0.5), []

        def forward(self, x, t):
            factor = self.dropout(self.scale.expand(len(x), 64, 2))
            self.kept.append((factor != 0).flatten().tolist())
            return x * factor.mean(1)

    def kept(parts):
        train(tiny(train={"steps": 2, "accumulation": parts}), network=(network := Dropping()))
        return network.kept

    whole, halves, again = kept(1), kept(2), kept(2)
    assert halves == again
    # 256 units each: no two alike.
    assert len({tuple(units) for units in halves}) == 4
    assert whole[0][:256] == halves[0] != halves[1]


def test_a_batch_that_parts_do_not_divide_is_named(tiny):
    with pytest.raises(ConfigError, match=r"train\.batch_size = 4: must be a multiple of .* train\.accumulation = 3"):
        train(tiny(train={"accumulation": 3}))


def test_accumulation_may_change_when_a_run_goes_on(tiny, tmp_path):
    whole = train(tiny())
    interrupt(tiny(workdir=str(tmp_path)), 4)
    result = train(tiny(workdir=str(tmp_path), train={"accumulation": 4}))
    assert result.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)


# Learning


@pytest.mark.parametrize(
    ("sde", "weighting", "time", "prediction"),
    [
        *itertools.product(["vp"], WEIGHTINGS, ["importance"], ["eps"]),
        *itertools.product(["vp"], ["simple", "edm"], TIMES, PREDICTIONS),
        *itertools.product([name for name in SDES if name != "vp"], ["edm"], ["uniform", "log_normal"], ["edm", "v"]),
    ],
)
def test_the_loss_goes_down(tiny, sde, weighting, time, prediction):
    config = tiny(
        data={"name": "spiral", "size": 2000},
        network={"name": "mlp", "width": 32, "depth": 2, "embedding": 16},
        sde={"name": sde},
        model={"prediction": prediction, "learned_variance": weighting == "hybrid"},
        loss={"weighting": weighting, "time": {"name": time}},
        train={"steps": 80, "batch_size": 32, "log_every": 80},
    )
    trained = train(config).raw_model
    fresh = train({**config, "train": {"steps": 0}}).raw_model
    # The same points, times (stratified) and noise for both, so that only the networks differ.
    count, generator = 40_000, torch.Generator().manual_seed(1)
    x0 = load_dataset("spiral", split="test", size=count).values
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    (t, time_weight), noise = TIMES[time](trained.sde).draw(u), torch.randn(x0.shape, generator=generator)
    with torch.no_grad():
        before, after = (time_weight * denoising_loss(model, x0, t, noise, weighting) for model in (fresh, trained))
    gain = before - after
    assert gain.mean() > 4 * gain.std() / math.sqrt(count)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_everything_trains_with_everything(tiny, weighting):
    """A few steps of each prediction, SDE and sampler of times: losses and weights stay finite, and weights move."""
    combinations = [
        *itertools.product(["vp"], PREDICTIONS, TIMES, ["independent"]),
        *itertools.product(SDES, ["edm"], TIMES, ["stratified"]),
        *itertools.product(["vp"], ["edm"], ["uniform"], SPREADS),
    ]
    for sde, prediction, time, spread in combinations:
        config = tiny(
            sde={"name": sde},
            model={"prediction": prediction, "learned_variance": weighting == "hybrid"},
            loss={"weighting": weighting, "time": time, "spread": spread},
            train={"steps": 3, "log_every": 3},
        )
        result = train(config)
        start = train({**config, "train": {"steps": 0}}).raw_model.state_dict()
        assert math.isfinite(result.metrics["grad_norm"]), (sde, prediction, time)
        for name, tensor in result.raw_model.state_dict().items():
            assert tensor.isfinite().all(), (sde, prediction, time, name)
            assert "frequencies" in name or not torch.equal(tensor, start[name]), (sde, prediction, time, name)


@pytest.mark.parametrize("time", TIMES)
def test_a_loss_is_weighted_by_the_density_of_its_time(tiny, recorder, time):
    network, results = recorder(), []
    config = tiny(
        model={"prediction": "eps"},
        loss={"weighting": "simple", "time": time},
        train={"steps": 1, "batch_size": 64},
    )
    train(config, network=network, dataset=torch.zeros(64, 2), callbacks=[results.append])
    ((x, t, _),) = network.calls
    sde = results[0].raw_model.sde
    # The data are 0, so x = sigma eps, and the network answers x/2 + 0.1.
    losses = (x / sde.sigma(t)[:, None] - 0.5 * x - 0.1).square().mean(1)
    weight = torch.ones(64)
    if time == "importance":
        log_snr = [float(sde.log_snr(torch.tensor(end))) for end in (sde.t_min, sde.t_max)]
        weight = (log_snr[0] - log_snr[1]) / (sde.t_max - sde.t_min) * (sde.sigma(t) / sde.diffusion(t)).square()
    assert results[0].metrics["loss"] == pytest.approx(float((weight * losses).mean()), rel=1e-4)


def test_learned_variances_are_trained_and_loaded(tiny, tmp_path):
    config = tiny(
        workdir=str(tmp_path), model={"prediction": "eps", "learned_variance": True}, loss={"weighting": "hybrid"}
    )
    result = train(config)
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.full((5,), 0.3)
    expected, found = result.model.predict(x, t), load(tmp_path).predict(x, t)
    assert torch.equal(expected.fraction, found.fraction)
    start = train({**config, "workdir": "", "train": {"steps": 0}}).model.predict(x, t)
    assert not torch.equal(expected.fraction, start.fraction)


def test_a_line_has_the_mean_loss_since_the_last(tiny):
    lines = {1: [], 4: []}
    for log_every, seen in lines.items():
        train(
            tiny(train={"log_every": log_every}),
            callbacks=[lambda result, seen=seen: seen.append(dict(result.metrics))],
        )
    for index, line in enumerate(lines[4]):
        losses = [single["loss"] for single in lines[1][4 * index : 4 * index + 4]]
        assert line["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
        assert line["grad_norm"] == lines[1][4 * index + 3]["grad_norm"]


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_the_average_is_that_of_the_formula(tiny, decay):
    history, averages = [], []

    def callback(result):
        history.append(weights(result.raw_model))
        averages.append(weights(result.model))

    result = train(tiny(ema={"decay": decay}, train={"steps": 5}), callbacks=[callback])
    for name in result.model.state_dict():
        expected = history[0][name].double()
        for step, (raw, average) in enumerate(zip(history, averages, strict=True), start=1):
            if step > 1:
                d = min(decay, (1 + step) / (10 + step))
                expected = d * expected + (1 - d) * raw[name].double()
            # float32 rounds each of three operations a step.
            torch.testing.assert_close(average[name].double(), expected, rtol=step * 3 * 2.0**-24, atol=1e-7)
        assert (decay == 0) == torch.equal(averages[-1][name], history[-1][name])


def test_the_average_is_what_is_used(tiny, tmp_path):
    result = train(tiny(workdir=str(tmp_path)))
    averaged, raw = load(tmp_path), load(tmp_path, raw=True)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, averaged.state_dict()[name])
    for name, tensor in result.raw_model.state_dict().items():
        assert torch.equal(tensor, raw.state_dict()[name])
    drawn = [sample(model, 4, solver="heun", steps=4).samples for model in (result.model, averaged, raw)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not result.model.training
    assert not any(parameter.requires_grad for parameter in result.model.parameters())
    assert not result.raw_model.training
    assert all(parameter.requires_grad for parameter in result.raw_model.parameters())


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_learning_rate_follows_its_schedule(tiny, schedule, warmup):
    rates, result = [], None
    config = tiny(optim={"schedule": schedule, "warmup": warmup})
    result = train(config, callbacks=[lambda result: rates.append(result.metrics["lr"])])
    assert result.step == 8
    for k, rate in enumerate(rates):
        rise = min(1, (k + 1) / warmup) if warmup else 1
        fall = math.cos(math.pi * k / 16) ** 2 if schedule == "cosine" else 1
        assert rate == pytest.approx(0.01 * rise * fall, rel=1e-12)


def test_the_learning_rate_is_what_a_step_is_long(tiny):
    # The first step of Adam is lr g/(|g| + eps), so its largest entry is lr itself.
    config = tiny(optim={"lr": 0.03, "warmup": 3, "eps": 1e-30}, train={"steps": 1})
    start = weights(train({**config, "train": {**config["train"], "steps": 0}}).raw_model)
    moved = weights(train(config).raw_model)
    largest = max(float((moved[name] - start[name]).abs().max()) for name in start)
    assert largest == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("grad_clip", [0.0, 1e-3, 1e6])
def test_gradients_are_clipped_after_their_norm_is_taken(tiny, tmp_path, grad_clip):
    result = train(tiny(workdir=str(tmp_path), optim={"grad_clip": grad_clip}, train={"steps": 1}))
    norm = result.metrics["grad_norm"]
    assert 1e-2 < norm < 1e6
    moments = load_file(newest_checkpoint(tmp_path) / "optimizer.safetensors")
    # After one step the first moment is (1 - beta1) times the gradient that the optimizer was given.
    first = torch.cat([moment.flatten() for name, moment in moments.items() if name.endswith("exp_avg")])
    used = float(first.norm()) / (1 - 0.9)
    assert used == pytest.approx(grad_clip if 0 < grad_clip < norm else norm, rel=1e-3)


def test_weight_decay_shrinks_the_weights(tiny):
    plain, decayed = (
        train(tiny(optim={"lr": 0.01, "weight_decay": decay, "warmup": 0}, train={"steps": 1})) for decay in (0.0, 0.5)
    )
    start = weights(train(tiny(train={"steps": 0})).raw_model)
    for name, tensor in plain.raw_model.state_dict().items():
        expected = tensor - 0.01 * 0.5 * start[name]
        torch.testing.assert_close(decayed.raw_model.state_dict()[name], expected, rtol=1e-5, atol=1e-7)


def test_bfloat16_is_close_to_float32(tiny):
    exact, rounded = (
        train(tiny(train={"steps": 1, "batch_size": 64, "precision": precision}))
        for precision in ("float32", "bfloat16")
    )
    # The network's three layers in sequence each round inputs, weights and outputs by at most 2^-9 of their size.
    assert rounded.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=2 * 9 * 2.0**-9)
    assert rounded.metrics["loss"] != exact.metrics["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in rounded.raw_model.parameters())


# Randomness


@pytest.mark.parametrize("fail", [False, True])
def test_the_global_generator_is_left_alone(tiny, tmp_path, fail):
    before = torch.random.get_rng_state()
    config = tiny(workdir=str(tmp_path), train={"sample_every": 4, "sample_count": 2})
    if fail:
        interrupt(config, 5)
    else:
        train(config)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_is_the_same_whatever_the_global_generator(tiny):
    torch.manual_seed(1)
    one = train(tiny())
    torch.manual_seed(2)
    for name, tensor in train(tiny()).raw_model.state_dict().items():
        assert torch.equal(tensor, one.raw_model.state_dict()[name])


def test_what_a_step_sees_depends_on_seed_and_step_alone(tiny, images, recorder, tmp_path):
    def seen(change=None, stop=None, workdir="", **sections):
        network = recorder()
        config = tiny(workdir=workdir, **sections)
        if stop:
            interrupt(config, stop, images, recorder())
        train(config, network=network, dataset=images)
        return network.calls

    reference = seen()
    assert len(reference) == 8
    runs = {
        "rate": seen(optim={"lr": 0.5}, ema={"decay": 0.1}),
        "workers": seen(train={"workers": 1}),
        "steps": seen(train={"steps": 20}),
        "lines and pictures": seen(
            workdir=str(tmp_path / "pictures"), train={"log_every": 3, "sample_every": 2, "sample_count": 1}
        ),
        "resumed": [None] * 3 + seen(workdir=str(tmp_path / "resumed"), stop=4),
    }
    for name, calls in runs.items():
        for step, (call, expected) in enumerate(zip(calls, reference, strict=False)):
            if call is not None:
                assert torch.equal(call[0], expected[0]), (name, step)
                assert torch.equal(call[1], expected[1]), (name, step)
    # All 32 of a run's times differ, and those of another seed from them.
    times = torch.cat([t for _, t, _ in reference])
    assert len(times.unique()) == 32
    assert not torch.isin(torch.cat([t for _, t, _ in seen(seed=1)]), times).any()


@pytest.mark.parametrize("time", ["uniform", "log_normal"])
def test_the_times_of_a_batch_are_spread_as_asked(tiny, recorder, time):
    def times(spread, **sections):
        network = recorder()
        loss = {"time": time, "weighting": "simple", "spread": spread}
        train(tiny(loss=loss, model={"prediction": "eps"}, train={"batch_size": 6}, **sections), network=network)
        return torch.stack([t for _, t, _ in network.calls])

    plain, even, pairs = (times(spread) for spread in ("independent", "stratified", "antithetic"))
    assert torch.equal(plain[:, 0], even[:, 0])
    assert torch.equal(plain[:, ::2], pairs[:, ::2])
    # Back from times to u, by a table that leaves out a thousandth at either end.
    table = torch.linspace(0.001, 0.999, 9_981, dtype=torch.float64)
    grid = TIMES[time](VPSDE()).draw(table)[0]
    even, pairs = (torch.from_numpy(np.interp(t.numpy(), grid.numpy(), table.numpy())) for t in (even, pairs))
    gaps = (even.roll(-1, 1) - even).remainder(1)
    assert (gaps - 1 / 6).abs().max() < 3e-3
    assert (pairs[:, ::2] + pairs[:, 1::2] - 1).abs().max() < 3e-3


def test_stratified_times_depend_on_seed_and_step_alone(tiny, recorder, tmp_path):
    def times(stop=None, workdir="", **sections):
        network = recorder()
        config = tiny(workdir=workdir, loss={"spread": "stratified"}, **sections)
        if stop:
            interrupt(config, stop, network=recorder())
        train(config, network=network)
        return torch.cat([t for _, t, _ in network.calls])

    reference = times()
    assert torch.equal(times(optim={"lr": 0.3}), reference)
    assert torch.equal(times(stop=4, workdir=str(tmp_path)), reference[3 * 4 :])
    assert not torch.isin(times(seed=1), reference).any()


def test_every_example_is_seen_once_an_epoch_in_a_new_order(tiny, recorder):
    network = recorder()
    config = tiny(model={"prediction": "x0"}, loss=NEARLY_CLEAN, train={"steps": 20, "batch_size": 3})
    train(config, network=network, dataset=10 * torch.arange(20.0)[:, None])
    order = torch.cat([x for x, _, _ in network.calls]).div(10).round().flatten().int().tolist()
    epochs = [order[:20], order[20:40], order[40:]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def assert_uncorrelated(*columns):
    """No two of the columns (n,) correlate by more than five standard errors, 1/sqrt(n)."""
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlation.abs().max() < 5 / math.sqrt(len(columns[0]))


def test_noise_and_dequantisation_have_their_distributions(tiny, recorder):
    count = 4000
    data = ArrayDataset(torch.full((1, 2), 3, dtype=torch.uint8), data=DataInfo(low=0.0, high=4.0, bits=2))
    clean, noisy = recorder(), recorder()
    config = tiny(model={"prediction": "x0"}, loss=NEARLY_CLEAN, train={"steps": 1, "batch_size": count})
    train(config, network=clean, dataset=data)
    x, t, _ = clean.calls[0]
    # Uniform on [3, 4), blurred by about 0.0025: mean and variance within five standard errors.
    assert abs(float(x.mean()) - 3.5) < 5 * math.sqrt(1 / 12 / x.numel())
    assert abs(float(x.var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / x.numel())
    assert_uncorrelated(*x.T, t)
    config["loss"] = {"weighting": "simple", "time": {"name": "log_normal", "mean": 4.0, "std": 0.1}}
    train(config, network=noisy, dataset=data)
    noise, t, _ = noisy.calls[0]
    # What is left of the data, 3.5 e^-4 or so, adds to the mean.
    assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel()) + 3.5 * 1.5 * math.exp(-4)
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / noise.numel())
    assert_uncorrelated(*noise.T, *x.T, t)


@pytest.mark.parametrize("flip", [False, True])
def test_half_of_the_images_are_flipped_if_asked(tiny, recorder, flip):
    network = recorder()
    image = torch.zeros(1, 1, 2, 4)
    image[..., 0] = 10
    config = tiny(flip=flip, model={"prediction": "x0"}, loss=NEARLY_CLEAN, train={"steps": 4, "batch_size": 1000})
    train(config, network=network, dataset=image)
    x, t = (torch.cat(column) for column in zip(*((x, t) for x, t, _ in network.calls), strict=True))
    plain, mirrored = ((x - candidate).abs().amax((1, 2, 3)) < 1 for candidate in (image, image.flip(-1)))
    assert (plain ^ mirrored).all()
    if flip:
        # Binomial: five standard deviations.
        assert abs(int(mirrored.sum()) - 2000) < 5 * math.sqrt(4000 / 4)
        assert_uncorrelated(mirrored.float(), t)
    else:
        assert not mirrored.any()


# Networks and data of one's own


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.input, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.output = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, t):
        h = self.inner(torch.relu(self.input(x.to(memory_format=torch.channels_last))))
        return self.output(torch.relu(h))


class Pairs(Dataset):
    """A user's data set; its labels are served because it says how many classes it has."""

    def __init__(self, items, classes=0):
        self.items, self.classes = items, classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize(
    "dataset",
    [
        torch.randn(9, 3, generator=torch.Generator().manual_seed(0)),
        torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32),
        Pairs(list(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))),
    ],
    ids=["tensor", "float64", "array", "Dataset"],
)
def test_data_and_network_of_ones_own(tiny, tmp_path, dataset):
    torch.manual_seed(0)

    class Linear(nn.Linear):
        def forward(self, x, t):
            return super().forward(torch.cat([x, t[:, None]], 1))

    result = train(tiny(workdir=str(tmp_path)), network=Linear(4, 3), dataset=dataset)
    assert (result.model.data_shape, result.model.data.bits, result.workdir) == ((3,), None, tmp_path)
    assert sample(load(tmp_path, network=Linear(4, 3)), 2, solver="heun", steps=2).samples.shape == (2, 3)


def test_labels_reach_the_network_with_their_data(tiny, recorder):
    network = recorder(classes=4)
    data = Pairs([(torch.full((2,), 10.0 * label), label) for label in (0, 1, 2, 3)], classes=4)
    config = tiny(model={"prediction": "x0"}, loss=NEARLY_CLEAN, train={"steps": 200, "label_dropout": 0.25})
    train(config, network=network, dataset=data)
    hidden = 0
    for x, _, label in network.calls:
        # The label past the last stands for none.
        assert ((label == 4) | (label == (x[:, 0] / 10).round().long())).all()
        hidden += int((label == 4).sum())
    count = sum(len(x) for x, _, _ in network.calls)
    assert abs(hidden - 0.25 * count) < 4 * math.sqrt(0.25 * 0.75 * count)
    train(config, network=(unlabelled := recorder()), dataset=data)
    assert all(label is None for _, _, label in unlabelled.calls)


def test_a_network_with_classes_learns_and_draws_them(tiny, images, tmp_path):
    network = {
        "name": "unet",
        "base_channels": 4,
        "channel_multipliers": [1],
        "blocks_per_level": 1,
        "classes": 3,
    }
    config = tiny(
        workdir=str(tmp_path), network=network, train={"sample_every": 8, "sample_count": 4, "label_dropout": 0.0}
    )
    result = train(config, dataset=images)
    # The table of labels is used: its three rows have moved, the row for no label has not.
    start = train({**config, "workdir": "", "train": {**config["train"], "steps": 0}}, dataset=images)
    moved = result.raw_model.network.condition.table.weight != start.raw_model.network.condition.table.weight
    assert moved.any(1).tolist() == [True, True, True, False]
    assert (tmp_path / "samples/00000008.png").exists()


def test_labels_that_do_not_fit_are_named(tiny, images):
    network = {"name": "mlp", "classes": 2}
    with pytest.raises(ConfigError, match=r"network\.classes = 2: the data set has 3 classes"):
        train(tiny(network=network), dataset=images)
    with pytest.raises(ConfigError, match=r"network\.classes is set, but the data set has no labels"):
        train(tiny(network=network))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_are_not_finite_are_named(tiny, workers):
    values = torch.zeros(9, 2)
    values[7, 1] = math.nan
    with pytest.raises(ValueError, match=r"values must be finite; the first that is not is at index 7"):
        train(tiny(), dataset=values)
    with pytest.raises(ValueError, match=r"values must be finite; the first that is not is at index 7"):
        train(tiny(train={"workers": workers}), dataset=Pairs(list(values)))
    # A data set with all attributes of its own is used as it is.
    unchecked = Pairs(list(values))
    unchecked.data_shape, unchecked.data = (2,), DataInfo(bits=None)
    with pytest.raises(ValueError, match=r"dataset: a value in the batch of step \d is NaN or infinite"):
        train(tiny(train={"workers": workers}), dataset=unchecked)


def test_images_that_cannot_be_halved_are_named(tiny):
    network = {"name": "unet", "base_channels": 4, "channel_multipliers": (1, 1, 1)}
    with pytest.raises(ValueError, match=r"data_shape must be .* divisible by 4.* got \(1, 6, 8\)"):
        train(tiny(network=network), dataset=torch.zeros(3, 1, 6, 8))


def test_data_of_another_shape_than_the_run_are_refused(tiny, tmp_path):
    interrupt(tiny(workdir=str(tmp_path)), 4, torch.zeros(9, 2))
    with pytest.raises(CheckpointError, match=r"raw\.safetensors: tensor network\.input\.weight"):
        train(tiny(workdir=str(tmp_path)), dataset=torch.zeros(9, 3))


# When it goes wrong


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    config = tiny(
        workdir=str(tmp_path),
        optim={"lr": 1e30, "warmup": 0, "schedule": "constant"},
        train={"checkpoint_every": 1},
    )
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step \d: lower optim\.lr"):
        train(config)
    assert 1 <= int(newest_checkpoint(tmp_path).name) < 8
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path))
    for model in (load(tmp_path), load(tmp_path, raw=True)):
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tiny, tmp_path, log_every):
    class Breaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.calls = nn.Parameter(torch.tensor(0.5)), 0

        def forward(self, x, t):
            self.calls += 1
            if self.calls == 4:
                self.scale.register_hook(lambda gradient: gradient * math.nan)
            return self.scale * x

    config = tiny(workdir=str(tmp_path), train={"checkpoint_every": 2, "log_every": log_every})
    with pytest.raises(TrainingError, match="grad_norm is nan at step 4"):
        train(config, network=Breaking())
    assert newest_checkpoint(tmp_path).name == "00000002"
    assert load(tmp_path, network=Breaking(), raw=True).network.scale.isfinite()


@pytest.mark.parametrize("device", ["nonsense", "cpu0", ""])
def test_an_unknown_device_is_named(tiny, device):
    with pytest.raises(ConfigError, match=rf"train\.device = '{device}': must be 'auto' or a device"):
        train(tiny(train={"device": device}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a device that is not there")
def test_a_device_that_is_not_there_is_named(tiny):
    with pytest.raises(ConfigError, match=r"train\.device = 'cuda': must be 'auto' or a device"):
        train(tiny(train={"device": "cuda"}))


def test_the_device_is_chosen(tiny):
    expected = torch.accelerator.current_accelerator() or torch.device("cpu")
    for name, device in (("cpu", "cpu"), ("auto", expected.type)):
        result = train(tiny(train={"device": name, "steps": 1}))
        assert {p.device.type for m in (result.model, result.raw_model) for p in m.parameters()} == {device}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["accelerator", "cpu", "python"],
)
def test_what_to_lower_is_said_where_memory_does_not_suffice(tiny, recorder, error):
    class Large(recorder):
        def forward(self, x, t):
            raise error

    with pytest.raises(TrainingError, match=r"raise train\.accumulation = 2.* batch of 4 .*'fsdp'") as raised:
        train(tiny(train={"accumulation": 2}), network=Large())
    assert raised.value.__cause__ is error
    assert str(error) in str(raised.value)


def test_another_error_of_a_step_stays_what_it_is(tiny, recorder):
    class Wrong(recorder):
        def forward(self, x, t):
            raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match=r"^of the user's own$"):
        train(tiny(), network=Wrong())


# Checkpoints while training goes on


class Events(Callback):
    """What a run tells of, in order; ``act`` is called with its steps."""

    def __init__(self, act=lambda step: None):
        self.act, self.seen = act, []

    def metrics(self, run):
        self.seen.append(run.step)
        self.act(run.step)

    def checkpoint(self, run, path):
        assert path == newest_checkpoint(run.workdir)
        self.seen.append(path.name.lstrip("0"))


def test_training_goes_on_while_a_checkpoint_is_written(tiny, tmp_path, monkeypatch):
    config = tiny(workdir=str(tmp_path / "blocking"), train={"keep_checkpoints": 9, "async_checkpoints": False})
    blocking = Events()
    train(config, callbacks=[blocking])
    assert blocking.seen == [1, 2, "3", 3, 4, 5, "6", 6, 7, "8", 8]
    may_write, write = threading.Event(), Contents.write

    def late(self, path):
        assert may_write.wait(20)
        write(self, path)

    def act(step):
        if step == 5:
            assert newest_checkpoint(tmp_path / "background") is None
            may_write.set()

    monkeypatch.setattr(Contents, "write", late)
    config = tiny(workdir=str(tmp_path / "background"), train={"keep_checkpoints": 9})
    background = Events(act)
    train(config, callbacks=[background])
    # Of the one before, when the next is due; of the last, before the end.
    assert background.seen == [1, 2, 3, 4, 5, "3", 6, 7, "6", 8, "8"]
    # Each has the weights of its step, though they have moved on since.
    for step in ("00000003", "00000006", "00000008"):
        one, other = (tmp_path / name / "checkpoints" / step for name in ("blocking", "background"))
        for name in ("raw.safetensors", "model.safetensors", "optimizer.safetensors"):
            expected, found = load_file(one / name), load_file(other / name)
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert (one / "state.json").read_bytes() == (other / "state.json").read_bytes()


@pytest.mark.parametrize(("step", "left"), [(3, []), (6, ["00000003"]), (8, ["00000003", "00000006"])])
@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tiny, tmp_path, monkeypatch, step, left, background):
    write = Contents.write

    def full(self, path):
        if f"partial-{step:08d}" in str(path):
            raise OSError("no space left")
        write(self, path)

    monkeypatch.setattr(Contents, "write", full)
    config = tiny(workdir=str(tmp_path), train={"async_checkpoints": background})
    with pytest.raises(CheckpointError, match=rf"{step:08d} cannot be written: no space left; .* takes .* MB, and"):
        train(config)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == left


# What a run leaves


def test_callbacks_follow_every_line(tiny, tmp_path):
    seen = []

    def callback(result):
        seen.append(copy.deepcopy(result))
        assert metrics(tmp_path)[-1]["step"] == result.step

    order = []
    callbacks = [callback, lambda result: order.append(1), lambda result: order.append(2)]
    final = train(tiny(workdir=str(tmp_path), train={"log_every": 3}), callbacks=callbacks)
    assert [result.step for result in seen] == [3, 6, 8]
    assert order == [1, 2] * 3
    assert [result.metrics["step"] for result in seen] == [3, 6, 8]
    assert len({result.metrics["loss"] for result in seen}) == 3
    assert all(result.workdir == tmp_path for result in seen)
    assert final.metrics == seen[-1].metrics
    assert not torch.equal(seen[0].raw_model.network.input.weight, seen[1].raw_model.network.input.weight)
    # The checkpoint of a step is there when its callbacks are called.
    interrupt(tiny(workdir=str(tmp_path / "other")), 6)
    assert newest_checkpoint(tmp_path / "other").name == "00000006"


def test_tensorboard_has_each_value_once(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path))
    interrupt(config, 5)
    train(config)
    board = EventAccumulator(str(tmp_path / "tensorboard/metrics")).Reload()
    shares = {f"share_{part}" for part in ("data", "network", "optimizer", "average", "logging")}
    assert set(board.Tags()["scalars"]) == {"loss", "grad_norm", "lr", "images_per_second", *shares}
    for name in ("loss", "grad_norm", "lr"):
        events = [(event.step, event.value) for event in board.Scalars(name)]
        expected = [(line["step"], line[name]) for line in metrics(tmp_path)]
        assert [step for step, _ in events] == [step for step, _ in expected] == list(range(1, 9))
        np.testing.assert_allclose([v for _, v in events], [v for _, v in expected], rtol=1e-6)


def test_pictures_are_drawn(kind, tmp_path):
    config, dataset = kind
    options = {**config["train"], "sample_every": 4, "sample_count": 5}
    train({**config, "workdir": str(tmp_path), "train": options}, dataset=dataset)
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == ["00000004.png", "00000008.png"]
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            # Three columns and two rows of 8 x 8, three times enlarged, two pixels apart; or a plot.
            assert picture.size == ((3 * 26 + 2, 2 * 26 + 2) if dataset is not None else (600, 600))
            assert len(set(picture.convert("L").tobytes())) > 2


def test_nothing_is_written_without_a_directory(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(tiny(train={"sample_every": 2, "sample_count": 1}))
    assert (result.workdir, result.step) == (None, 8)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_ones_own_is_trained_in_place_and_its_average_is_a_copy(tiny, recorder):
    network = recorder()
    result = train(tiny(), network=network)
    assert result.raw_model.network is network
    assert result.model.network is not network
    assert network.scale != 0.5


@pytest.mark.parametrize(
    ("network", "sections", "message"),
    [
        (torch.nn.Identity(), {}, "network has no parameters"),
        (None, {"flip": True}, r"flip = True: the data have shape \(2,\)"),
        (None, {"network": {"name": "mlp", "width": "8"}}, "network, sde, model, loss or optim: an option is of"),
        (
            None,
            {"loss": {"weighting": {"name": "min_snr", "gamma": "5"}}},
            "model, loss or optim: an option is of the wrong",
        ),
        (None, {"loss": {"weighting": {"name": "min_snr", "gamma": -1}}}, "gamma = -1: must be positive"),
        (None, {"loss": {"time": {"name": "log_normal", "std": 0.0}}}, r"std = 0\.0: must be positive"),
        (None, {"loss": {"weighting": "hybrid"}}, r"'hybrid', model\.learned_variance = False"),
        (None, {"model": {"learned_variance": True}}, r"'edm', model\.learned_variance = True"),
    ],
)
def test_what_does_not_fit_together_is_named(tiny, network, sections, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(**sections), network=network)


def test_a_network_of_another_output_shape_is_refused(tiny):
    class Wide(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    with pytest.raises(ValueError, match=r"network returned shape \(\d+, 1\)"):
        train(tiny(), network=Wide(2, 1))


def test_a_data_set_of_another_size_is_refused(tiny, tmp_path):
    config = tiny(workdir=tmp_path)
    train(config, dataset=torch.randn(50, 2))
    with pytest.raises(ValueError, match=r"dataset has 40 examples: the run in .* was trained on 50"):
        train(config, dataset=torch.randn(40, 2))


def test_a_finished_run_returns_its_last_metrics(tiny, tmp_path):
    config = tiny(workdir=tmp_path)
    assert train(config).metrics == train(config).metrics != {}


def test_data_that_cannot_be_drawn_train_without_pictures(tiny, tmp_path):
    config = tiny(workdir=tmp_path, train={"sample_every": 1})
    train(config, dataset=torch.randn(20, 5))
    assert not (tmp_path / "samples").exists()
