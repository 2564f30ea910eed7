"""The commands as a user types them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sde_diffusion import solvers
from sde_diffusion.cli import main

ROOT = Path(__file__).parent.parent
CONFIG = f"--config={ROOT / 'configs' / 'spiral.py'}"
SMALL = [
    "--config.train.steps=4",
    "--config.train.batch_size=8",
    "--config.train.sample_every=0",
    "--config.network.width=8",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a tiny finished run on the spiral."""
    workdir = tmp_path_factory.mktemp("run")
    assert main(["train", CONFIG, f"--workdir={workdir}", *SMALL]) == 0
    return workdir


def test_train_writes_a_run_with_the_overrides(run, capsys):
    config = json.loads((run / "config.json").read_text())
    assert (config["train"]["steps"], config["network"]["width"]) == (4, 8)
    assert main(["train", CONFIG, f"--workdir={run}", *SMALL]) == 0
    assert "4 steps done" in capsys.readouterr().out


@pytest.mark.parametrize("solver", ["em", "ode", "heun", "ddim", "ddpm", "torchsde"])
def test_sample_writes_a_picture_and_prints_nfe_and_seconds(run, solver, tmp_path, capsys):
    output = tmp_path / "folder" / "samples.png"
    steps = [] if solver == "ode" else ["--steps", "3"]
    assert main(["sample", f"--workdir={run}", "--solver", solver, *steps, "--count=5", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"solver {solver}, nfe \d+, [\d.]+ seconds, 5 samples", printed)
    with Image.open(output) as picture:
        assert picture.width > 0


def test_overrides_reach_every_kind_of_field(tmp_path):
    workdir = tmp_path / "run"
    # The network is an MLP already: naming it again leaves its width.
    sections = [
        "--config.network.name=mlp",
        "--config.data.name=moons",
        "--config.data.size=30",
        "--config.sde.name=edm",
        "--config.sde.sigma_max=40",
    ]
    assert main(["train", CONFIG, f"--workdir={workdir}", *SMALL, *sections]) == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["data"] == {"name": "moons", "size": 30}
    assert config["network"]["width"] == 8
    assert config["sde"] == {"name": "edm", "sigma_min": 0.002, "sigma_max": 40.0}


def test_a_field_that_holds_none_can_be_set(tmp_path, capsys):
    folder = tmp_path / "empty"
    config = f"--config={ROOT / 'configs' / 'demo.py'}"
    assert main(["train", config, f"--workdir={tmp_path / 'run'}", f"--config.data.path={folder}"]) == 2
    assert str(folder) in capsys.readouterr().err


def test_sample_passes_solver_options(run, tmp_path, capsys):
    output = f"--output={tmp_path / 'samples.png'}"
    arguments = ["sample", f"--workdir={run}", "--solver=ode", "--count=2", output]
    assert main([*arguments, "--option=method=rk4", "--steps=5"]) == 0
    assert "nfe 20," in capsys.readouterr().out
    assert main([*arguments, "--option=metod=rk4"]) == 2
    assert "solver 'ode' takes method, rtol, atol" in capsys.readouterr().err


def test_sample_takes_a_grid_and_how_to_end(run, tmp_path, capsys):
    output = f"--output={tmp_path / 'samples.png'}"
    arguments = ["sample", f"--workdir={run}", "--solver=ddim", "--count=2", "--steps=5", output]
    assert main([*arguments, "--grid=quadratic", "--threshold=dynamic", "--denoise", "--progress"]) == 0
    printed = capsys.readouterr()
    assert "nfe 6," in printed.out
    assert "5/5" in printed.err


def test_likelihood_of_continuous_data(run, capsys):
    assert main(["likelihood", f"--workdir={run}", "--count=3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"log-likelihood of 3 test examples: -?[\d.]+ nats", printed)
    assert "density at t_min = " in printed


def test_bound_of_continuous_data_and_its_parts(run, capsys):
    assert main(["bound", f"--workdir={run}", "--count=3", "--steps=5", "--variance=0.5"]) == 0
    printed = capsys.readouterr().out
    (bound,) = re.findall(r"bound on the nats/dim of 3 test examples: (\S+)\n", printed)
    assert re.search(r"standard error of the estimator \(repeats\): [\d.]+\n", printed)
    assert re.search(r"standard error over examples \(sampling\):   [\d.]+\n", printed)
    parts = [float(part) for part in re.findall(r"L_T (\S+), sum of L_t (\S+), L_0 (\S+); nfe 10,", printed)[0]]
    # Three digits each.
    assert sum(parts) == pytest.approx(float(bound), abs=0.005 * max(map(abs, parts)) * 3)


def test_bound_of_the_shipped_model_in_the_limit(capsys):
    assert main(["bound", "--count=1", "--steps=inf", "--terms=2", "--codes=dequantized"]) == 0
    assert re.search(r"bound on the bits/dim of 1 test examples: [\d.]+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "'dance' is no command; there are train | sample | likelihood | bound"),
        (["train"], "--config is missing"),
        (["train", CONFIG], "--workdir is missing"),
        (["train", "--config=nowhere.py"], "config = 'nowhere.py': no such file"),
        (
            ["train", CONFIG, "--config.optim.lrr=1", "--workdir=x"],
            "--config.optim.lrr: no such field; did you mean optim.lr",
        ),
        (["train", CONFIG, "--config.train.steps=abc", "--workdir=x"], "--config.train.steps=abc"),
        (
            ["train", CONFIG, "--config.sde.name=vpp", "--workdir=x"],
            "sde.name = 'vpp': must be one of vp, subvp",
        ),
        (["train", "--config.optim.lr=1", "--workdir=x"], "give --config=FILE too"),
        (["train", CONFIG, "--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
        (["train", CONFIG, "word"], "'word' is not a flag"),
        (["sample", "--solver=odee"], f"value should be one of <{'|'.join(solvers())}>"),
        (["sample", "--steps=0"], "steps = 0: must be at least 1"),
        (["sample", "--steps=3", "--nfe=3"], "steps = 3 and nfe = 3: give one of them"),
        (["sample", "--workdir=nowhere"], "nowhere"),
        (["sample", "--option=eta"], "--option=eta: must be NAME=VALUE"),
        (["sample", "--option=steps=5"], "--option=steps: solver 'auto' takes rtol, atol"),
        (["sample", "--option=rtol=abc"], "rtol = 'abc': solver 'auto' takes a float there"),
        (["sample", "--count=0"], "n = 0"),
        (["sample", "--label=3"], "--label=3: the model has 0 classes"),
        (["sample", "--device=abacus"], "device = 'abacus': must be 'auto'"),
        (["likelihood", "--count=0"], "--count=0: must be at least 1"),
        (["likelihood", "--probes=0"], "probes = 0"),
        (["bound", "--count=0"], "--count=0: must be at least 1"),
        (["bound", "--steps=2.5"], "steps = 2.5: must be a whole number"),
        (["bound", "--variance=large"], "variance = 'large'"),
    ],
)
def test_a_mistake_prints_one_line_and_exits_2(run, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] in ("sample", "likelihood", "bound") and "--workdir=nowhere" not in arguments:
        arguments = [*arguments, f"--workdir={run}"]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["sample", "--help"], ["likelihood", "-h"], ["bound", "-h"]]
)
def test_help_prints_a_page_and_exits_0(arguments, capsys):
    assert main(arguments) == 0
    assert "usage: python -m sde_diffusion" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "sde_diffusion"],
        ["examples/sample.py"],
        ["examples/likelihood.py"],
        ["examples/bound.py"],
        ["examples/train.py"],
    ],
)
def test_entry_points_start(command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
