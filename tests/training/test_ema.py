import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from sde_diffusion import VPSDE, DiffusionModel, load, post_hoc_average, train
from sde_diffusion.cli import main
from sde_diffusion.networks import build_network
from sde_diffusion.training import CheckpointError, ConfigError, load_config_file, resolve_config
from sde_diffusion.training.checkpoint import newest_checkpoint
from sde_diffusion.training.ema import (
    NARROWEST,
    WIDEST,
    Averages,
    Profile,
    combination_weights,
    inner_products,
    power_exponent,
)

REPOSITORY = Path(__file__).parents[2]
ROUNDING = 2.0**-24  # of a float32
STEPS = 40
SNAPSHOTS = {"further_decays": (0.5, 0.99), "widths": (0.05, 0.15), "snapshot_every": 4}

widths = st.floats(0.02, WIDEST)
steps = st.integers(1, 1000)


class Stop(Exception):
    """What a test interrupts a run with."""


def stop_at(step):
    def callback(result):
        if result.step == step:
            raise Stop

    return callback


def weights(model):
    """All of them in one vector, in float64."""
    return torch.cat([parameter.flatten() for parameter in model.parameters()]).double()


def profiles(steps, **averages):
    """What each average makes of the weights of every step, {name: (steps,)}: in a run whose k-th weights are e_k."""
    network = nn.Module()
    network.weight = nn.Parameter(torch.full((steps,), 7.0, dtype=torch.float64))
    model = DiffusionModel(network, VPSDE(), data_shape=(1,))
    kept = Averages(model, **averages)
    for step, row in enumerate(torch.eye(steps, dtype=torch.float64), start=1):
        network.weight.data.copy_(row)
        kept.update(model, step)
    return {name: weights(average) for name, average in kept.models.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(directory, its config, weights (steps, N) after every step) of a run with snapshots; to be read only."""
    workdir, history = tmp_path_factory.mktemp("run"), []
    config = {
        "data": {"name": "spiral", "size": 50},
        "network": {"name": "mlp", "width": 16, "depth": 2, "embedding": 8},
        "optim": {"lr": 0.01, "warmup": 3},
        "ema": {"decay": 0.9, **SNAPSHOTS},
        "train": {"steps": STEPS, "batch_size": 4, "log_every": 1, "checkpoint_every": 15, "sample_every": 0},
        "workdir": str(workdir),
    }
    train(config, callbacks=[lambda result: history.append(weights(result.raw_model))])
    return workdir, config, torch.stack(history)


# Profiles


@given(sigma_rel=st.floats(NARROWEST, WIDEST))
def test_the_exponent_is_that_of_the_width(sigma_rel):
    gamma = power_exponent(sigma_rel)
    # Rounding of the cubic's coefficients moves a root near 0 by some 1e-15, which its factor γ + 1 does not magnify.
    assert gamma > -1e-12
    assert (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


def test_the_exponents_of_the_paper():
    # Karras et al. 2024, section 3.2, in their two decimals.
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert power_exponent(WIDEST) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, WIDEST])
def test_an_average_has_the_profile_of_its_power_function(sigma_rel):
    profile = profiles(200, decay=0.9, widths=(sigma_rel,))[f"power-{sigma_rel}"]
    # The integral of p over each step.
    ends = (torch.arange(201, dtype=torch.float64) / 200) ** (power_exponent(sigma_rel) + 1)
    torch.testing.assert_close(profile, ends.diff(), rtol=1e-11, atol=1e-15)
    assert float(profile.sum()) == pytest.approx(1, rel=1e-12)
    # Times deviate from the middle of their step by at most a half.
    middles = torch.arange(200) + 0.5
    mean = (profile * middles).sum()
    std = float((profile * (middles - mean).square()).sum().sqrt())
    assert std == pytest.approx(sigma_rel * 200, abs=0.5)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999])
def test_an_exponential_average_warms_up(decay):
    found = profiles(30, decay=0.5, further_decays=(decay,))
    for used, name in ((0.5, "model"), (decay, f"model-{decay}")):
        kept = np.array([min(used, (1 + step) / (10 + step)) for step in range(1, 31)])
        kept[0] = 0.0  # the weights after the first step are all there is
        # What each step puts in, times what the later ones leave of it.
        expected = [(1 - kept[step]) * kept[step + 1 :].prod() for step in range(30)]
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-12)
        assert float(found[name].sum()) == pytest.approx(1, rel=1e-12)
    # Without the warm-up the first weights would make up nearly all of the slowest average.
    assert found[f"model-{decay}"][0] < 0.01


# Combinations


@given(widths, steps, widths, steps)
def test_inner_products_are_those_of_a_quadrature(width_a, t_a, width_b, t_b):
    nodes, shares = np.polynomial.legendre.leggauss(120)
    # In τ = t v³, in which even the powers between 0 and 1 are smooth.
    v, end = (nodes + 1) / 2, min(t_a, t_b)
    tau, measure = end * v**3, shares / 2 * 3 * end * v**2
    exponents = (power_exponent(width_a), t_a), (power_exponent(width_b), t_b)
    p_a, p_b = ((gamma + 1) / t * (tau / t) ** gamma for gamma, t in exponents)
    expected = (measure * p_a * p_b).sum()
    found = inner_products([Profile(width_a, t_a)], [Profile(width_b, t_b)])
    assert found.shape == (1, 1)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_inner_products_are_a_table():
    rows, columns = [Profile(0.05, 10), Profile(0.1, 20), Profile(0.2, 5)], [Profile(0.07, 8), Profile(0.1, 20)]
    table = inner_products(rows, columns)
    assert table.shape == (3, 2)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            assert table[i, j] == inner_products([row], [column]).item() == inner_products([column], [row]).item()


@given(wanted=st.builds(Profile, st.floats(0.03, WIDEST), st.integers(50, 400)), every=st.sampled_from([8, 25, 50]))
def test_the_combination_is_the_nearest_and_its_distance_is_right(wanted, every):
    kept = [Profile(width, step) for width in (0.05, 0.1) for step in range(every, 401, every)]
    x, distance = combination_weights(kept, wanted)
    assert x.sum() == pytest.approx(1, abs=1e-9)
    # The profiles themselves at the nodes of a quadrature of every step, times the roots of its weights.
    nodes, shares = np.polynomial.legendre.leggauss(6)
    tau, root = (np.arange(400)[:, None] + (nodes + 1) / 2).ravel(), np.sqrt(np.tile(shares / 2, 400))

    def density(profile):
        gamma, t = power_exponent(profile.sigma_rel), profile.step
        return root * np.where(tau < t, (gamma + 1) / t * (np.minimum(tau, t) / t) ** gamma, 0)

    table, goal = np.stack([density(profile) for profile in kept]), density(wanted)
    relative = np.linalg.norm(x @ table - goal) / np.linalg.norm(goal)
    # The quadrature errs where τ^γ has no derivative, at 0, and squaring the distance loses half of its digits.
    assert relative == pytest.approx(distance, rel=1e-4, abs=1e-6)
    # Nearest: what is left is orthogonal to the difference of any two profiles.
    products = table @ (x @ table - goal) / np.linalg.norm(goal) / np.linalg.norm(table, axis=1).max()
    assert np.ptp(products) < 1e-6


def test_weights_that_never_moved_stay_whatever_is_kept():
    for kept in ([Profile(0.05, 100)], [Profile(0.05, 10), Profile(0.1, 300)]):
        x, distance = combination_weights(kept, Profile(0.2, 200))
        assert x.sum() == pytest.approx(1, abs=1e-12)
        assert distance > 0.1


def test_many_snapshots_do_not_magnify_their_rounding():
    kept = [Profile(width, step) for width in (0.05, 0.1) for step in range(1000, 100_001, 1000)]
    x, distance = combination_weights(kept, Profile(0.07, 100_000))
    assert distance < 1e-3
    assert np.abs(x).sum() < 100


# Runs


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.1, 40), (0.08, 40), (0.12, 32), (0.2, 40), (0.1, 30)])
def test_an_average_made_afterwards_is_the_one_kept_all_along(run, tmp_path, sigma_rel, step):
    workdir, config, history = run
    direct = {**config, "workdir": str(tmp_path), "ema": {"decay": 0.9, "widths": (sigma_rel,), "snapshot_every": step}}
    train(direct)
    expected = weights(load(tmp_path / f"averages/{step:08d}-{sigma_rel}.safetensors"))
    found = weights(post_hoc_average(workdir, sigma_rel, step=step))
    kept = [Profile(width, end) for width in SNAPSHOTS["widths"] for end in range(4, STEPS + 1, 4)]
    x, distance = combination_weights(kept, Profile(sigma_rel, step))
    norm = inner_products([Profile(sigma_rel, step)], [Profile(sigma_rel, step)]).item() ** 0.5
    # Cauchy-Schwarz over the steps; the profiles' difference sums to 0, so the weights count by their deviations.
    spread = (history - history.mean(0)).square().sum(0).sqrt()
    # Each of the averages rounds three operations a step, and the combination adds them up.
    rounding = (1 + np.abs(x).sum()) * 3 * STEPS * ROUNDING * history.abs().amax(0)
    assert ((found - expected).abs() <= (distance + 1e-7) * norm * spread + rounding).all()
    # The bound is one: the weights of another width are further off.
    other = weights(post_hoc_average(workdir, 0.05, step=step))
    assert (other - expected).norm() > 10 * (found - expected).norm()


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.05, 40), (0.15, 40), (0.05, 20), (0.15, 4)])
def test_a_snapshot_made_afterwards_is_that_snapshot(run, sigma_rel, step):
    workdir, _, _ = run
    snapshot = load(workdir / f"averages/{step:08d}-{sigma_rel}.safetensors")
    made = post_hoc_average(workdir, sigma_rel, step=step)
    torch.testing.assert_close(weights(made), weights(snapshot), rtol=4 * ROUNDING, atol=1e-7)
    for name, buffer in snapshot.named_buffers():
        assert torch.equal(buffer, dict(made.named_buffers())[name])


def test_what_is_made_is_a_model_like_a_loaded_one(run):
    workdir, _, _ = run
    model = post_hoc_average(str(workdir), 0.1, device="cpu")
    assert torch.equal(weights(model), weights(post_hoc_average(workdir, 0.1, step=STEPS)))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.directory != load(workdir).directory
    assert model.directory != post_hoc_average(workdir, 0.1, step=36).directory
    assert model.directory.parent == workdir / "averages"


def test_further_averages_are_loaded_by_their_decay(run):
    workdir, _, history = run
    for decay, loaded in ((0.9, load(workdir)), (0.5, load(workdir, average=0.5)), (0.99, load(workdir, average=0.99))):
        expected = history[0]
        for step, row in enumerate(history[1:], start=2):
            kept = min(decay, (1 + step) / (10 + step))
            expected = kept * expected + (1 - kept) * row
        torch.testing.assert_close(weights(loaded), expected, rtol=STEPS * 3 * ROUNDING, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"average = 0\.7, .* the decays \[0\.5, 0\.99\]"):
        load(workdir, average=0.7)
    with pytest.raises(CheckpointError, match=r"average = 0\.5, raw = True"):
        load(workdir, average=0.5, raw=True)


def test_an_interrupted_run_goes_on_with_every_average(run, tmp_path):
    workdir, config, _ = run
    parts = {**config, "workdir": str(tmp_path)}
    for step in (9, 15, 22, 31):  # before the first checkpoint, at it, and past others
        with pytest.raises(Stop):
            train(parts, callbacks=[stop_at(step)])
    train(parts)
    files = [path.relative_to(workdir) for path in workdir.rglob("*.safetensors")]
    assert sorted(files) == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    assert {path.name for path in files if path.parent == newest_checkpoint(workdir).relative_to(workdir)} == {
        *("raw.safetensors", "optimizer.safetensors", "model.safetensors"),
        *("model-0.5.safetensors", "model-0.99.safetensors", "power-0.05.safetensors", "power-0.15.safetensors"),
    }
    for path in files:
        assert (tmp_path / path).read_bytes() == (workdir / path).read_bytes(), path


def test_snapshots_are_kept_when_asked_for_and_at_the_end(tiny, tmp_path):
    train(tiny(workdir=str(tmp_path), ema={"widths": (0.1, 1e-5), "snapshot_every": 3}))
    assert sorted(path.name for path in (tmp_path / "averages").iterdir()) == [
        f"{step:08d}-{width}.safetensors" for step in (3, 6, 8) for width in (0.1, 1e-05)
    ]
    # So narrow an average is the weights themselves.
    narrow, raw = load(tmp_path / "averages/00000008-1e-05.safetensors"), load(tmp_path, raw=True)
    assert torch.equal(weights(narrow), weights(raw))


def test_nothing_is_kept_that_was_not_asked_for(tiny, tmp_path):
    train(tiny(workdir=str(tmp_path)))
    assert not (tmp_path / "averages").exists()
    assert len(list(newest_checkpoint(tmp_path).glob("*.safetensors"))) == 3


def test_the_main_average_does_not_depend_on_the_others(run, tmp_path):
    workdir, config, _ = run
    train({**config, "workdir": str(tmp_path), "ema": {"decay": 0.9}})
    for name in ("model", "raw", "optimizer"):
        expected, found = (load_file(newest_checkpoint(path) / f"{name}.safetensors") for path in (workdir, tmp_path))
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_snapshots_of_steps_that_are_taken_again_are_forgotten(tiny, tmp_path):
    first = tiny(workdir=str(tmp_path), ema={"widths": (0.1,), "snapshot_every": 2})
    with pytest.raises(Stop):
        train(first, callbacks=[stop_at(2)])
    assert [path.name for path in (tmp_path / "averages").iterdir()] == ["00000002-0.1.safetensors"]
    # There is no checkpoint yet, so that another run may begin here.
    train(tiny(workdir=str(tmp_path), seed=1, ema={"widths": (0.2,), "snapshot_every": 8}))
    assert [path.name for path in (tmp_path / "averages").iterdir()] == ["00000008-0.2.safetensors"]


def test_a_run_may_go_on_with_other_snapshots_but_not_other_averages(tiny, tmp_path):
    with pytest.raises(Stop):
        train(tiny(workdir=str(tmp_path), ema={"widths": (0.1,), "snapshot_every": 2}), callbacks=[stop_at(4)])
    with pytest.raises(ConfigError, match=r"ema\.widths = \[0\.2\]: the run in .* has \[0\.1\]"):
        train(tiny(workdir=str(tmp_path), ema={"widths": (0.2,)}))
    with pytest.raises(ConfigError, match=r"ema\.further_decays = \[0\.99\]: the run in .* has \[\]"):
        train(tiny(workdir=str(tmp_path), ema={"widths": (0.1,), "further_decays": (0.99,)}))
    assert train(tiny(workdir=str(tmp_path), ema={"widths": (0.1,), "snapshot_every": 7})).step == 8


def test_a_network_of_ones_own_is_given_again(tiny, recorder, tmp_path):
    train(tiny(workdir=str(tmp_path), ema={"widths": (0.1,), "snapshot_every": 2}), network=recorder())
    with pytest.raises(CheckpointError, match="network of the user's own"):
        post_hoc_average(tmp_path, 0.15)
    assert isinstance(post_hoc_average(tmp_path, 0.15, network=recorder()).network, recorder)


# What is refused


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, float("nan"), 1e-7])
def test_a_width_out_of_range_is_named(run, sigma_rel):
    with pytest.raises(ValueError, match=rf"sigma_rel = {sigma_rel}: must be in \[1e-06, 0\.288"):
        post_hoc_average(run[0], sigma_rel)
    with pytest.raises(ValueError, match=rf"sigma_rel = {sigma_rel}: must be in"):
        power_exponent(sigma_rel)


@pytest.mark.parametrize("step", [0, 3, 41])
def test_a_step_beyond_the_snapshots_is_named(run, step):
    with pytest.raises(ValueError, match=rf"step = {step}: must be in \[4, 40\]"):
        post_hoc_average(run[0], 0.1, step=step)


def test_a_run_without_snapshots_is_named(tiny, tmp_path):
    train(tiny(workdir=str(tmp_path / "run")))
    for name in ("run", "absent"):
        with pytest.raises(CheckpointError, match=rf"{name}: holds no snapshots of averages, .* ema\.widths"):
            post_hoc_average(tmp_path / name, 0.1)


@pytest.fixture
def workdir(run, tmp_path):
    """The finished run, of its own for a test."""
    return Path(shutil.copytree(run[0], tmp_path / "run"))


def test_a_damaged_snapshot_is_named(workdir):
    path = workdir / "averages/00000020-0.05.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00000020-0\.05\.safetensors: cannot be read"):
        post_hoc_average(workdir, 0.1)


def test_a_snapshot_of_another_network_is_named(workdir, recorder):
    path = workdir / "averages/00000020-0.05.safetensors"
    tensors = load_file(path)
    save_file({"network.other": tensors.popitem()[1], **tensors}, path)
    with pytest.raises(CheckpointError, match=r"00000020-0\.05\.safetensors: tensor network\."):
        post_hoc_average(workdir, 0.1)


def test_a_run_whose_last_average_is_lost_takes_its_steps_and_snapshots_again(run, workdir):
    (newest_checkpoint(workdir) / "power-0.05.safetensors").unlink()
    lost = {path.name: path.read_bytes() for path in (workdir / "averages").iterdir()}
    path = workdir / "averages/00000036-0.05.safetensors"
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"power-0\.05\.safetensors: cannot be read"):
        train({**run[1], "workdir": str(workdir)})
    assert {path.name: path.read_bytes() for path in (workdir / "averages").iterdir()} == lost


def test_a_snapshot_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "averages").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"averages: a snapshot cannot be written: .*checkpoints before it"):
        train(tiny(workdir=str(tmp_path), ema={"widths": (0.1,), "snapshot_every": 4}))
    assert newest_checkpoint(tmp_path).name == "00000003"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": 0.1}, r"ema\.widths = 0\.1: must be of type tuple"),
        ({"widths": (0.1, "wide")}, r"ema\.widths\[1\] = 'wide': must be finite and of type float"),
        ({"widths": (0.1, 0.3)}, r"ema\.widths = \(0\.1, 0\.3\): must be in \[1e-06, 0\.288"),
        ({"widths": (0.0,)}, r"ema\.widths = \(0\.0,\)"),
        ({"widths": (0.1, 0.2, 0.1)}, r"ema\.widths = .*none twice"),
        ({"further_decays": (1,)}, r"ema\.further_decays = \(1\.0,\): must be in \[0, 1\)"),
        ({"further_decays": (0.5, 0.5)}, r"ema\.further_decays = .*none twice"),
        ({"further_decays": (0.9999,)}, r"ema\.further_decays = .*none twice or that of ema\.decay"),
        ({"snapshot_every": 0}, r"ema\.snapshot_every = 0: must be positive"),
    ],
)
def test_a_config_that_cannot_be_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config({"ema": options})


def test_a_config_survives_being_stored():
    config = resolve_config({"ema": {"widths": [0.1, 0.2], "further_decays": (0,)}})
    assert (config.ema.widths, config.ema.further_decays) == ((0.1, 0.2), (0.0,))
    stored = json.loads(config.to_json())
    assert stored["ema"]["widths"] == [0.1, 0.2]
    assert resolve_config(stored).ema.to_dict() == config.ema.to_dict()


def test_info_counts_every_average(capsys):
    def held(*flags):
        main(["info", f"--config={REPOSITORY / 'configs/spiral.py'}", *flags])
        amount, unit = re.search(r"training holds (\S+) (\S+): .* averages?$", capsys.readouterr().out, re.M).groups()
        return float(amount) * {"kB": 1e3, "MB": 1e6}[unit]

    model = load_config_file(REPOSITORY / "configs/spiral.py")
    network = build_network(**model.network, data_shape=(2,))
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    more = held("--config.ema.widths=(0.05, 0.1)", "--config.ema.further_decays=(0.9,)") - held()
    # Of about 1 MB four digits are printed.
    assert more == pytest.approx(3 * size, abs=1e3)


# Documentation


@pytest.fixture
def section():
    """That of docs/training.md."""
    text = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    return text.partition("## Averaged weights\n")[2].partition("\n## ")[0]


def test_the_example_in_the_docs_runs(section, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names: dict = {}
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(snippet, names)
    models = [weights(names[name]) for name in ("shorter", "between", "earlier")]
    assert all(model.isfinite().all() for model in models)
    assert not torch.equal(models[0], models[1])
    assert not torch.equal(models[1], models[2])


def test_the_distances_in_the_docs_are_right(section):
    head, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert len(head) > 2
    assert len(rows) > 2
    for row in rows:
        for count, printed in zip(head[1:], row[1:], strict=True):
            number = int(count.split()[0])
            kept = [Profile(width, step) for width in (0.05, 0.1) for step in range(1, number + 1)]
            _, distance = combination_weights(kept, Profile(float(row[0]), number))
            assert f"{distance:.1e}" == printed
