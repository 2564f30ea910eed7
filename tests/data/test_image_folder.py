import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from sde_diffusion import train
from sde_diffusion.cli import main
from sde_diffusion.data import DataInfo, DataSource, ImageFolder
from sde_diffusion.data.datasets import hash_of_examples


def write_images(folder, count=40, size=(6, 5)):
    """Numbered flat grey images, half of them in a subfolder."""
    (folder / "more").mkdir(parents=True)
    for index in range(count):
        name = folder / ("more" if index % 2 else "") / f"{index:03d}.png"
        Image.new("L", size, index).save(name)


def test_a_folder_of_images(tmp_path):
    write_images(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    train, test = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "test")
    assert isinstance(train, DataSource)
    assert (train.data_shape, train.data, train.classes) == ((3, 5, 6), DataInfo(), 0)
    names = [file.relative_to(tmp_path).as_posix() for file in train.files]
    assert names == sorted(names)
    assert not set(train.files) & set(test.files)
    assert len(train) + len(test) == 40
    image = train[0]
    assert (image.shape, image.dtype) == ((3, 5, 6), torch.uint8)
    assert torch.equal(image, torch.full((3, 5, 6), int(train.files[0].stem), dtype=torch.uint8))
    batch = next(iter(DataLoader(train, batch_size=3)))
    assert torch.equal(batch[2], train[2])


def test_one_file_in_ten_is_a_test_image(tmp_path):
    for index in range(1000):
        (tmp_path / f"{index}.png").touch()
    held_out = len(ImageFolder(tmp_path, "test", size=1))
    # Binomial: five standard deviations.
    assert abs(held_out - 100) < 5 * (1000 * 0.1 * 0.9) ** 0.5


def test_adding_files_moves_no_other(tmp_path):
    write_images(tmp_path)
    before = set(ImageFolder(tmp_path, "test").files)
    write_images(tmp_path / "later")
    after = set(ImageFolder(tmp_path, "test").files)
    assert before == {file for file in after if "later" not in file.parts}


def test_split_folders(tmp_path):
    write_images(tmp_path / "train", count=4)
    with pytest.raises(FileNotFoundError, match="test split"):
        ImageFolder(tmp_path, "test")
    write_images(tmp_path / "test", count=2)
    assert (len(ImageFolder(tmp_path, "train")), len(ImageFolder(tmp_path, "test"))) == (4, 2)


@pytest.fixture
def one(tmp_path):
    """A function that saves one training image and gives it back through an ImageFolder."""
    (tmp_path / "train").mkdir()

    def through_folder(image, suffix=".png", exif=None, **options):
        path = tmp_path / "train" / f"picture{suffix}"
        image.save(path, **({"exif": exif} if exif else {}))
        return ImageFolder(tmp_path, **options)[0]

    return through_folder


@pytest.mark.parametrize(("channels", "colour"), [(1, [76]), (3, [255, 0, 0]), (4, [255, 0, 0, 255])])
def test_channels(one, channels, colour):
    image = one(Image.new("RGB", (3, 2), "red"), channels=channels)
    assert image[:, 1, 2].tolist() == colour


def test_resize_covers_and_crops_the_centre(one):
    wide = Image.new("L", (40, 10))
    # The crop is columns 15 to 24; the filter reaches four pixels further.
    ImageDraw.Draw(wide).rectangle((11, 0, 28, 9), fill=200)
    image = one(wide, size=5, channels=1)
    assert torch.equal(image, torch.full((1, 5, 5), 200, dtype=torch.uint8))
    assert one(wide, size=(4, 12), channels=1).shape == (1, 4, 12)


def test_shrinking_is_antialiased(one):
    columns = np.tile(np.array([0, 255], np.uint8), (64, 32))
    image = one(Image.fromarray(columns), size=8, channels=1).float()
    # One-pixel stripes average to grey; without a filter they would alias to black or white.
    assert (image - 127.5).abs().max() < 10


def test_transparency_is_laid_over_white_unless_kept(one):
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert one(clear)[:, 0, 0].tolist() == [255, 255, 255]
    assert one(clear, channels=4)[:, 0, 0].tolist() == [10, 20, 30, 0]


def test_photographs_stand_upright(one):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert one(Image.new("RGB", (16, 8)), suffix=".jpg", exif=exif).shape == (3, 16, 8)


def test_files_of_several_sizes_need_a_size(tmp_path):
    write_images(tmp_path / "train", count=3)
    Image.new("L", (7, 7)).save(tmp_path / "train" / "z.png")
    with pytest.raises(ValueError, match=r"\(5, 6\) and .*z.png has \(7, 7\)"):
        ImageFolder(tmp_path)
    assert ImageFolder(tmp_path, size=4)[3].shape == (3, 4, 4)


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png") as caught:
        ImageFolder(tmp_path, size=4)[0]
    assert caught.value.__cause__ is not None
    with pytest.raises(ValueError, match=r"broken\.png"):
        ImageFolder(tmp_path)


