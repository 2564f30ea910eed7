import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sde_diffusion import DataInfo, train
from sde_diffusion.training import CheckpointError, load, pretrained, resolve_config
from sde_diffusion.training.checkpoint import newest_checkpoint, read_description

FILES = ("raw.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")


def header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["sde_diffusion"])


def rewrite_header(path, metadata):
    save_file(load_file(path), path, metadata=metadata)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(config, data set): the directory of a finished run, made once; to be read only."""
    made: dict[str, Path] = {}

    def run(config, dataset=None):
        key = json.dumps(config)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            train({**config, "workdir": str(made[key])}, dataset=dataset)
        return made[key]

    return run


@pytest.fixture
def workdir(finished, tiny, tmp_path):
    """A finished run of its own for each test."""
    return Path(shutil.copytree(finished(tiny()), tmp_path / "run"))


def test_a_run_is_stored_as_documented(workdir):
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["00000006", "00000008"]
    assert sorted(path.name for path in newest_checkpoint(workdir).iterdir()) == sorted(FILES)
    assert json.loads((workdir / "checkpoints/00000008/state.json").read_text())["step"] == 8


def test_a_directory_and_one_file_give_the_same_model(kind, finished):
    config, dataset = kind
    workdir = finished(config, dataset)
    file = newest_checkpoint(workdir) / "model.safetensors"
    models = [load(workdir), load(str(workdir)), load(file), load(workdir, device="cpu")]
    x, t = (
        torch.randn(5, *models[0].data_shape, generator=torch.Generator().manual_seed(0)),
        torch.full((5,), 0.3),
    )
    for model in models:
        assert not model.training
        for tensor in model.parameters():
            assert (tensor.dtype, tensor.requires_grad, tensor.device.type) == (torch.float32, False, "cpu")
        for one, other in zip(model.predict(x, t), models[0].predict(x, t), strict=True):
            assert torch.equal(one, other)
    assert models[0].data == (DataInfo(bits=None) if dataset is None else dataset.data)


def test_the_header_rebuilds_all_but_the_weights(finished, tiny):
    config = tiny(
        sde={"name": "ve", "sigma_max": 9.0}, model={"prediction": "v", "sigma_data": 0.7}, train={"steps": 1}
    )
    model = load(finished(config))
    assert repr(model.sde) == "VESDE(sigma_min=0.01, sigma_max=9.0)"
    assert (model.prediction, model.sigma_data, model.data_shape) == ("v", 0.7, (2,))
    assert (model.network.input.out_features, model.network.time_features.frequencies.numel()) == (16, 4)


def test_no_file_says_where_the_run_was(kind, finished):
    config, dataset = kind
    workdir = finished(config, dataset)
    expected = resolve_config(config).to_json()
    if dataset is not None:
        expected = json.dumps({**json.loads(expected), "data": {"name": "custom"}})
    expected = {name: section for name, section in json.loads(expected).items() if name != "workdir"}
    assert json.loads((workdir / "config.json").read_text()) == expected
    for path in workdir.rglob("model.safetensors"):
        assert header(path)["config"] == expected
    for path in workdir.rglob("*"):
        assert path.is_dir() or str(workdir).encode() not in path.read_bytes(), path


def test_raw_weights_are_the_other_ones(workdir):
    averaged, raw = load(workdir).state_dict(), load(workdir, raw=True).state_dict()
    files = newest_checkpoint(workdir)
    for name, tensor in load_file(files / "raw.safetensors").items():
        assert torch.equal(raw[name], tensor)
    for name, tensor in load_file(files / "model.safetensors").items():
        assert torch.equal(averaged[name], tensor)
    assert not torch.equal(raw["network.input.weight"], averaged["network.input.weight"])


def test_a_network_of_ones_own_must_be_given_again(tiny, recorder, tmp_path):
    config = tiny(workdir=str(tmp_path), data={"name": "spiral", "size": 50})
    result = train(config, network=recorder())
    assert header(newest_checkpoint(tmp_path) / "model.safetensors")["config"]["network"] == {"name": "custom"}
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was trained with a network of the user's own"):
        load(tmp_path)
    model = load(tmp_path, network=recorder())
    assert torch.equal(model.network.scale, result.model.network.scale)
    assert model.network.scale != result.raw_model.network.scale


def test_weights_that_are_tied_can_be_stored(tiny, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight

        def forward(self, x, t):
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    result = train(tiny(workdir=str(tmp_path)), network=Tied())
    model = load(tmp_path, network=Tied())
    assert model.network.first.weight is model.network.second.weight
    assert torch.equal(model.network.first.weight, result.model.network.first.weight)


def test_one_file_is_enough_to_share(finished, tiny, tmp_path):
    workdir = finished(tiny())
    path = tmp_path / "shared.safetensors"
    shutil.copy(newest_checkpoint(workdir) / "model.safetensors", path)
    random_state = torch.get_rng_state()
    model, again = load(workdir), load(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert header(path) == read_description(path) == read_description(workdir)


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_nothing_is_lost(tiny, workdir, name, damage):
    path = newest_checkpoint(workdir) / name
    damage(path)
    if name == "state.json" and damage is truncate:
        path.write_text(path.read_text()[:8])
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=rf"00000008.{name.replace('.', '[.]')}: cannot be read"):
        train(tiny(workdir=str(workdir)))
    if name in ("raw.safetensors", "model.safetensors"):
        with pytest.raises(CheckpointError, match=rf"00000008.{name.replace('.', '[.]')}: cannot be read"):
            load(workdir, raw=name.startswith("raw"))
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {**t, "network.input.weight": torch.zeros(16, 3)},
            r"network\.input\.weight: .*\(16, 3\).*\(16, 10\)",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "network.input.bias"},
            r"network\.input\.bias: .*nothing.*\(16,\)",
        ),
        (
            lambda t: {**t, "network.more": torch.zeros(1)},
            r"network\.more: the file has \(1,\), the network nothing",
        ),
    ],
    ids=["shape", "missing", "left over"],
)
def test_the_first_tensor_that_does_not_fit_is_named(tiny, workdir, change, message):
    for name in ("raw.safetensors", "model.safetensors"):
        path = newest_checkpoint(workdir) / name
        save_file(change(load_file(path)), path, metadata={"sde_diffusion": json.dumps(header(path))})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {message}"):
        load(workdir)
    with pytest.raises(CheckpointError, match=rf"raw\.safetensors: tensor {message}"):
        train(tiny(workdir=str(workdir)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "99.exp_avg": torch.zeros(1)}, r"tensor 99\.exp_avg belongs to no parameter"),
        (
            lambda t: {**t, "0.exp_avg": torch.zeros(3)},
            r"tensor 0\.exp_avg: the file has \(3,\), the network \(16, 10\)",
        ),
        (
            lambda t: {"network.input.weight": torch.zeros(16, 10)},
            r"tensor network\.input\.weight belongs to no",
        ),
    ],
    ids=["index", "shape", "another file"],
)
def test_moments_that_do_not_fit_are_named(tiny, workdir, change, message):
    path = newest_checkpoint(workdir) / "optimizer.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(CheckpointError, match=rf"optimizer\.safetensors: {message}"):
        train(tiny(workdir=str(workdir)))


def test_what_a_sampler_of_times_has_learnt_must_fit(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path), loss={"time": {"name": "loss_second_moment", "bins": 3}})
    train(config)
    path = newest_checkpoint(tmp_path) / "times.safetensors"
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
    assert shapes == {"losses": (3, 10), "counts": (3,)}
    save_file({**load_file(path), "counts": torch.zeros(4, dtype=torch.int64)}, path)
    with pytest.raises(CheckpointError, match=r"times\.safetensors: tensor counts: the state has \(4,\), .* \(3,\)"):
        train(config)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"times\.safetensors: cannot be read"):
        train(config)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: {},
        lambda h: {"sde_diffusion": "{"},
        lambda h: {"sde_diffusion": json.dumps({k: v for k, v in h.items() if k != "data_shape"})},
        lambda h: {"sde_diffusion": json.dumps({**h, "data": {"low": 1.0, "high": -1.0, "bits": 8}})},
        lambda h: {"sde_diffusion": json.dumps({**h, "config": {}})},
        lambda h: {"sde_diffusion": json.dumps({**h, "config": {"network": h["config"]["network"]}})},
        lambda h: {"sde_diffusion": json.dumps({**h, "config": {**h["config"], "sde": {"name": "other"}}})},
        lambda h: {"sde_diffusion": json.dumps({**h, "config": {**h["config"], "network": {"name": "other"}}})},
    ],
    ids=["none", "not json", "no shape", "range", "no config", "half a config", "sde", "network"],
)
def test_a_wrong_header_is_named(workdir, change):
    path = newest_checkpoint(workdir) / "model.safetensors"
    rewrite_header(path, change(header(path)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its header"):
        load(path)


def test_nothing_to_load_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in this directory"):
        load(tmp_path)
    for name in ("absent", "absent.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be read"):
            load(tmp_path / name)


def test_a_run_without_its_config_is_named(tiny, workdir):
    (workdir / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        train(tiny(workdir=str(workdir)))


def test_a_partial_checkpoint_is_ignored_and_overwritten(tiny, workdir, finished):
    newest_checkpoint(workdir).rename(workdir / "checkpoints/partial-00000008")
    truncate(workdir / "checkpoints/partial-00000008/model.safetensors")
    assert newest_checkpoint(workdir).name == "00000006"
    train(tiny(workdir=str(workdir)))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["00000006", "00000008"]
    for name in FILES:
        whole = newest_checkpoint(finished(tiny())) / name
        assert (newest_checkpoint(workdir) / name).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("keep", "kept"), [(1, [8]), (2, [6, 8]), (9, [2, 4, 6, 8])])
def test_as_many_checkpoints_are_kept_as_asked_for(tiny, tmp_path, keep, kept):
    train(tiny(workdir=str(tmp_path), train={"keep_checkpoints": keep, "checkpoint_every": 2}))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_an_unknown_pretrained_model_is_named():
    with pytest.raises(ValueError, match="name = 'nothing': must be one of"):
        pretrained("nothing")
