import errno
import importlib
import itertools
import json
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sde_diffusion import DataInfo, train
from sde_diffusion.storage import checksum
from sde_diffusion.training import CheckpointError, ConfigError, load, pretrained, resolve_config
from sde_diffusion.training.checkpoint import Checkpoints, newest_checkpoint, read_description

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


def flip(path):
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sign(checkpoint):
    """Make what a test has changed the files that were written."""
    path = checkpoint / "checksums.json"
    path.write_text(json.dumps({name: checksum(checkpoint / name) for name in json.loads(path.read_text())}))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def assert_ends_as(workdir, whole):
    """The last checkpoint and the metrics of a run are those of another, bit for bit."""
    found, expected = (
        {path.name: path.read_bytes() for path in newest_checkpoint(run).iterdir()} for run in (workdir, whole)
    )
    assert found == expected
    assert losses(workdir) == losses(whole)


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
    assert names(workdir) == ["00000006", "00000008"]
    assert sorted(path.name for path in newest_checkpoint(workdir).iterdir()) == sorted([*FILES, "checksums.json"])
    assert json.loads((workdir / "checkpoints/00000008/state.json").read_text())["step"] == 8
    checksums = json.loads((workdir / "checkpoints/00000008/checksums.json").read_text())
    assert checksums == {name: checksum(workdir / "checkpoints/00000008" / name) for name in FILES}


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


@pytest.mark.parametrize(
    ("name", "damage"),
    [*itertools.product(FILES, [truncate, empty, Path.unlink, flip]), ("checksums.json", empty)],
)
def test_damage_is_named_and_the_checkpoint_before_is_taken(tiny, workdir, finished, name, damage):
    path = newest_checkpoint(workdir) / name
    damage(path)
    damaged = {file.name: content for file, content in contents(path.parent).items()}
    with pytest.warns(UserWarning, match=rf"00000008.{name}: .*; checkpoint 00000006 is taken instead"):
        train(tiny(workdir=str(workdir)))
    assert_ends_as(workdir, finished(tiny()))
    assert names(workdir) == ["00000006", "00000008", "damaged-00000008"]
    aside = contents(workdir / "checkpoints/damaged-00000008")
    assert {file.name: content for file, content in aside.items()} == damaged


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink, flip])
@pytest.mark.parametrize("name", FILES)
def test_damage_of_all_checkpoints_is_named_and_nothing_is_lost(tiny, workdir, name, damage):
    damage(workdir / "checkpoints/00000008" / name)
    damage(workdir / "checkpoints/00000006/raw.safetensors")
    before = contents(workdir)
    with pytest.raises(CheckpointError, match=rf"00000008.{name}: .*; no checkpoint before it is whole"):
        train(tiny(workdir=str(workdir)))
    assert contents(workdir) == before