def test_deep_images_are_refused_not_clipped(one):
    with pytest.raises(ValueError, match=r"picture.png: .*8 bits"):
        one(Image.fromarray(np.full((2, 2), 40_000, np.uint16)))


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        ImageFolder(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "train, test"),
        ({"channels": 2}, "1, 3, 4; got 2"),
        ({"size": 0}, "positive"),
        ({"size": (3, 3, 3)}, "positive"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    write_images(tmp_path, count=2)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, **options)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("splits", [(), ("train", "test")])
def test_classes_are_the_first_subfolders(tmp_path, splits, cached):
    # A folder without images makes no class, nor does one within another; names are in the order of text.
    for root in (tmp_path / "images" / split for split in splits or ("",)):
        for name, count in {"dog": 30, "10": 20, "9": 20, "cat/tabby": 25}.items():
            write_images(root / name, count)
        (root / "notes").mkdir()
    options = {"labels": True, "cache": tmp_path / "cache" if cached else ""}
    seen = set()
    for split in ("train", "test"):
        folder = ImageFolder(tmp_path / "images", split, **options)
        assert (folder.classes, folder.class_names) == (4, ("10", "9", "cat", "dog"))
        _, labels = zip(*folder.__getitems__(range(len(folder))), strict=True)
        root = tmp_path / "images" / (split if splits else "")
        assert [folder.class_names[label] for label in labels] == [f.relative_to(root).parts[0] for f in folder.files]
        image, label = folder[3]
        assert (label.shape, label.dtype, image.shape) == ((), torch.int64, (3, 5, 6))
        seen.update(label.item() for label in labels)
    assert seen == {0, 1, 2, 3}


def test_a_class_has_one_number_in_both_splits(tmp_path):
    for name in ("train/a", "train/c", "test/b", "test/c"):
        write_images(tmp_path / name, count=2)
    train, test = (ImageFolder(tmp_path, split, labels=True) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 2, 2], [1, 1, 2, 2])


