"""Every file of configs/ and the page about them: networks have the sizes told there, and every recipe trains."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from sde_diffusion import train
from sde_diffusion.data import ArrayDataset, DataInfo, load_dataset
from sde_diffusion.networks.published import PUBLISHED
from sde_diffusion.training import resolve_config
from sde_diffusion.training.checkpoint import build_model
from sde_diffusion.training.devices import DEVICES
from sde_diffusion.training.plan import Plan

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
# Recipe: [paper, network, parameters, FID, bits/dim].
TABLE = {name: cells.split(" | ") for name, cells in re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE)}

REDUCED = {
    "unet": {"base_channels": 16, "blocks_per_level": 1},
    "dit": {"width": 48, "depth": 2, "heads": 4},
    "mlp": {"width": 16, "depth": 2},
}


def data_shape(config: ConfigDict) -> tuple[int, ...]:
    """The shape of an example; of a folder of images, which need not be there, as the recipe tells it."""
    if config.data.name == "image_folder":
        return config.data.channels, config.data.size, config.data.size
    return load_dataset(**config.data).data_shape


def random_images(config: ConfigDict) -> ArrayDataset:
    """Eight images of ten classes and 8 bits, as small as the network's levels and attention allow."""
    network = config.network
    levels = len(network.get("channel_multipliers", (1,)))
    side = max(8, 2 ** (levels - 1), *network.get("attention_resolutions", ()))
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (8, data_shape(config)[0], side, side), generator=generator, dtype=torch.uint8)
    return ArrayDataset(values, torch.arange(8) + 2)


def test_the_table_has_a_row_a_file():
    assert sorted(TABLE) == sorted(CONFIGS)


def test_the_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    assert (names["result"].step, names["result"].model.network.classes) == (2, 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_network_is_that_of_the_table(name):
    _, network, parameters, *_ = TABLE[name]
    config = resolve_config(CONFIGS[name])
    shape = data_shape(config)
    with torch.device("meta"):
        model = build_model(config, shape, DataInfo(), None)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,}" == parameters
    if network in PUBLISHED:
        assert (count, shape) == (PUBLISHED[network].parameters, PUBLISHED[network].data_shape)
    else:
        assert network == config.network.name


@pytest.mark.parametrize("name", CONFIGS)
def test_published_figures_are_those_of_the_table(name):
    _, network, _, fid, bits = TABLE[name]
    docstring = " ".join(str(ast.get_docstring(ast.parse(CONFIGS[name].read_text(encoding="utf-8")))).split())
    said = re.search(r"Published: (?:FID ([\d.]+))?.*?(?:([\d.]+) bits/dim)?; not run here\.", docstring)
    assert (said.groups("-") if said else ("-", "-")) == (fid, bits.removeprefix("≤ "))
    assert network not in PUBLISHED or "not run here." in docstring.lower()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_at_reduced_width(name):
    config = resolve_config(CONFIGS[name])
    config.network.update(REDUCED[config.network.name])
    shape = random_images(config).data_shape if len(data_shape(config)) == 3 else data_shape(config)
    plan = Plan(config.to_dict(), shape, DEVICES["h100"], 4)
    assert 0 < plan.estimate.step < 1
    assert plan.fits
    assert ("fsdp" in plan.text()) == (config.train.parallel == "fsdp")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_at_reduced_width(name):
    config = resolve_config(CONFIGS[name])
    config.network.update(REDUCED[config.network.name])
    config.train.update(batch_size=2, parallel="auto")
    dataset = random_images(config) if len(data_shape(config)) == 3 else None
    config.train.steps = 0
    start = train(config, dataset=dataset).raw_model.state_dict()
    config.train.steps = 2
    result = train(config, dataset=dataset)
    assert result.step == 2
    assert math.isfinite(result.metrics["loss"])
    assert result.metrics["grad_norm"] > 0
    assert any(not torch.equal(tensor, start[key]) for key, tensor in result.raw_model.state_dict().items())
