"""The feature network that ships, and its training."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_distances import spoilt
from safetensors import safe_open
from safetensors.torch import save_file

import sde_diffusion.evaluation
from sde_diffusion.data import ArrayDataset, fashion_mnist, write_idx
from sde_diffusion.evaluation import FeatureNetwork, extract_features, frechet_distance, load_features
from sde_diffusion.evaluation.features import _normalise, accuracy, save_features, train_features
from sde_diffusion.training import CheckpointError, pretrained

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_features.py"
SHIPPED = Path(sde_diffusion.evaluation.__file__).with_name("fashion_mnist.safetensors")


@pytest.fixture(autouse=True)
def _no_folder_from_outside(monkeypatch):
    monkeypatch.delenv("SDE_DIFFUSION_DATA", raising=False)


@pytest.fixture(scope="module")
def features():
    return load_features("fashion_mnist")


@pytest.fixture(scope="module")
def few():
    """300 labelled training images."""
    train = fashion_mnist("train")
    return ArrayDataset(train.values[:300], train.labels[:300], name="few")


@pytest.fixture(scope="module")
def trained(few):
    return train_features(few, epochs=4, batch_size=50)


def test_the_shipped_network_is_what_its_header_says(features):
    with safe_open(SHIPPED, framework="pt") as file:
        description = json.loads(file.metadata()["sde_diffusion_features"])
    assert description["name"] == features.name == "fashion_mnist"
    assert description["trained_on"] == "60000 training images of Fashion-MNIST, 5 epochs, seed 0"
    assert sum(p.numel() for p in features.parameters()) == 220_234
    assert not features.training
    assert not any(p.requires_grad for p in features.parameters())
    # The slice is a sample of the images that the header's accuracy is of: binomial, five standard deviations.
    correct = description["test_accuracy"]
    slack = 5 * (correct * (1 - correct) / 2000) ** 0.5
    assert 0.9 < correct == pytest.approx(accuracy(features, fashion_mnist("test")), abs=slack)


def test_distances_are_ordered_as_the_eye_would(features):
    train, test = fashion_mnist("train"), fashion_mnist("test")
    images = train.data.points(train.values[:5000])
    reference = extract_features(images, features)
    # 1 over all training images; |x|²/64 of one image has a standard deviation of a quarter, and 1 is a wide bound.
    assert float(reference.square().mean()) == pytest.approx(1, abs=5 / 5000**0.5)
    sets = spoilt(test.data.points(test.values[:1000]), test.labels[:1000], images)
    vectors = {name: extract_features(samples, features) for name, samples in sets.items()}
    of = {name: frechet_distance(v, reference, bootstrap=20) for name, v in vectors.items()}
    # By more than the estimates' bias, which a thousand images share.
    rising = ["test images", "class 0 missing", "noise of standard deviation 0.2", "mirrored left to right"]
    for less, more in zip(rising, [*rising[1:], "blur of 1 pixel"], strict=True):
        assert 2 * of[less].distance < of[more].distance
    assert of["Gaussian of the training images"].distance > 2 * of["noise of standard deviation 0.2"].distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_of_a_batch(features, dtype):
    images = fashion_mnist("test").data.points(fashion_mnist("test").values[:7], dtype=dtype)
    out = features(images)
    assert out.shape == (7, 64)
    torch.testing.assert_close(out[3:4], features(images[3:4]), rtol=1e-4, atol=1e-5)
    assert features.classify(images).shape == (7, 10)


def test_what_overshoots_is_clipped(features):
    images = 1.5 * torch.randn(4, 1, 28, 28)
    assert torch.equal(features(images), features(images.clamp(-1, 1)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 28, 28), r"floats \(B, 1, 28, 28\).*got torch.float32, shape \(2, 28, 28\)"),
        (torch.zeros(2, 3, 28, 28), r"shape \(2, 3, 28, 28\)"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), r"got torch.uint8.*DataInfo\(\).points\(codes\)"),
        (torch.full((2, 1, 28, 28), 255.0), r"in \[-1, 1\]; got values from 255.0 to 255.0"),
        (torch.full((2, 1, 28, 28), torch.nan), r"got values from nan"),
    ],
)
def test_images_of_another_kind_are_refused(features, images, message):
    with pytest.raises(ValueError, match=message):
        features(images)


def test_extraction_is_the_same_in_any_batches(features):
    images = fashion_mnist("test").data.points(fashion_mnist("test").values[:23])
    whole = extract_features(images, features)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(extract_features(images, features, batch_size=5), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must not be empty"):
        extract_features(images[:0], features)
    with pytest.raises(ValueError, match=r"must return \(B, D\) for B images; got \(23, 1, 28, 28\)"):
        extract_features(images, lambda batch: batch)


def test_training_is_a_function_of_the_seed_alone(few, trained):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = train_features(few, epochs=4, batch_size=50)
    assert torch.equal(torch.get_rng_state(), before)
    other = train_features(few, epochs=4, batch_size=50, seed=1)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])


def test_training_learns_and_scales_the_features(few, trained):
    losses = []
    train_features(few, epochs=4, batch_size=50, callback=lambda epoch, loss: losses.append((epoch, loss)))
    assert [epoch for epoch, _ in losses] == [1, 2, 3, 4]
    # Guessing costs log 10 = 2.30.
    assert losses[-1][1] < 1.5 < losses[0][1]
    assert accuracy(trained, few) > 0.5
    assert float(trained(few.data.points(few.values)).square().mean()) == pytest.approx(1, rel=1e-5)


def test_scaling_the_features_leaves_the_class_scores(few):
    torch.manual_seed(0)
    network = FeatureNetwork()
    images = few.data.points(few.values)
    with torch.no_grad():
        before = network.classify(images)
        _normalise(network, images)
        torch.testing.assert_close(network.classify(images), before, rtol=1e-4, atol=1e-5)
    # The features of a fresh network are far from scaled, so that something was done.
    assert float(network.last.weight.detach().std()) > 2 * float(FeatureNetwork().last.weight.detach().std())


def test_no_labels():
    unlabelled = ArrayDataset(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), name="bare")
    for use in (train_features, lambda dataset: accuracy(FeatureNetwork(), dataset)):
        with pytest.raises(ValueError, match="'bare' has no labels"):
            use(unlabelled)


def test_saved_and_loaded(trained, tmp_path):
    path = tmp_path / "few.safetensors"
    save_features(trained, path, trained_on="300 images")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = load_features(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (loaded.name, loaded.dimension) == ("few", 64)
    images = torch.rand(3, 1, 28, 28) * 2 - 1
    assert torch.equal(loaded(images), trained(images))
    assert torch.equal(loaded.classify(images), trained.classify(images))


def test_files_that_do_not_load(tmp_path):
    with pytest.raises(ValueError, match="'mnist': must be one of fashion_mnist, or a file"):
        load_features("mnist")
    with pytest.raises(CheckpointError, match="describes no feature network"):
        load_features(pretrained("fashion_mnist"))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_features(path)
    header = {"sde_diffusion_features": json.dumps({"name": "x", "classes": 10, "dimension": 64})}
    save_file({"other": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(CheckpointError, match=r"body\.0\.weight: the file has nothing"):
        load_features(path)


def test_the_command_that_trains(monkeypatch, capsys, tmp_path, few):
    for prefix, count in (("train", 200), ("t10k", 100)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", few.values[:count, 0].numpy())
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", few.labels[:count].numpy().astype(np.uint8))
    monkeypatch.setenv("SDE_DIFFUSION_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--epochs=1", f"--output={tmp_path / 'out.safetensors'}"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    right = 100 * accuracy(load_features(tmp_path / "out.safetensors"), fashion_mnist("test"))
    assert f"{right:.2f} % of 100 test images right" in printed
