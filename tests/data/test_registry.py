import pytest
from PIL import Image

from sde_diffusion.data import DATASETS, ImageFolder, load_dataset


def test_a_dataset_by_name():
    points = load_dataset("moons", "test", size=10)
    assert (len(points), points.data_shape) == (10, (2,))


def test_a_folder_by_name(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert isinstance(load_dataset("image_folder", path=tmp_path, size=2), ImageFolder)


def test_a_new_dataset_is_one_line(monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", lambda split, power=1: load_dataset("spiral", split, size=10**power))
    assert len(load_dataset("mine", power=2)) == 100


def test_every_entry_takes_a_split():
    for name in DATASETS:
        options = {"path": "."} if name in ("idx", "image_folder", "array_file") else {}
        with pytest.raises(ValueError, match="train, test; got 'valid'"):
            load_dataset(name, "valid", **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar", {}, "fashion_mnist, idx, image_folder, array_file, spiral.*got 'cifar'"),
        ("moons", {"sise": 3}, "'moons' has no option sise; it has size"),
        ("image_folder", {"path": ".", "bits": 3}, "no option bits; it has path, size, channels"),
        ("idx", {}, "'idx' needs the option path"),
    ],
)
def test_unknown_names_and_options_list_the_allowed(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **options)