@pytest.mark.parametrize("raw", [False, True])
def test_a_damaged_file_of_weights_is_not_loaded(workdir, raw):
    name, other = ("raw.safetensors", "model.safetensors")[:: 1 if raw else -1]
    flip(newest_checkpoint(workdir) / name)
    with pytest.warns(UserWarning, match=rf"00000008.{name}: damaged.*; checkpoint 00000006 is taken instead"):
        model = load(workdir, raw=raw)
    for key, tensor in load_file(workdir / "checkpoints/00000006" / name).items():
        assert torch.equal(model.state_dict()[key], tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(workdir, raw=not raw)
    for key, tensor in load_file(workdir / "checkpoints/00000008" / other).items():
        assert torch.equal(model.state_dict()[key], tensor)
    flip(workdir / "checkpoints/00000006" / name)
    with pytest.raises(CheckpointError, match=rf"00000008.{name}: damaged: .*; no checkpoint before it is whole"):
        load(workdir, raw=raw)


def test_a_run_of_before_there_were_checksums_goes_on(tiny, workdir, finished):
    shutil.rmtree(workdir / "checkpoints/00000008")
    checkpoint = workdir / "checkpoints/00000006"
    (checkpoint / "checksums.json").unlink()
    (checkpoint / "state.json").write_text('{"step": 6, "examples": 50}')
    (workdir / "manifest.json").unlink()
    load(workdir)
    train(tiny(workdir=str(workdir)))
    assert_ends_as(workdir, finished(tiny()))
    truncate(checkpoint / "raw.safetensors")
    shutil.rmtree(workdir / "checkpoints/00000008")
    with pytest.raises(CheckpointError, match=r"00000006.raw\.safetensors: cannot be read"):
        train(tiny(workdir=str(workdir)))


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
    sign(path.parent)
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
    sign(path.parent)
    with pytest.raises(CheckpointError, match=rf"optimizer\.safetensors: {message}"):
        train(tiny(workdir=str(workdir)))


def test_what_a_sampler_of_times_has_learnt_must_fit(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path), loss={"time": {"name": "loss_second_moment", "bins": 3}})
    train(config)
    path = newest_checkpoint(tmp_path) / "times.safetensors"
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
    assert shapes == {"losses": (3, 10), "counts": (3,)}
    save_file({**load_file(path), "counts": torch.zeros(4, dtype=torch.int64)}, path)
    sign(path.parent)
    with pytest.raises(CheckpointError, match=r"times\.safetensors: tensor counts: the state has \(4,\), .* \(3,\)"):
        train(config)


@pytest.mark.parametrize("state", ["[]", "{}", '{"step": "8"}'])
def test_a_state_without_its_step_is_named(tiny, workdir, state):
    (newest_checkpoint(workdir) / "state.json").write_text(state)
    sign(newest_checkpoint(workdir))
    with pytest.raises(CheckpointError, match=r"state\.json: must hold the step, a whole number"):
        train(tiny(workdir=str(workdir)))


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
    (workdir / "checkpoints/partial-00000007").mkdir()
    train(tiny(workdir=str(workdir)))
    assert names(workdir) == ["00000006", "00000008"]
    assert_ends_as(workdir, finished(tiny()))


@pytest.mark.parametrize(
    ("keep", "every", "kept"),
    [
        (1, 0, [8]),
        (2, 0, [6, 8]),
        (9, 0, [2, 4, 6, 8]),
        (1, 4, [4, 8]),
        (2, 4, [4, 6, 8]),
        (1, 2, [2, 4, 6, 8]),
        (1, 6, [6, 8]),
    ],
)
def test_as_many_checkpoints_are_kept_as_asked_for(tiny, tmp_path, keep, every, kept):
    options = {"keep_checkpoints": keep, "keep_every": every, "checkpoint_every": 2}
    train(tiny(workdir=str(tmp_path), train=options))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept


@pytest.mark.parametrize(
    ("every", "message"), [(-3, "must be at least 0"), (4, r"must be a multiple of train\.checkpoint_every = 3")]
)
def test_only_checkpoints_can_be_kept(tiny, every, message):
    with pytest.raises(ConfigError, match=rf"train\.keep_every = {every}: {message}"):
        train(tiny(train={"keep_every": every}))


def test_how_many_are_kept_may_change(tiny, workdir):
    train(tiny(workdir=str(workdir), train={"keep_every": 3, "keep_checkpoints": 1}))


class Crash(BaseException):
    """The end of a process, which nothing catches."""


# Whatever touches the disk while a checkpoint is written.
OPERATIONS = [
    "sde_diffusion.storage.save_file",
    "sde_diffusion.storage.sync",
    "sde_diffusion.training.checkpoint.sync",
    "pathlib.Path.mkdir",
    "pathlib.Path.write_text",
    "pathlib.Path.rename",
    "pathlib.Path.replace",
    "shutil.rmtree",
]


