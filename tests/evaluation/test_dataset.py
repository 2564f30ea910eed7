"""A data set is evaluated exactly once, whatever interrupts it and however it is shared."""

import contextlib
import json
import math
import multiprocessing
import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sde_diffusion as sd
from sde_diffusion.data import ArrayDataset
from sde_diffusion.evaluation import bound_measure, evaluate_dataset, fingerprint, likelihood_measure
from sde_diffusion.samplers.noise import Streams

SIZE = 11
SETTINGS = {"model": "abc", "options": {"probes": 2, "rtol": None}}


class Interrupted(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def dataset():
    values = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ArrayDataset(values, labels=torch.arange(SIZE) % 2)


def random_measure(stop_after=math.inf, seen=None, stop=None):
    """Columns that depend on an example and its stream; it counts the indices, and stops at a call."""
    seen = [] if seen is None else seen
    calls = 0

    def measure(examples, indices):
        nonlocal calls
        if calls == stop_after:
            (stop or interrupt)()
        calls += 1
        seen.extend(indices)
        noise = Streams(0, indices).normal((2,), torch.float64)
        return {
            "nats_per_dim": examples.square().sum(1) + noise[:, 0],
            "std_error": noise[:, 1].abs(),
            "solver_error": -1e-3 * noise[:, 0],
            "prior": examples[:, 0],
            "nfe": torch.tensor(indices) + 10,
        }

    return measure


def interrupt():
    raise Interrupted


def evaluate(dataset, directory, measure=None, **options):
    options = {"settings": SETTINGS, "batch_size": 4, "progress": False, **options}
    return evaluate_dataset(measure or random_measure(), dataset, directory, **options)


def numbers(result):
    """What must not depend on how the work was divided."""
    return {name: value for name, value in result.summary().items() if name not in ("seconds", "ranks")}


def stored(directory):
    """result.json, and all lines of the examples."""
    rows = [json.loads(line) for path in directory.glob("*.jsonl") for line in path.read_text().splitlines()]
    return json.loads((directory / "result.json").read_text()), rows


def the_file(directory):
    (path,) = directory.glob("*.jsonl")
    return path


def test_every_example_once_with_its_own_stream_and_a_partial_last_batch(dataset, tmp_path):
    seen = []
    result = evaluate(dataset, tmp_path / "new" / "folder", random_measure(seen=seen))
    assert seen == list(range(SIZE))
    at_once = random_measure()(dataset.values, list(range(SIZE)))
    assert torch.equal(result.values, at_once["nats_per_dim"])
    assert torch.equal(result.columns["nfe"], at_once["nfe"])
    assert result.unit == "nats/dim"


def test_the_result_follows_from_the_lines(dataset, tmp_path):
    result = evaluate(dataset, tmp_path)
    summary, rows = stored(tmp_path)
    values = [row["nats_per_dim"] for row in rows]
    mean = math.fsum(values) / SIZE
    assert summary["mean"] == pytest.approx(mean, rel=1e-14)
    assert summary["sampling_error"] == pytest.approx(
        math.sqrt(sum((value - mean) ** 2 for value in values) / (SIZE - 1) / SIZE), rel=1e-12
    )
    assert summary["std_error"] == pytest.approx(math.hypot(*(row["std_error"] for row in rows)) / SIZE, rel=1e-12)
    assert summary["solver_error"] == pytest.approx(sum(abs(row["solver_error"]) for row in rows) / SIZE, rel=1e-12)
    assert summary["parts"] == {"prior": pytest.approx(sum(row["prior"] for row in rows) / SIZE, rel=1e-12)}
    assert summary["totals"] == {"nfe": sum(range(10, 10 + SIZE))}
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert (summary["count"], summary["ranks"], summary["quantity"]) == (SIZE, 1, "nats_per_dim")
    assert summary["settings"] == {**SETTINGS, "fingerprint": fingerprint(dataset)}
    assert summary == result.summary()
    assert Image.open(result.histogram).size == (500, 350)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".jsonl", ".png"]


