"""Log ratios of densities against closed forms."""

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.networks import MLP

SDE = sd.VPSDE()


@pytest.fixture(scope="module")
def other():
    """A broad Gaussian, as wide as the ring."""
    return sd.Gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)).under(SDE)


def test_ratio_is_the_closed_form_s(ring, other):
    model, x = ring.under(SDE), ring.sample(16, seed=1)
    result = sd.log_density_ratio(model, other, x, method="adaptive", trace="exact", rtol=1e-6, atol=1e-6)
    expected = model.log_prob(x, SDE.t_min) - other.log_prob(x, SDE.t_min)
    torch.testing.assert_close(result.log_ratio, expected, rtol=0, atol=1e-3)
    assert not bool(result.std_error.any())


def test_standard_error_covers_the_error(rotated):
    first, second = rotated(16).under(SDE), sd.Gaussian(torch.zeros(16).double(), torch.eye(16).double()).under(SDE)
    x = rotated(16).sample(64, seed=1)
    result = sd.log_density_ratio(first, second, x, probes=8, seed=3)
    error = result.log_ratio - (first.log_prob(x, SDE.t_min) - second.log_prob(x, SDE.t_min))
    assert bool((result.std_error > 0).all())
    # Student's t of 7 degrees of freedom, or of fewer, leaves 4 standard errors to one in some 200.
    assert float((error.abs() < 4 * result.std_error).double().mean()) > 0.9
    assert torch.equal(result.std_error, result.numerator.std_error + result.denominator.std_error)


def test_common_random_numbers_cancel(rotated):
    """Two models a little apart have nearly the same errors with frozen probes: that of the ratio is far below."""
    distribution = rotated(16)
    near = sd.GaussianMixture(distribution.means + 0.01, _covariances(distribution)).under(SDE)
    model, x = distribution.under(SDE), distribution.sample(32, seed=1)
    result = sd.log_density_ratio(near, model, x, method="adaptive", probes=4)
    error = result.log_ratio - (near.log_prob(x, SDE.t_min) - model.log_prob(x, SDE.t_min))
    assert float(error.abs().mean()) < 0.2 * float(result.std_error.mean())
    assert not bool(sd.log_density_ratio(model, model, x, probes=4).log_ratio.any())


def _covariances(mixture):
    return mixture.eigenvectors @ torch.diag_embed(mixture.eigenvalues) @ mixture.eigenvectors.mT


def test_one_model_under_two_conditions():
    torch.manual_seed(0)
    network = MLP((2,), width=8, depth=2, embedding=0, time_scale=1.0, classes=2)
    model, x = sd.DiffusionModel(network, SDE, "v", data_shape=(2,)).double(), torch.randn(3, 2).double()
    options = {"trace": "exact"}
    label = torch.tensor([0, 1, 1])
    result = sd.log_density_ratio(model, model, x, numerator_cond={"label": label}, **options)
    expected = sd.log_likelihood(model, x, cond={"label": label}, **options).log_prob
    torch.testing.assert_close(result.numerator.log_prob, expected)
    torch.testing.assert_close(result.denominator.log_prob, sd.log_likelihood(model, x, **options).log_prob)
    assert float(result.log_ratio.abs().min()) > 1e-3


def test_wrong_arguments_are_named(ring, rotated, other):
    x = ring.sample(2)
    with pytest.raises(ValueError, match=r"numerator.data_shape = \(2,\), denominator.data_shape = \(16,\)"):
        sd.log_density_ratio(other, rotated(16).under(SDE), x)
    with pytest.raises(ValueError, match="cond: give numerator_cond"):
        sd.log_density_ratio(other, other, x, cond={})
    images = ring.under(SDE)
    images.data = sd.DataInfo(bits=8)
    with pytest.raises(ValueError, match=r"numerator\.data = "):
        sd.log_density_ratio(images, other, x)
