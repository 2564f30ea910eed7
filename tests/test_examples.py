"""Every example of a trained model runs, in a small configuration, and writes pictures of the right size."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
# Side of an image of 28 pixels enlarged three times, and the gap around it.
CELL, GAP = 3 * 28 + 2, 2


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(name, *arguments): what the example prints; relative paths are in tmp_path."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_interpolate(run, tmp_path):
    options = ["--count=2", "--columns=3", "--levels", "0.2", "--steps=2", "--tolerance=0.1", "--output=rows.png"]
    printed = run("interpolate.py", *options)
    # Two rows by ODE and one at a level.
    assert Image.open(tmp_path / "rows.png").size == (3 * CELL + GAP, 3 * CELL + GAP)
    assert re.search(r"error of [\d.e-]+, data in \[-1, 1\]; decoding took nfe \d+", printed)
    assert printed.endswith("wrote rows.png\n")


def test_progressive(run, tmp_path):
    printed = run("progressive.py", "--count=2", "--levels=3", "--steps=4")
    assert Image.open(tmp_path / "outputs" / "progressive.png").size == (3 * CELL + GAP, 2 * CELL + GAP)
    assert Image.open(tmp_path / "outputs" / "rate_distortion.png").size == (500, 350)
    assert re.search(r"2 samples: nfe 4, [\d.]+ seconds", printed)
    assert re.search(r"[\d.]+ bits/dim ± [\d.]+ from one image to another; nfe 4", printed)


@pytest.mark.parametrize("options", [[], ["--averaged"]])
def test_spiral(run, tmp_path, options):
    printed = run("spiral.py", "--iterations=3", "--batch_size=8", "--steps=4", *options)
    assert Image.open(tmp_path / "outputs" / "spiral.png").size == (960, 344)
    assert re.findall(r"(\d+) points: mean \|cos\| to the curve 0\.\d+ ± 0\.\d+", printed) == ["10", "20", "40"]


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [("theory_marginals.py", [], (1540, 374)), ("theory_reverse.py", ["--paths=2", "--steps=10"], (1120, 272))],
)
def test_theory(run, tmp_path, name, options, size):
    printed = run(name, *options, "--output=picture.png")
    assert Image.open(tmp_path / "picture.png").size == size
    assert printed.endswith("see picture.png\n")


def test_density_map(run, tmp_path):
    printed = run("density_map.py", "--resolution=6", "--iterations=2", "--batch_size=8", "--tolerance=0.01")
    assert Image.open(tmp_path / "outputs" / "density_map.png").size == (1160, 380)
    assert re.findall(r"^(\w+ score), ODE: off by [\d.e-]+ nats", printed, re.M) == ["exact score", "learnt score"]


def test_density_ratio(run, tmp_path):
    printed = run("density_ratio.py", "--count=4", "--dimension=4", "--probes=2", "--resolution=6")
    assert Image.open(tmp_path / "outputs" / "density_ratio.png").size == (900, 420)
    assert re.search(r"in the plane: .*\n.*reported standard error at most 0\n", printed)
    assert re.search(r"in 4 dimensions: .*\n.*reported standard error at most 0\.\d+\n", printed)


def test_maximum_likelihood(run, tmp_path):
    options = ["--pretraining=2", "--iterations=2", "--batch_size=8", "--steps=4", "--count=8"]
    printed = run("maximum_likelihood.py", *options)
    assert Image.open(tmp_path / "outputs" / "maximum_likelihood.png").size == (500, 350)
    assert re.search(r"gained, point by point: -?\d\.\d+ ± \d\.\d+ nats", printed)


def test_outliers(run, tmp_path):
    printed = run("outliers.py", "--count=2", "--together=2", "--steps=3", "--tolerance=100")
    assert Image.open(tmp_path / "outputs" / "ranking.png").size == (2 * CELL + GAP, 2 * CELL + GAP)
    assert Image.open(tmp_path / "outputs" / "outliers.png").size == (600, 780)
    assert len(re.findall(r"^[\w, ]+ \d\.\d\d( +[\d.]+ ± (?:[\d.]+|nan)){3}$", printed, re.M)) == 6