@settings(max_examples=8)
@given(
    stop_after=st.integers(0, 6),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_any_interruption_batches_and_ranks_give_the_same_numbers(dataset, tmp_path_factory, stop_after, sizes, ranks):
    directory, seen = tmp_path_factory.mktemp("interrupted"), []

    def share(measure, rank, run):
        return evaluate(dataset, directory, measure, batch_size=sizes[run], rank=rank, ranks=ranks[run])

    for rank in range(ranks[0]):
        with contextlib.suppress(Interrupted):
            share(random_measure(stop_after, seen), rank, 0)
    results = [share(random_measure(seen=seen), rank, 1) for rank in range(ranks[1])]
    assert sorted(seen) == list(range(SIZE))
    at_once = evaluate(dataset, tmp_path_factory.mktemp("at_once"), batch_size=SIZE)
    assert numbers(results[-1]) == numbers(at_once)
    assert stored(directory)[0]["mean"] == at_once.mean


def test_ranks_wait_for_no_other_and_the_last_one_writes_the_result(dataset, tmp_path):
    assert evaluate(dataset, tmp_path, rank=1, ranks=3) is None
    assert evaluate(dataset, tmp_path, rank=0, ranks=3) is None
    assert not (tmp_path / "result.json").exists()
    assert evaluate(dataset, tmp_path, rank=2, ranks=3).ranks == 3
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    assert stored(tmp_path)[0]["count"] == SIZE


def test_a_rank_without_examples_writes_nothing(dataset, tmp_path):
    assert evaluate(dataset, tmp_path / "folder", count=3, rank=3, ranks=4) is None
    assert not (tmp_path / "folder").exists()


def test_a_run_that_is_done_measures_nothing_again(dataset, tmp_path):
    first = evaluate(dataset, tmp_path)
    seen = []
    again = evaluate(dataset, tmp_path, random_measure(seen=seen))
    assert (seen, again.summary()) == ([], first.summary())
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_a_larger_count_goes_on_and_a_smaller_one_looks_at_its_own(dataset, tmp_path):
    first = evaluate(dataset, tmp_path, count=5)
    seen = []
    assert evaluate(dataset, tmp_path, random_measure(seen=seen), count=1000).count == SIZE
    assert seen == list(range(5, SIZE))
    assert numbers(evaluate(dataset, tmp_path, count=5)) == numbers(first)
    assert stored(tmp_path)[0]["count"] == 5


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_killed_process_loses_the_batch_it_was_at(dataset, tmp_path):
    stop = random_measure(2, stop=lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(target=evaluate, args=(dataset, tmp_path, stop))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    seen = []
    result = evaluate(dataset, tmp_path, random_measure(seen=seen))
    assert seen == [8, 9, 10]
    assert numbers(result) == numbers(evaluate(dataset, tmp_path / "at_once"))


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_a_torn_last_line_is_measured_anew(dataset, tmp_path, kept):
    with pytest.raises(Interrupted):
        evaluate(dataset, tmp_path, random_measure(1))
    path = the_file(tmp_path)
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:kept])
    seen = []
    result = evaluate(dataset, tmp_path, random_measure(seen=seen))
    assert seen == list(range(3, SIZE))
    assert numbers(result) == numbers(evaluate(dataset, tmp_path / "at_once"))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b'{"index": 1, "nats_per',
        b'{"nats_per_dim": 1.0}',
        b'{"index": 1}',
        b'{"index": 11, "nats_per_dim": 1.0}',
        b'{"index": 1.0, "nats_per_dim": 1.0}',
        b'{"index": 1, "nats_per_dim": null}',
        b'{"index": 1, "nats_per_dim": 1.0}',
        b"[1, 2]",
        b"\x00\x00\xff",
    ],
)
def test_a_damaged_line_within_a_file_is_named(dataset, tmp_path, line):
    with pytest.raises(Interrupted):
        evaluate(dataset, tmp_path, random_measure(1))
    path = the_file(tmp_path)
    lines = path.read_bytes().splitlines()
    lines[1] = line
    damaged = b"\n".join(lines) + b"\n"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{path}, line 2: not the line of an example"):
        evaluate(dataset, tmp_path)
    assert the_file(tmp_path).read_bytes() == damaged


