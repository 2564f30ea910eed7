import copy
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from sde_diffusion.training import ConfigError, default_config, load_config_file, named, resolve_config
from sde_diffusion.training.config import choose

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def write(folder, text):
    path = folder / "config.py"
    path.write_text("from sde_diffusion.training import default_config\n" + text)
    return path


def test_the_default_is_complete_and_resolves_to_itself():
    assert resolve_config(default_config()).to_dict() == default_config().to_dict()
    assert resolve_config({}).to_dict() == default_config().to_dict()


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_resolves(path):
    resolved = resolve_config(path)
    assert resolve_config(resolved).to_dict() == resolved.to_dict()
    assert resolved.to_dict() != default_config().to_dict()


def test_a_mapping_a_config_dict_and_a_file_say_the_same(tmp_path):
    config = default_config()
    config.optim.lr = 0.5
    config.network = named("mlp", width=8)
    path = write(
        tmp_path,
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.optim.lr = 0.5\n"
        "    config.network = {'name': 'mlp', 'width': 8}\n"
        "    return config\n",
    )
    expected = resolve_config({"optim": {"lr": 0.5}, "network": {"name": "mlp", "width": 8}})
    assert (expected.optim.lr, expected.optim.beta1, expected.network.width) == (0.5, 0.9, 8)
    for same in (config, path, str(path), load_config_file(path), ConfigDict({**expected.to_dict()})):
        assert resolve_config(same).to_dict() == expected.to_dict()


def test_the_argument_is_left_as_it_was():
    given = {"network": {"name": "mlp"}, "loss": {"time": {"mean": 0.0}}}
    resolved = resolve_config(given)
    resolved.network.width = 7
    assert given == {"network": {"name": "mlp"}, "loss": {"time": {"mean": 0.0}}}
    config = default_config()
    resolve_config(config).optim.lr = 1.0
    assert config.optim.lr == default_config().optim.lr


def test_a_named_section_gets_the_defaults_of_what_it_names():
    resolved = resolve_config({"sde": {"name": "ve"}, "loss": {"time": {"mean": 0.5}}, "data": {"name": "moons"}})
    assert resolved.sde.to_dict() == {"name": "ve", "sigma_min": 0.01, "sigma_max": 50.0}
    # The time sampler was not named anew: what was not given is kept.
    assert resolved.loss.time.to_dict() == {"name": "log_normal", "mean": 0.5, "std": 1.2}
    assert resolved.data.to_dict() == {"name": "moons", "size": 10_000}


def test_a_name_stands_for_a_section():
    section = {"name": "min_snr", "gamma": 5.0}
    given = {"loss": {"weighting": "min_snr", "time": "importance"}, "network": "mlp"}
    assert resolve_config(given).loss.weighting.to_dict() == section
    assert resolve_config(given).loss.time.to_dict() == {"name": "importance"}
    config = default_config()
    config.loss.weighting, config.loss.time, config.network = "min_snr", "importance", "mlp"
    assert resolve_config(config).to_dict() == resolve_config(given).to_dict()
    config.loss.weighting = named("min_snr", gamma=3.0)
    assert resolve_config(config).loss.weighting.to_dict() == {**section, "gamma": 3.0}
    # Options may be changed one by one where a section is the default's own, and of a resolved config's.
    config = resolve_config(config)
    config.loss.weighting.gamma = 2.0
    assert copy.deepcopy(config).loss.weighting.gamma == 2.0
    config.loss.weighting = "simple"
    assert resolve_config(config).loss.weighting.to_dict() == {"name": "simple"}


def test_a_name_is_no_value_of_other_fields():
    config = default_config()
    with pytest.raises(TypeError, match="lr"):
        config.optim.lr = "fast"
    with pytest.raises(ConfigError, match=r"optim\.name: no such field"):
        resolve_config({"optim": {"name": "sgd"}})
    config.optim = "sgd"
    with pytest.raises(ConfigError, match=r"optim\.name: no such field"):
        resolve_config(config)


