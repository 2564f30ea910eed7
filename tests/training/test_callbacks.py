"""Callbacks by themselves, and the one that logs to Weights & Biases, in whose place stands a record of its calls."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import sde_diffusion as sd
from sde_diffusion.training.callbacks import Callback, as_callback

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "wandb_callback.py"


class Stop(Exception):
    """What ends a run."""


def stop_at(step):
    def callback(run):
        if run.step == step:
            raise Stop

    return callback


@pytest.fixture
def run():
    """A run's state as callbacks are given it."""
    return sd.TrainResult(None, None, 3, None, {"step": 3, "loss": 0.5})


def test_a_callback_does_nothing_by_itself(run):
    callback = Callback()
    before = dict(vars(run))
    callback.begin(run)
    callback.metrics(run)
    callback.evaluation(run)
    callback.checkpoint(run, Path("checkpoints"))
    callback.end(run, None)
    assert vars(run) == before
    assert not run.stop


def test_a_function_is_called_after_every_line_of_metrics(run):
    calls = []
    callback = as_callback(calls.append)
    callback.begin(run)
    callback.evaluation(run)
    assert calls == []
    callback.metrics(run)
    assert calls == [run]


def test_a_callback_stays_what_it_is():
    callback = Callback()
    assert as_callback(callback) is callback


@pytest.mark.parametrize("wrong", [Callback, 3, None, "metrics"])
def test_what_is_no_callback_is_refused(wrong):
    with pytest.raises(TypeError, match=r"callbacks: .* must be a Callback, or a function of a TrainResult"):
        as_callback(wrong)


# The example


class Wandb:
    """As much of wandb as is used, which remembers what it is told."""

    def __init__(self):
        self.inits, self.lines, self.codes = [], [], []

    def init(self, **options):
        self.inits.append(options)
        return SimpleNamespace(
            log=lambda numbers, step: self.lines.append((step, numbers)),
            finish=lambda exit_code: self.codes.append(exit_code),
        )

    def Image(self, path, caption):
        assert Path(path).exists()
        return caption

    def pictures(self):
        return [numbers["samples"] for _, numbers in self.lines if "samples" in numbers]


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def example():
    return runpy.run_path(str(EXAMPLE))


def test_a_run_is_logged_and_goes_on_under_its_id(wandb, example, tiny, tmp_path):
    config = tiny(workdir=str(tmp_path), train={"steps": 8, "log_every": 2, "sample_every": 3, "sample_count": 2})
    logger = example["WeightsAndBiases"]

    with pytest.raises(Stop):
        sd.train(config, callbacks=[logger({"seed": 0}, "a project", offline=True), stop_at(4)])
    (first,) = wandb.inits
    assert (first["project"], first["mode"], first["resume"]) == ("a project", "offline", "allow")
    assert (first["config"], first["dir"]) == ({"seed": 0}, str(tmp_path))
    assert [step for step, numbers in wandb.lines if "loss" in numbers] == [2, 4]
    assert not any("step" in numbers for _, numbers in wandb.lines)
    assert wandb.pictures() == ["step 3"]
    assert wandb.codes == [1]

    # From the checkpoint at step 3.
    sd.train(config, callbacks=[logger({"seed": 0})])
    assert wandb.inits[1]["id"] == first["id"]
    assert wandb.inits[1]["mode"] is None
    assert [step for step, numbers in wandb.lines if "loss" in numbers] == [2, 4, 4, 6, 8]
    assert wandb.pictures() == ["step 3", "step 6"]
    assert wandb.codes == [1, 0]


def test_an_evaluation_is_logged(wandb, example, run):
    logger = example["WeightsAndBiases"]({})
    logger.begin(run)
    run.evaluation = {"step": 3, "held_out_loss": 0.25}
    logger.evaluation(run)
    assert wandb.lines == [(3, {"held_out_loss": 0.25})]
    assert wandb.inits[0]["id"] is None


def test_other_ranks_log_nothing(wandb, example, run):
    run.rank = 1
    logger = example["WeightsAndBiases"]({})
    logger.begin(run)
    logger.metrics(run)
    logger.evaluation(run)
    logger.end(run, None)
    assert wandb.inits == wandb.lines == wandb.codes == []


def test_without_wandb_it_says_what_to_install(monkeypatch, example):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        example["WeightsAndBiases"]({})


def test_its_command_trains_a_config(wandb, monkeypatch, capsys, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from sde_diffusion.training import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.data, config.network = 'spiral', {'name': 'mlp', 'width': 8}\n"
        "    config.train.steps, config.train.batch_size = 2, 4\n"
        "    return config\n"
    )
    workdir = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["wandb_callback.py", f"--config={config}", f"--workdir={workdir}", "--offline"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert capsys.readouterr().out == f"2 steps done; the run is in {workdir}\n"
    assert (wandb.inits[0]["mode"], wandb.inits[0]["project"]) == ("offline", "sde_diffusion")
    assert wandb.inits[0]["config"]["network"]["width"] == 8
    assert [step for step, _ in wandb.lines] == [2]
    assert wandb.codes == [0]


def test_the_examples_in_the_docs_run(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    names: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", text.partition("## Evaluation during a run\n")[2], re.DOTALL)
    for snippet in snippets:
        exec(snippet, names)
    assert names["evaluated"].step == names["evaluated"].evaluation["step"] == 20
    assert len([name for name in names["evaluated"].evaluation if name.startswith("held_out_loss")]) == 1 + 5
    loss, last = capsys.readouterr().out.splitlines()
    assert float(loss) > 0.01
    assert last == "20 steps, done"