def test_an_example_that_two_processes_measured_counts_once(dataset, tmp_path):
    first = evaluate(dataset, tmp_path)
    (tmp_path / "examples-9.jsonl").write_bytes(the_file(tmp_path).read_bytes())
    assert evaluate(dataset, tmp_path).summary() == first.summary()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "model": "abd"}, "model = 'abd': .* evaluated with 'abc'; go on with that, or give another"),
        ({**SETTINGS, "options": {"probes": 8, "rtol": None}}, "options.probes = 8: .* evaluated with 2"),
        ({"model": "abc"}, "options.probes = None: .* evaluated with 2"),
        ({**SETTINGS, "seed": 1}, "seed = 1: .* evaluated with None"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(dataset, tmp_path, settings, message):
    evaluate(dataset, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        evaluate(dataset, tmp_path, settings=settings)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_data_are_refused(dataset, tmp_path):
    evaluate(dataset, tmp_path)
    changed = dataset.values.clone()
    changed[4, 1] += 1e-12
    for other in (dataset.values[:-1], changed, dataset.values[:, :2]):
        with pytest.raises(ValueError, match="fingerprint = "):
            evaluate(ArrayDataset(other), tmp_path)


def test_lines_without_settings_are_refused(dataset, tmp_path):
    evaluate(dataset, tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds examples, but no settings\.json says of what"):
        evaluate(dataset, tmp_path)


def test_a_measure_that_fails_at_once_leaves_no_directory(dataset, tmp_path):
    with pytest.raises(Interrupted):
        evaluate(dataset, tmp_path / "folder", random_measure(0))
    assert not (tmp_path / "folder").exists()


def test_a_value_that_is_not_finite_names_its_example(dataset, tmp_path):
    def measure(examples, indices):
        return {"nats_per_dim": torch.tensor([1.0 if index < 6 else math.inf for index in indices])}

    with pytest.raises(ValueError, match="example 6: nats_per_dim = inf: must be finite"):
        evaluate(dataset, tmp_path, measure)
    assert len(the_file(tmp_path).read_bytes().splitlines()) == 4


def test_errors_that_cannot_be_estimated_are_null(dataset, tmp_path):
    def measure(examples, indices):
        return {"nats_per_dim": examples[:, 0], "std_error": examples[:, 0] * math.nan}

    result = evaluate(dataset, tmp_path, measure, count=1)
    assert math.isnan(result.std_error)
    assert [stored(tmp_path)[0][name] for name in ("std_error", "solver_error", "sampling_error")] == [None] * 3
    assert "NaN" not in (tmp_path / "result.json").read_text() + the_file(tmp_path).read_text()


def test_examples_are_fetched_batch_by_batch(tmp_path):
    fetched = []

    class Source:
        data_shape, data, classes = (2,), sd.DataInfo(bits=None), 0

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            fetched.append(index)
            return torch.full((2,), float(index))

    def measure(examples, indices):
        assert fetched[-len(indices) :] == indices
        return {"nats_per_dim": examples.sum(1)}

    evaluate(Source(), tmp_path, measure, count=10)
    # The fingerprint takes 64 looks.
    assert fetched[64:] == list(range(10))


def test_the_bar_shows_the_mean_so_far(dataset, tmp_path, capsys):
    with pytest.raises(Interrupted):
        evaluate(dataset, tmp_path, random_measure(1))
    result = evaluate(dataset, tmp_path, progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert f"{SIZE}/{SIZE}" in last
    assert f"{result.mean:.4f} ± {result.sampling_error:.4f}" in last
    fewer = evaluate(dataset, tmp_path, progress=True, count=5)
    assert f"{fewer.mean:.4f} ± {fewer.sampling_error:.4f}" in capsys.readouterr().err.split("\r")[-1]
    evaluate(dataset, tmp_path, progress=True, count=2, rank=1, ranks=2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count = 0: must be at least 1"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"ranks": 0}, "ranks = 0: must be at least 1"),
        ({"rank": 2, "ranks": 2}, r"rank = 2: must be in \[0, 2\)"),
        ({"rank": -1}, r"rank = -1: must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(dataset, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(dataset, tmp_path / "folder", **options)
    assert not (tmp_path / "folder").exists()


@pytest.fixture(scope="module")
def coded():
    """The exact model of codes near a Gaussian, and eleven of them."""
    model = sd.Gaussian(torch.zeros(3), 0.1 * torch.eye(3)).under(sd.VPSDE())
    model.data = sd.DataInfo(bits=4)
    return model, torch.randint(0, 16, (SIZE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_bound_of_a_data_set_is_that_of_its_examples(coded, tmp_path):
    model, codes = coded
    dataset, options = ArrayDataset(codes, data=model.data), {"steps": 5, "seed": 3}
    result = evaluate(dataset, tmp_path, bound_measure(model, **options))
    bound = sd.variational_bound(model, codes, **options)
    torch.testing.assert_close(result.values, bound.per_example.double(), rtol=1e-5, atol=1e-6)
    assert result.mean == pytest.approx(bound.mean, rel=1e-5)
    assert result.std_error == pytest.approx(bound.std_error, rel=1e-4)
    assert result.sampling_error == pytest.approx(bound.sampling_error, rel=1e-4)
    assert sum(result.parts.values()) == pytest.approx(bound.mean, rel=1e-5)
    assert list(result.parts) == ["prior", "transitions", "decoder"]
    assert (result.unit, result.totals) == ("bits/dim", {"nfe": SIZE * bound.nfe})


@pytest.mark.parametrize(
    "options", [{"trace": "exact"}, {"method": "adaptive", "probe": "rademacher", "probes": 2}], ids=["exact", "probes"]
)
def test_the_bits_of_a_data_set_are_those_of_its_examples(coded, tmp_path, options):
    model, codes = coded
    result = evaluate(ArrayDataset(codes, data=model.data), tmp_path, likelihood_measure(model, seed=3, **options))
    bits = sd.bits_per_dim(model, codes, seed=3, **options)
    # Other batches, other steps: to the solvers' tolerance.
    torch.testing.assert_close(result.values, bits.per_example.double(), rtol=1e-3, atol=1e-3)
    assert result.std_error == pytest.approx(bits.std_error, rel=1e-2)
    assert result.solver_error == pytest.approx(bits.solver_error, abs=1e-3, nan_ok=True)
    assert result.sampling_error == pytest.approx(bits.sampling_error, rel=1e-2)
    assert result.unit == "bits/dim"
    assert list(result.totals) == ["nfe", "derivative_evaluations"]


def test_continuous_data_are_in_nats(tmp_path):
    distribution = sd.Gaussian(torch.zeros(3), torch.eye(3))
    x = distribution.sample(SIZE, seed=1).float()
    options = {"trace": "exact", "t_min": 1e-3}
    result = evaluate(x, tmp_path, likelihood_measure(distribution.under(sd.VPSDE()), **options))
    # N(0, I) is the same at every time.
    expected = 0.5 * (x.double().square().mean(1) + math.log(2 * math.pi))
    torch.testing.assert_close(result.values, expected, rtol=1e-4, atol=1e-4)
    assert (result.unit, result.std_error) == ("nats/dim", 0.0)