def test_a_section_is_chosen_by_name():
    config = default_config()
    choose(config, "loss.weighting", "min_snr")
    assert config.loss.weighting.to_dict() == {"name": "min_snr", "gamma": 5.0}
    config.loss.weighting.gamma = 3.0
    choose(config, "loss.weighting", "min_snr")
    assert config.loss.weighting.gamma == 3.0
    with pytest.raises(ConfigError, match=r"loss\.weighting\.name = 'snr'"):
        choose(config, "loss.weighting", "snr")


def test_a_resolved_config_is_locked():
    with pytest.raises(AttributeError, match="optm"):
        resolve_config({}).optm = 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optm": {"lr": 1.0}}, r"optm: no such field; there are .*optim"),
        ({"optim": {"learning_rate": 1.0}}, r"optim\.learning_rate: no such field; .*optim\.lr"),
        ({"train": {"stepz": 1}}, r"train\.stepz: no such field"),
        ({"ema": {"rate": 0.9}}, r"ema\.rate: no such field; there are ema\.decay"),
        ({"model": {"target": "v"}}, r"model\.target: no such field"),
        ({"loss": {"weight": "edm"}}, r"loss\.weight: no such field"),
        ({"network": {"name": "mlp", "dropout": 0.1}}, r"network\.dropout: mlp takes width, depth"),
        ({"network": {"width": 8}}, r"network\.width: unet takes base_channels"),
        ({"network": {"name": "mlp", "data_shape": (2,)}}, r"network\.data_shape: mlp takes"),
        ({"sde": {"name": "vp", "sigma_max": 1.0}}, r"sde\.sigma_max: vp takes beta_min, beta_max"),
        ({"data": {"name": "spiral", "path": "x"}}, r"data\.path: spiral takes size"),
        ({"data": {"name": "spiral", "split": "test"}}, r"data\.split: spiral takes size"),
        ({"loss": {"time": {"name": "uniform", "mean": 0.0}}}, r"loss\.time\.mean: uniform takes no options"),
        ({"loss": {"weighting": {"name": "simple", "gamma": 5.0}}}, r"loss\.weighting\.gamma: simple takes no options"),
        ({"loss": {"time": {"name": "importance", "sde": None}}}, r"loss\.time\.sde: importance takes no options"),
        ({"network": {"name": "mlp", "out_channels": 2}}, r"network\.out_channels: mlp takes"),
        ({"data": {"name": "idx"}}, r"data\.path: idx needs a value"),
    ],
)
def test_unknown_and_missing_fields_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optim": {"lr": "fast"}}, r"optim\.lr = 'fast': must be finite and of type float"),
        ({"optim": {"lr": True}}, r"optim\.lr = True: must be finite and of type float"),
        ({"optim": {"lr": None}}, r"optim\.lr = None: must be finite and of type float"),
        ({"optim": {"lr": math.inf}}, r"optim\.lr = inf: must be finite and of type float"),
        ({"optim": {"lr": math.nan}}, r"optim\.lr = nan: must be finite and of type float"),
        ({"train": {"steps": 1.5}}, r"train\.steps = 1\.5: must be of type int"),
        ({"train": {"steps": math.inf}}, r"train\.steps = inf: must be of type int"),
        ({"train": {"steps": "100"}}, r"train\.steps = '100': must be of type int"),
        ({"seed": False}, r"seed = False: must be of type int"),
        ({"flip": 1}, r"flip = 1: must be of type bool"),
        ({"workdir": 3}, r"workdir = 3: must be of type str"),
        ({"optim": 3}, r"optim = 3: must be a section with beta1, beta2, eps"),
        ({"network": 3}, r"network\.name = 3: must be one of dit, mlp, unet"),
        ({"network": "resnet"}, r"network\.name = 'resnet': must be one of dit, mlp, unet"),
        ({"network": {"name": "resnet"}}, r"network\.name = 'resnet': must be one of dit, mlp, unet"),
        ({"data": {"name": "mnist"}}, r"data\.name = 'mnist': must be one of fashion_mnist"),
        ({"sde": {"name": "VP"}}, r"sde\.name = 'VP': must be one of vp"),
        (
            {"loss": {"time": {"name": "normal"}}},
            r"loss\.time\.name = 'normal': must be one of uniform, log_normal",
        ),
        ({"loss": {"weighting": "snr"}}, r"loss\.weighting\.name = 'snr': must be one of simple, x0, v"),
        ({"loss": {"weighting": 5.0}}, r"loss\.weighting\.name = 5\.0: must be one of simple, x0, v"),
        ({"loss": {"spread": "even"}}, r"loss\.spread = 'even': must be one of independent, stratified"),
        ({"model": {"prediction": "noise"}}, r"model\.prediction = 'noise': must be one of eps, x0"),
        ({"optim": {"schedule": "steps"}}, r"optim\.schedule\.name = 'steps': must be one of constant, linear, cosine"),
        (
            {"train": {"precision": "float64"}},
            r"train\.precision = 'float64': must be one of float32, bfloat16, float16",
        ),
    ],
)
def test_wrong_types_and_choices_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(config)