@pytest.mark.parametrize("folder", ["", "class/", "train/", "test/"])
def test_a_file_in_no_class_is_named(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    write_images(tmp_path / "train" / "a" if folder.startswith("t") else tmp_path / "a", count=8)
    Image.new("L", (6, 5)).save(tmp_path / folder / "stray.png")
    if folder == "class/":
        assert ImageFolder(tmp_path, labels=True).classes == 2
        return
    with pytest.raises(ValueError, match=r"labels=True .*stray\.png is in none"):
        ImageFolder(tmp_path, labels=True)
    assert ImageFolder(tmp_path).classes == 0


def photographs(folder, count=12):
    """Noise of several sizes and formats, half of it turned by EXIF."""
    generator = np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(count):
        pixels = generator.integers(256, size=(20 + index, 30, 3), dtype=np.uint8)
        name = folder / ("more" if index % 2 else "") / f"{index:03d}{'.jpg' if index % 3 else '.png'}"
        Image.fromarray(pixels).save(name, exif=exif)


def arrays(cache):
    return sorted(file.name for file in cache.glob("*.npy"))


@pytest.fixture
def cached(tmp_path):
    """A function that makes the training set of tmp_path/images with its cache in tmp_path/cache."""
    photographs(tmp_path / "images" / "train")
    return lambda **options: ImageFolder(
        tmp_path / "images", **{"size": (8, 9), "cache": tmp_path / "cache", **options}
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cached_items_are_those_of_the_files(tmp_path, cached, channels):
    kept, direct = cached(channels=channels), cached(channels=channels, cache="")
    assert isinstance(kept, DataSource)
    assert (kept.data_shape, kept.data, len(kept), kept.name) == (direct.data_shape, direct.data, 12, "images")
    assert all(torch.equal(one, other) for one, other in zip(kept, direct, strict=True))
    assert hash_of_examples(kept) == hash_of_examples(direct)
    batch = next(iter(DataLoader(kept, batch_sampler=[[7, 2, 7]])))
    assert torch.equal(batch, torch.stack([direct[7], direct[2], direct[7]]))
    assert np.load(tmp_path / "cache" / arrays(tmp_path / "cache")[0]).shape == (12, channels, 8, 9)


def test_a_folder_is_decoded_once(cached, monkeypatch):
    expected = list(cached())
    monkeypatch.setattr(ImageFolder, "_decode", lambda *_: pytest.fail("decoded again"))
    assert all(torch.equal(one, other) for one, other in zip(cached(labels=False), expected, strict=True))


def test_more_files_than_are_decoded_at_once_stay_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("sde_diffusion.data.image_folder._AT_ONCE", 3)
    write_images(tmp_path / "images" / "train", count=10)
    folder = ImageFolder(tmp_path / "images", cache=tmp_path / "cache", channels=1)
    assert [int(image[0, 0, 0]) for image in folder] == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]


def rename(folder):
    (folder / "000.png").rename(folder / "0000.png")


def touch(folder):
    os.utime(folder / "000.png", ns=(0, 0))


def rewrite(folder):
    status = (folder / "000.png").stat()
    Image.new("L", (30, 20)).save(folder / "000.png")
    os.utime(folder / "000.png", ns=(status.st_atime_ns, status.st_mtime_ns))


def add(folder):
    Image.new("L", (4, 4)).save(folder / "new.png")


def remove(folder):
    (folder / "000.png").unlink()


@pytest.mark.parametrize("change", [rename, touch, rewrite, add, remove])
def test_a_changed_folder_is_decoded_anew(tmp_path, cached, change):
    cached()
    before = arrays(tmp_path / "cache")
    change(tmp_path / "images" / "train")
    kept, direct = cached(), cached(cache="")
    assert all(torch.equal(one, other) for one, other in zip(kept, direct, strict=True))
    assert len(set(arrays(tmp_path / "cache")) - set(before)) == 1


@pytest.mark.parametrize("options", [{"size": 8}, {"size": (9, 8)}, {"channels": 1}])
def test_other_options_have_an_array_of_their_own(tmp_path, cached, options):
    cached()
    assert torch.equal(cached(**options)[5], cached(**options, cache="")[5])
    assert len(arrays(tmp_path / "cache")) == 2


def test_another_pillow_decodes_anew(tmp_path, cached, monkeypatch):
    cached()
    monkeypatch.setattr("PIL.__version__", "0.0")
    cached()
    assert len(arrays(tmp_path / "cache")) == 2


def test_a_moved_folder_keeps_its_cache(tmp_path, cached, monkeypatch):
    expected = cached()[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").rename(tmp_path / "elsewhere" / "images")
    monkeypatch.setattr(ImageFolder, "_decode", lambda *_: pytest.fail("decoded again"))
    moved = ImageFolder(tmp_path / "elsewhere" / "images", size=(8, 9), cache=tmp_path / "cache")
    assert torch.equal(moved[0], expected)


def test_a_bad_file_leaves_no_array(tmp_path, cached):
    whole = (tmp_path / "images" / "train" / "006.png").read_bytes()
    (tmp_path / "images" / "train" / "006.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read image .*006\.png"):
        cached()
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    (tmp_path / "images" / "train" / "006.png").write_bytes(whole)
    assert len(cached()) == 12


def test_several_at_once_share_one_decoding(tmp_path, cached, monkeypatch):
    decoded, decode = [], ImageFolder._decode
    monkeypatch.setattr(ImageFolder, "_decode", lambda self, file: (decoded.append(file), decode(self, file))[1])
    with ThreadPoolExecutor() as threads:
        first, *others = threads.map(lambda _: cached(), range(3))
    assert len(decoded) == 12
    assert all(torch.equal(other[4], first[4]) for other in others)


def test_a_cached_folder_pickles_without_its_files(tmp_path):
    write_images(tmp_path / "images" / "train", count=250)
    kept = ImageFolder(tmp_path / "images", cache=tmp_path / "cache", labels=False)
    expected = kept[249]
    content = pickle.dumps(kept)
    assert len(content) < 3_000
    copy = pickle.loads(content)
    assert (len(copy), len(kept.files), copy.files) == (250, 250, [])
    assert torch.equal(copy[249], expected)
    assert len(pickle.loads(pickle.dumps(ImageFolder(tmp_path / "images"))).files) == 250


def test_runs_and_evaluations_go_on_with_and_without_a_cache(tmp_path, cached):
    photographs(tmp_path / "images" / "test")
    data = {"name": "image_folder", "path": str(tmp_path / "images"), "size": 8, "channels": 1}
    config = {
        "data": data,
        "network": {"name": "unet", "base_channels": 8, "channel_multipliers": (1,), "blocks_per_level": 1},
        "train": {"steps": 1, "batch_size": 2, "sample_every": 0},
        "workdir": str(tmp_path / "run"),
    }
    train(config)
    data["cache"] = str(tmp_path / "cache")
    assert train(config).step == 1
    assert len(arrays(tmp_path / "cache")) == 1

    command = ["bound", f"--workdir={tmp_path / 'run'}", "--steps=2", "--terms=1", "--repeats=2", "--count=2"]
    for option in ([], [f"--option=cache={tmp_path / 'cache'}"]):
        assert main([*command, *option]) == 0
    lines = (tmp_path / "run" / "bound_test").glob("examples-*.jsonl")
    assert sum(len(file.read_text().splitlines()) for file in lines) == 2
    settings = json.loads((tmp_path / "run" / "bound_test" / "settings.json").read_text())
    assert settings["data"] == {"name": "image_folder", "size": 8, "channels": 1, "labels": False}
    assert len(arrays(tmp_path / "cache")) == 2
