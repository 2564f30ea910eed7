import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from sde_diffusion.data import DataInfo, DataSource, ImageFolder


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