@pytest.mark.parametrize(
    ("field", "outside", "inside"),
    [
        ("optim.lr", 0, 1e-12),
        ("optim.eps", -1e-8, 1e-30),
        ("optim.weight_decay", -0.1, 0),
        ("optim.warmup", -1, 0),
        ("optim.grad_clip", -1.0, 0),
        ("optim.beta1", 1.0, 0.0),
        ("optim.beta2", -0.1, 0.9999),
        ("ema.decay", 1.0, 0),
        ("model.sigma_data", 0.0, 3),
        ("model.mean_step", 0.0, 1e-9),
        ("train.steps", -1, 0),
        ("train.batch_size", 0, 1),
        ("train.log_every", 0, 1),
        ("train.checkpoint_every", 0, 1),
        ("train.keep_checkpoints", 0, 1),
        ("train.sample_every", -1, 0),
        ("train.sample_count", 0, 1),
        ("train.workers", -1, 0),
        ("seed", -1, 0),
    ],
)
def test_numbers_out_of_range_are_named(field, outside, inside):
    *section, name = field.split(".")
    with pytest.raises(ConfigError, match=rf"^{field} = {outside}.*: must be"):
        resolve_config({section[0]: {name: outside}} if section else {name: outside})
    resolved = resolve_config({section[0]: {name: inside}} if section else {name: inside})
    assert (resolved[section[0]][name] if section else resolved[name]) == inside


def test_whole_floats_count_as_integers_and_integers_as_floats():
    resolved = resolve_config({"train": {"steps": 1e3}, "optim": {"lr": 1}})
    assert (resolved.train.steps, type(resolved.train.steps)) == (1000, int)
    assert (resolved.optim.lr, type(resolved.optim.lr)) == (1.0, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "get_config"),
        (
            "def get_config():\n    config = default_config()\n    config.optm.lr = 1.0\n    return config",
            "optm",
        ),
        (
            "def get_config():\n    config = default_config()\n    config.optim.learning_rate = 1.0",
            "learning_rate",
        ),
        ("def get_config():\n    config = default_config()\n    config.optim.lr = 'fast'", "lr"),
        ("def get_config():\n    default_config()", "must return a ConfigDict; got None"),
    ],
    ids=["no get_config", "section", "field", "type", "no return"],
)
def test_what_is_wrong_with_a_config_file_is_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"config = '.*config\.py'.*{message}"):
        resolve_config(path)


def test_a_config_file_must_exist_and_be_python(tmp_path):
    with pytest.raises(ConfigError, match=r"config = '.*absent\.py': no such file"):
        resolve_config(tmp_path / "absent.py")
    text = tmp_path / "config.txt"
    text.write_text("lr: 1")
    with pytest.raises(ConfigError, match=r"config = '.*config\.txt': must be a Python file"):
        resolve_config(str(text))
    with pytest.raises(ConfigError, match="no such file"):
        resolve_config(tmp_path)
