"""The learning rate of every step is the formula's, whatever the schedule, and however often a run is taken up."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sde_diffusion import default_config, train
from sde_diffusion.cli import main
from sde_diffusion.training import ConfigError, named
from sde_diffusion.training.schedules import SCHEDULES, InverseSqrt, Trapezoid

EVERY = {name: schedule() for name, schedule in SCHEDULES.items()}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (EVERY["constant"], [1, 1, 1, 1, 1]),
        (EVERY["linear"], [1, 0.75, 0.5, 0.25, 0]),
        (EVERY["cosine"], [1, 0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5, 0]),
        (InverseSqrt(50), [1, 2**-0.5, 0.5, 6**-0.5, 8**-0.5]),
        (EVERY["inverse_sqrt"], [1, 1, 1, 1, 1]),
        (EVERY["trapezoid"], [1, 1, 1, 1, 0]),
        (Trapezoid(0.5), [1, 1, 1, 0.5, 0]),
        (Trapezoid(1.0), [1, 0.75, 0.5, 0.25, 0]),
    ],
    ids=str,
)
def test_closed_forms(schedule, expected):
    found = [schedule(step, 400) for step in range(0, 401, 100)]
    # A few roundings each; the cosine's argument is itself rounded.
    assert found == pytest.approx(expected, rel=0, abs=4e-16)


@given(st.sampled_from(list(EVERY.values())), st.integers(1, 10**6), st.data())
def test_no_schedule_rises_or_leaves_the_unit_interval(schedule, steps, data):
    step = data.draw(st.integers(0, steps - 1))
    assert schedule(0, steps) == 1
    assert 0 < schedule(step, steps) <= 1
    assert schedule(step + 1, steps) <= schedule(step, steps)


def test_inverse_sqrt_does_not_know_the_number_of_steps():
    assert EVERY["inverse_sqrt"](40_000, 50_000) == EVERY["inverse_sqrt"](40_000, 10**9) == 0.5


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "trapezoid", "cooldown": 0.0}, r"cooldown = 0\.0: must be above 0 and at most 1"),
        ({"name": "trapezoid", "cooldown": 1.5}, r"cooldown = 1\.5: must be above 0 and at most 1"),
        ({"name": "inverse_sqrt", "reference": 0}, "reference = 0: must be positive"),
        ({"name": "trapezoid", "cooldown": "late"}, "optim: an option is of the wrong type"),
        ({"name": "cosine", "cooldown": 0.5}, r"optim\.schedule\.cooldown: cosine takes no options"),
        ("exponential", r"optim\.schedule\.name = 'exponential': must be one of constant, linear, cosine"),
    ],
)
def test_wrong_options_are_named(tiny, schedule, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(optim={"schedule": schedule}))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_follows_its_schedule_after_the_rise(tiny, name):
    rates, options = [], {"inverse_sqrt": {"reference": 2}, "trapezoid": {"cooldown": 0.5}}.get(name, {})
    config = tiny(optim={"schedule": {"name": name, **options}})
    train(config, callbacks=[lambda run: rates.append(run.metrics["lr"])])
    schedule = SCHEDULES[name](**options)
    rise = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]
    assert rates == pytest.approx([0.01 * rise[step] * schedule(step, 8) for step in range(8)], rel=1e-15)


def test_a_run_that_is_taken_up_is_where_its_schedule_was(tiny, tmp_path):
    rates = []

    class Stop(Exception):
        pass

    def callback(run):
        rates.append(run.metrics["lr"])
        if len(rates) == 3:
            raise Stop

    config = tiny(workdir=str(tmp_path), optim={"schedule": {"name": "trapezoid", "cooldown": 1.0}})
    with pytest.raises(Stop):
        train(config, callbacks=[callback])
    train(config, callbacks=[callback])
    rise = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]
    assert rates == pytest.approx([0.01 * rise[step] * (8 - step) / 8 for step in range(8)], rel=1e-15)


def test_a_schedule_and_its_options_can_be_set():
    config = default_config()
    assert config.optim.schedule.to_dict() == {"name": "cosine"}
    config.optim.schedule = "trapezoid"
    assert config.optim.schedule.to_dict() == {"name": "trapezoid", "cooldown": 0.2}
    config.optim.schedule.cooldown = 0.3
    config.optim.schedule = named("inverse_sqrt", reference=7)
    assert config.optim.schedule.to_dict() == {"name": "inverse_sqrt", "reference": 7}


def test_the_command_sets_a_schedule_and_its_options(tmp_path, capsys):
    config = Path(__file__).parents[2] / "configs" / "spiral.py"
    options = [f"--config={config}", f"--workdir={tmp_path}", "--config.optim.schedule=trapezoid"]
    options += ["--config.optim.schedule.cooldown=0.5", "--config.train.steps=4", "--config.network.width=8"]
    options += ["--config.optim.warmup=0", "--config.train.log_every=1", "--config.train.sample_every=0"]
    assert main(["train", *options]) == 0
    stored = json.loads((tmp_path / "config.json").read_text())["optim"]
    assert stored["schedule"] == {"name": "trapezoid", "cooldown": 0.5}
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([stored["lr"] * share for share in (1, 1, 1, 0.5)])


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_a_run_of_before_schedules_had_options_goes_on(tiny, tmp_path, name):
    config = tiny(workdir=str(tmp_path), optim={"schedule": name})
    whole = train({**config, "workdir": ""})

    def stop(run):
        if run.step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config, callbacks=[stop])
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    assert stored["optim"]["schedule"] == {"name": name}
    stored["optim"]["schedule"] = name
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=rf"optim\.schedule\.name = 'linear': the run in .* has '{name}'"):
        train(tiny(workdir=str(tmp_path), optim={"schedule": "linear"}))
    result = train(config)
    assert result.metrics["loss"] == whole.metrics["loss"]
    assert math.isfinite(result.metrics["loss"])
