"""The commands as a user types them."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sde_diffusion import load, pretrained, solvers
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


def test_likelihood_of_continuous_data(run, tmp_path, capsys):
    output = tmp_path / "folder"
    assert main(["likelihood", f"--workdir={run}", "--count=3", "--batch_size=2", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    (mean,) = re.findall(r"nats/dim of 3 test examples: (-?[\d.]+)\n", printed)
    assert "standard error of the estimator (probes): 0." in printed
    assert re.search(r"density at t_min = [\d.e-]+; nfe \d+, products with the derivative \d+, [\d.]+ seconds", printed)
    assert f"see {output / 'histogram.png'}" in printed
    result = json.loads((output / "result.json").read_text())
    assert (result["count"], result["quantity"]) == (3, "nats_per_dim")
    assert result["mean"] == pytest.approx(float(mean), abs=5e-5)
    settings = result["settings"]
    weights = next((run / "checkpoints").glob("*/model.safetensors")).read_bytes()
    assert settings["model"] == hashlib.sha256(weights).hexdigest()
    assert settings["data"] == {"name": "spiral", "size": 10_000}
    assert (settings["measure"], settings["split"], settings["options"]["probes"]) == ("likelihood_measure", "test", 8)
    with Image.open(output / "histogram.png") as picture:
        assert picture.width > 0


def test_an_evaluation_goes_on_in_the_directory_of_the_run(run, capsys):
    def likelihood(*arguments):
        code = main(["likelihood", f"--workdir={run}", "--trace=exact", *arguments])
        return code, capsys.readouterr()

    assert likelihood("--count=3")[0] == 0
    directory = run / "likelihood_test"
    assert likelihood("--count=5", "--batch_size=1")[0] == 0
    assert sum(len(path.read_text().splitlines()) for path in directory.glob("*.jsonl")) == 5
    code, printed = likelihood("--count=5", "--rtol=1e-3")
    assert code == 2
    assert f"options.rtol = 0.001: the examples in {directory} were evaluated with None" in printed.err
    code, printed = likelihood("--split=train", "--count=2", "--seed=1")
    assert (code, (run / "likelihood_train" / "result.json").exists()) == (0, True)
    assert "nats/dim of 2 train examples" in printed.out


def test_the_whole_split_is_evaluated_by_default(run, tmp_path, capsys):
    size = ["--option=size=7", "--dataset=spiral", f"--output={tmp_path}"]
    assert main(["bound", f"--workdir={run}", "--steps=2", *size]) == 0
    assert "of 7 test examples" in capsys.readouterr().out


def test_ranks_of_torchrun_share_the_examples(run, tmp_path, capsys, monkeypatch):
    outputs = []
    for rank, ranks in ((2, 3), (0, 3), (1, 3)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        assert main(["bound", f"--workdir={run}", "--count=2", "--steps=3", f"--output={tmp_path}"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("rank 2 of 3: its 0 examples are done")
    assert outputs[1].startswith("rank 0 of 3: its 1 examples are done")
    assert outputs[2].startswith("bound on the nats/dim of 2 test examples: ")
    assert json.loads((tmp_path / "result.json").read_text())["ranks"] == 3


def test_an_interruption_says_how_to_go_on(run, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sde_diffusion.cli.evaluate_dataset", interrupt)
    assert main(["bound", f"--workdir={run}"]) == 2
    assert "interrupted; the same command goes on with the examples that are left\n" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_gives_the_result_of_one_process(run, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "sde_diffusion"]
    arguments = ["likelihood", f"--workdir={run}", "--count=9", "--batch_size=2"]
    shared = subprocess.run(
        [*launch, *arguments, f"--output={tmp_path / 'two'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert shared.returncode == 0, shared.stderr
    assert "nats/dim of 9 test examples" in shared.stdout
    assert main([*arguments, f"--output={tmp_path / 'one'}"]) == 0
    two, one = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one"))
    assert len(list((tmp_path / "two").glob("*.jsonl"))) == 2
    assert (two["ranks"], two["count"], two["settings"]) == (2, 9, one["settings"])
    # Batches of other examples take other steps.
    assert two["mean"] == pytest.approx(one["mean"], abs=1e-3)


def test_likelihood_with_the_bounds_beside_it(run, tmp_path, capsys):
    arguments = ["--bounds", "--count=3", "--chain_steps=20", "--terms=4", f"--output={tmp_path}"]
    assert main(["likelihood", f"--workdir={run}", *arguments]) == 0
    printed = capsys.readouterr().out
    assert [line.split(";")[0] for line in re.findall(r"  (-log density.*|variational.*)", printed)] == [
        "-log density of the probability-flow ODE",
        "variational, of the chain of 20 steps",
        "variational, of the limit of continuous time",
    ]
    for folder, steps in (("bound_discrete", 20), ("bound_continuous", "inf")):
        result = json.loads((tmp_path / folder / "result.json").read_text())
        assert result["settings"]["options"]["steps"] == steps
        assert result["totals"] == {"nfe": 3 * 2 * 5}
        assert f"{result['mean']:.4f}" in printed
        assert (tmp_path / folder / "histogram.png").exists()


def test_bound_of_continuous_data_and_its_parts(run, tmp_path, capsys):
    arguments = ["--count=3", "--steps=5", "--variance=0.5", f"--output={tmp_path}"]
    assert main(["bound", f"--workdir={run}", *arguments]) == 0
    printed = capsys.readouterr().out
    (bound,) = re.findall(r"bound on the nats/dim of 3 test examples: (\S+)\n", printed)
    assert re.search(r"standard error of the estimator \(repeats\): [\d.]+\n", printed)
    assert re.search(r"standard error over examples \(sampling\):   [\d.]+\n", printed)
    parts = [float(part) for part in re.findall(r"L_T (\S+), sum of L_t (\S+), L_0 (\S+); nfe 10,", printed)[0]]
    # Three digits each.
    assert sum(parts) == pytest.approx(float(bound), abs=0.005 * max(map(abs, parts)) * 3)


def test_bound_of_the_shipped_model_in_the_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bound", "--count=1", "--steps=inf", "--terms=2", "--repeats=1", "--codes=dequantized"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"bound on the bits/dim of 1 test examples: [\d.]+\n", printed)
    assert "standard error of the estimator (repeats): not estimated\n" in printed
    assert (tmp_path / "outputs" / "bound_test" / "result.json").exists()


def test_info_counts_the_network_of_a_config_or_a_run(run, capsys):
    assert main(["info", CONFIG, *SMALL]) == 0
    printed = capsys.readouterr().out
    # Two coordinates and 64 features of time, three hidden layers of 8.
    weights, biases = (2 + 64) * 8 + 2 * 8 * 8 + 8 * 2, 3 * 8 + 2
    assert printed.startswith("mlp(activation='silu', classes=0, depth=3, ")
    assert ", data of shape (2,)\n\nlayer " in printed
    assert f"\n{weights + biases} parameters, " in printed
    assert f"\nan example: {2 * weights / 1000:.4g} kFLOP forward, " in printed
    assert " kept for the backward pass, in float32\n" in printed
    # The data need no gradient, which spares the first layer one of its products.
    both = 6 * weights - 2 * (2 + 64) * 8
    assert f"\na batch of 8: {8 * both / 1000:.4g} kFLOP with the backward pass\n" in printed
    assert main(["info", f"--workdir={run}"]) == 0
    assert capsys.readouterr().out.partition("\n\n")[2] == printed.partition("\n\n")[2]


def test_info_needs_no_data_whose_shape_is_given(capsys):
    config = f"--config={ROOT / 'configs' / 'cifar10_ddpm.py'}"
    small = ["--config.network.base_channels=8", "--config.data.path=nowhere", "--config.train.precision=bfloat16"]
    assert main(["info", config, *small, "--shape=1,16,32"]) == 0
    printed = capsys.readouterr().out
    assert "data of shape (1, 16, 32)\n" in printed
    assert " x 16 x 32 " in printed
    assert " kept for the backward pass, in bfloat16\n" in printed
    assert main(["info", config, *small]) == 2
    assert "without the data, give their shape, as in --shape=3,32,32" in capsys.readouterr().err


def test_info_of_the_shipped_model(capsys):
    assert main(["info"]) == 0
    parameters = sum(parameter.numel() for parameter in load(pretrained("fashion_mnist")).parameters())
    assert f"\n{parameters:,} parameters, " in capsys.readouterr().out


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
        (["likelihood", "--count=0"], "count = 0: must be at least 1"),
        (["likelihood", "--probes=0"], "probes = 0"),
        (["likelihood", "--draws=2"], "--draws=2: the data are continuous"),
        (["likelihood", "--dataset=mnist"], "--dataset=mnist: must be one of fashion_mnist, idx,"),
        (["likelihood", "--dataset=fashion_mnist"], "--dataset=fashion_mnist: its examples have shape (1, 28, 28)"),
        (["likelihood", "--split=valid"], "value should be one of <train|test>"),
        (["likelihood", "--option=folder=x"], "data set 'spiral' has no option folder; it has size"),
        (["bound", "--count=0"], "count = 0: must be at least 1"),
        (["bound", "--steps=2.5"], "steps = 2.5: must be a whole number"),
        (["bound", "--variance=large"], "variance = 'large'"),
        (["info", CONFIG, "--shape=3,0"], "--shape=3,0: must be positive whole numbers"),
        (["info", CONFIG, "--shape=3x32"], "--shape=3x32: must be positive whole numbers"),
        (["info", CONFIG, "--workdir=x"], "--workdir=x and --config: give one of them"),
        (["info", CONFIG, "--config.network.width=wide"], "--config.network.width=wide"),
        (["info", "--workdir=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_prints_one_line_and_exits_2(run, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] in ("sample", "likelihood", "bound") and "--workdir=nowhere" not in arguments:
        arguments = [*arguments, f"--workdir={run}"]
    if arguments[0] in ("likelihood", "bound"):
        arguments = [*arguments, f"--output={tmp_path / 'folder'}"]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["sample", "--help"], ["likelihood", "-h"], ["bound", "-h"], ["info", "-h"]],
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