def failing(monkeypatch, step, count, error):
    """Have the operation of this number fail while the checkpoint of a step is written."""
    left, remove, write = itertools.count(count, -1), shutil.rmtree, Checkpoints._write

    def wrap(operation):
        def wrapped(*arguments, **options):
            if next(left) == 0:
                if operation is remove:
                    next(arguments[0].iterdir()).unlink()
                raise error
            return operation(*arguments, **options)

        return wrapped

    def wrapped_write(checkpoints, final, state, contents):
        with monkeypatch.context() as patches:
            if state["step"] == step:
                for name in OPERATIONS:
                    owner, _, attribute = name.rpartition(".")
                    owner = Path if owner == "pathlib.Path" else importlib.import_module(owner)
                    patches.setattr(owner, attribute, wrap(getattr(owner, attribute)))
            return write(checkpoints, final, state, contents)

    monkeypatch.setattr(Checkpoints, "_write", wrapped_write)


def test_a_process_that_ends_anywhere_in_a_checkpoint_loses_nothing(tiny, tmp_path, monkeypatch):
    options = {"steps": 2, "checkpoint_every": 1, "keep_checkpoints": 1, "log_every": 2}
    # This process goes on, and needs nothing forced to the disk.
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    train(tiny(workdir=str(tmp_path / "whole"), train=options))
    for count in itertools.count():
        workdir = tmp_path / str(count)
        config = tiny(workdir=str(workdir), train=options)
        with monkeypatch.context() as patches:
            failing(patches, 2, count, Crash())
            try:
                train(config)
            except Crash:
                for name in names(workdir):
                    if not name.startswith("partial"):
                        assert sorted(contents(workdir / "checkpoints" / name)) == [
                            workdir / "checkpoints" / name / file for file in sorted([*FILES, "checksums.json"])
                        ]
                load(workdir)
            else:
                break
        train(config)
        assert_ends_as(workdir, tmp_path / "whole")
        # Pruning is what may be left to do.
        assert set(names(workdir)) <= {"00000001", "00000002", "partial-00000001"}
    # Three files of tensors, written, synced and renamed; two of JSON; the folder made, synced and renamed.
    assert count > 5 * 3 + 3


def test_a_process_that_ends_as_it_cuts_the_metrics_loses_no_line(tiny, tmp_path, monkeypatch, finished):
    config = tiny(workdir=str(tmp_path))

    def crash(*arguments):
        raise Crash

    def stop(result):
        if result.step == 5:
            raise Crash

    with pytest.raises(Crash):
        train(config, callbacks=[stop])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert before.count(b"\n") == 5
    with monkeypatch.context() as patches:
        patches.setattr("sde_diffusion.storage.sync", crash)
        with pytest.raises(Crash):
            train(config)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    train(config)
    assert_ends_as(tmp_path, finished(tiny()))


@pytest.mark.parametrize(
    ("error", "count"),
    [
        *((OSError(errno.ENOSPC, "No space left on device"), count) for count in (0, 1, 5, 11)),
        *((SafetensorError("I/O error: No space left on device (os error 28)"), count) for count in (4, 7)),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(tiny, tmp_path, monkeypatch, finished, error, count):
    config = tiny(workdir=str(tmp_path))
    message = r"00000006 cannot be written: .*No space left on device.* takes [\d.]+ MB, and [\d.e+]+ MB are free"
    with monkeypatch.context() as patches:
        failing(patches, 6, count, error)
        with pytest.raises(CheckpointError, match=message):
            train(config)
    assert names(tmp_path) == ["00000003"]
    train(config)
    assert_ends_as(tmp_path, finished(tiny()))


def test_a_write_that_the_system_refuses_leaves_the_checkpoint_before(tiny, tmp_path, finished):
    config = tiny(workdir=str(tmp_path), train={"log_every": 3, "async_checkpoints": False})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def refuse(result):
        # Larger than a line of metrics, smaller than the weights.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=r"00000006 cannot be written: .*File too large"):
            train(config, callbacks=[refuse])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["00000003"]
    train(config)
    assert names(tmp_path) == ["00000006", "00000008"]


def test_an_unknown_pretrained_model_is_named():
    with pytest.raises(ValueError, match="name = 'nothing': must be one of"):
        pretrained("nothing")
