import numpy as np
import pytest
import torch
from PIL import Image

from sde_diffusion.data import DataInfo, image_grid, save_picture
from sde_diffusion.data.pictures import save_trajectories


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_stand_in_their_cells(channels, mode):
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, channels, 3, 4)
    grid = image_grid(images, columns=2)
    assert (grid.mode, grid.size) == (mode, (2 * 6 + 2, 3 * 5 + 2))
    pixels = torch.from_numpy(np.array(grid)).reshape(17, 14, channels)
    for index in range(5):
        row, column = divmod(index, 2)
        top, left = 2 + 5 * row, 2 + 6 * column
        assert (pixels[top : top + 3, left : left + 4] == index).all()
    assert (pixels[[0, 1, 5, 6, 10, 11, 15, 16]] == 255).all()
    assert (pixels[12:15, 8:] == 255).all()


def test_zoom_repeats_pixels():
    image = torch.tensor([[0, 50], [100, 150]], dtype=torch.uint8)[None, None]
    pixels = np.array(image_grid(image, zoom=3))[2:-2, 2:-2]
    np.testing.assert_array_equal(pixels, np.kron(image[0, 0].numpy(), np.ones((3, 3), np.uint8)))


def test_the_default_is_about_square():
    assert image_grid(torch.zeros(10, 1, 1, 1, dtype=torch.uint8)).size == (4 * 3 + 2, 3 * 3 + 2)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(2, 1, 3, 3), {}, "uint8"),
        (torch.zeros(2, 2, 3, 3, dtype=torch.uint8), {}, r"\(2, 2, 3, 3\)"),
        (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), {}, "empty"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), {"columns": 0}, "columns=0"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), {"zoom": 0}, "zoom=0"),
    ],
)
def test_bad_input_to_image_grid(images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **options)


@pytest.mark.parametrize("bits", [8, 5, None])
def test_images_are_saved_in_model_space(tmp_path, bits):
    path = tmp_path / "deep" / "folder" / "grid.png"
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0])[:, None, None, None].expand(4, 1, 2, 2)
    save_picture(x, DataInfo(bits=bits), path)
    pixels = np.array(Image.open(path))
    assert pixels.shape == (18, 18)
    assert [pixels[4, 4], pixels[4, 12], pixels[12, 4], pixels[12, 12]] == [0, 0, 128, 255]


def test_large_images_are_not_enlarged(tmp_path):
    save_picture(torch.zeros(1, 3, 65, 10), DataInfo(), tmp_path / "large.png")
    assert Image.open(tmp_path / "large.png").size == (14, 69)


def test_points_are_plotted(tmp_path):
    save_picture(torch.zeros(3, 2, requires_grad=True), DataInfo(bits=None), tmp_path / "points.png")
    with Image.open(tmp_path / "points.png") as picture:
        assert np.array(picture.convert("L")).min() < 255


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 5, 5), (7,), (0, 2)])
def test_other_shapes_are_refused_and_nothing_is_written(tmp_path, shape):
    with pytest.raises(ValueError, match="x must be images"):
        save_picture(torch.zeros(shape), DataInfo(), tmp_path / "new" / "a.png")
    assert not (tmp_path / "new").exists()


def test_rows_have_the_columns_asked_for(tmp_path):
    save_picture(torch.zeros(6, 1, 2, 2), DataInfo(), tmp_path / "rows.png", columns=2)
    assert Image.open(tmp_path / "rows.png").size == (2 * 8 + 2, 3 * 8 + 2)


def test_trajectories_are_drawn_darker_towards_their_end(tmp_path):
    way = torch.linspace(-1, 1, 21)[:, None, None] * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, 0.5])
    dots = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    path = tmp_path / "new" / "ways.png"
    save_trajectories([way, way], [dots, dots], ["left", "right"], path, curve=dots)
    pixels = np.array(Image.open(path).convert("L")).astype(float)
    assert pixels.shape == (344, 640)
    # Within the frame of the left panel the way is the darkest row.
    panel = pixels[60:300, 70:250]
    row = panel[panel.mean(1).argmin()]
    assert row[-20:].mean() < row[:20].mean() < 250


@pytest.mark.parametrize(
    ("ways", "points", "titles", "message"),
    [
        ([torch.zeros(3, 4, 2)], [], [""], "got 1, 0 and 1"),
        ([], [], [], "got 0, 0 and 0"),
        ([torch.zeros(1, 4, 2)], [torch.zeros(2, 2)], [""], r"got \(1, 4, 2\)"),
        ([torch.zeros(3, 4, 3)], [torch.zeros(2, 2)], [""], r"got \(3, 4, 3\)"),
        ([torch.zeros(3, 4, 2)], [torch.zeros(0, 2)], [""], r"and \(0, 2\)"),
    ],
)
def test_bad_input_to_save_trajectories(tmp_path, ways, points, titles, message):
    with pytest.raises(ValueError, match=message):
        save_trajectories(ways, points, titles, tmp_path / "ways.png")
