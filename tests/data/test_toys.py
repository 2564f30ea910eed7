import math

import pytest
import torch

from sde_diffusion.data import checkerboard, eight_gaussians, moons, spiral, toy
from sde_diffusion.data.toys import TOYS


@pytest.mark.parametrize("name", TOYS)
def test_points_are_about_standardised(name):
    points = TOYS[name](20_000, seed=0)
    assert points.shape == (20_000, 2)
    assert points.dtype == torch.float32
    # The exact means are 0 but for the spiral's, (-8/k², 4/k - 16/k³) with k = 3 pi, of norm 0.415.
    assert points.mean(0).norm() < 0.415 + 5 / math.sqrt(20_000)
    # The exact second moments add to 2 within 1 %; |x|² is in [0, 7], its standard deviation below 3.5.
    assert points.square().sum(1).mean() == pytest.approx(2, abs=0.02 + 5 * 3.5 / math.sqrt(20_000))


@pytest.mark.parametrize("name", TOYS)
def test_the_seed_decides(name):
    assert torch.equal(TOYS[name](50, seed=3), TOYS[name](50, seed=3))
    assert not torch.equal(TOYS[name](50, seed=3), TOYS[name](50, seed=4))


def test_spiral_radius_follows_its_angle():
    points = spiral(2_000, seed=0).double()
    radius = points.norm(dim=1)
    expected = (3 * math.pi / 2 * radius)[:, None]
    unblurred = radius[:, None] * torch.cat([expected.cos(), expected.sin()], dim=1)
    # A radial blur r turns the predicted angle by 3 pi r / 2, which at radius 2 moves it by 3 pi r.
    assert (points - unblurred).square().mean().sqrt() < 0.05 * 3 * math.pi


def test_eight_gaussians_have_eight_modes():
    points = eight_gaussians(8_000, seed=0).double()
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = math.sqrt(1.98) * torch.stack([angle.cos(), angle.sin()], dim=1)
    distance, mode = torch.cdist(points, means).min(dim=1)
    # The modes are 1.08 apart, over ten standard deviations of 0.1.
    assert distance.max() < 0.54
    assert distance.square().mean() / 2 == pytest.approx(0.01, rel=0.06)
    assert (torch.bincount(mode) - 1000).abs().max() < 5 * math.sqrt(8000 * 7 / 64)


def test_checkerboard_has_only_dark_squares():
    squares = (checkerboard(10_000, seed=0) / (math.sqrt(12) / 4) + 2).double()
    squares = squares[(squares - squares.round()).abs().min(dim=1).values > 1e-5].floor().long()
    assert ((squares >= 0) & (squares < 4)).all()
    assert (squares.sum(dim=1) % 2 == 0).all()
    occupied = torch.bincount(4 * squares[:, 0] + squares[:, 1], minlength=16)
    assert (occupied > 0).sum() == 8


def test_moons_are_two_half_circles():
    points = moons(10_000, seed=0) / math.sqrt(2)
    from_upper = (points + torch.tensor([0.5, 0.25])).norm(dim=1)
    from_lower = (points - torch.tensor([0.5, 0.25])).norm(dim=1)
    # Blurred by 0.05 / sqrt(2): six standard deviations, of 10,000 points.
    assert torch.minimum((from_upper - 1).abs(), (from_lower - 1).abs()).max() < 6 * 0.05 / math.sqrt(2)


@pytest.mark.parametrize("name", TOYS)
def test_as_a_dataset(name):
    train, test = toy(name, "train", size=64), toy(name, "test", size=32)
    assert (train.data_shape, train.data.bits, train.classes, train.name) == ((2,), None, 0, name)
    assert (len(train), len(test)) == (64, 32)
    assert not torch.equal(train.values[:32], test.values)


def test_bad_arguments():
    with pytest.raises(ValueError, match="spiral, eight_gaussians, checkerboard, moons; got 'rings'"):
        toy("rings")
    with pytest.raises(ValueError, match="train, test"):
        toy("spiral", "valid")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        toy("spiral", size=0)
