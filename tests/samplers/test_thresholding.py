"""Thresholds: x̂₀ in the range of the data, the pair still one of x, and what is left alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sde_diffusion as sd
from sde_diffusion.samplers.thresholding import Thresholded


class Wide(sd.Model):
    """x̂₀ = factor · x, which leaves the range of the data."""

    data_shape = (4,)

    def __init__(self, factor=3.0, data=None):
        self.sde, self.factor, self.data = sd.VPSDE(), factor, data or sd.DataInfo()

    def predict(self, x, t):
        x0 = self.factor * x
        return sd.Prediction(x0, (x - self.sde.alpha(torch.as_tensor(t)) * x0) / self.sde.sigma(torch.as_tensor(t)))


def states(n=16):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(
    threshold=st.sampled_from(["static", "dynamic", 0.5, 0.9]),
    low=st.floats(-3, 0),
    width=st.floats(0.5, 4),
    t=st.floats(0.01, 1.0),
)
def test_the_data_are_in_range_and_the_pair_is_one_of_x(threshold, low, width, t):
    model, x = Wide(data=sd.DataInfo(low, low + width)), states()
    x0, eps = Thresholded(model, threshold).predict(x, t)
    assert x0.min() >= low - 1e-12
    assert x0.max() <= low + width + 1e-12
    sde = model.sde
    time = torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(sde.alpha(time) * x0 + sde.sigma(time) * eps, x)


@pytest.mark.parametrize("threshold", ["static", "dynamic", 0.9])
def test_data_in_range_are_left_alone(threshold):
    model, x = Wide(factor=0.1), states().clamp(-3, 3)
    for part, expected in zip(Thresholded(model, threshold).predict(x, 0.5), model.predict(x, 0.5), strict=True):
        torch.testing.assert_close(part, expected)


def test_static_clamps_each_entry():
    model, x = Wide(), states()
    assert torch.equal(Thresholded(model, "static").predict(x, 0.5).x0, (3 * x).clamp(-1, 1))


def test_dynamic_divides_by_the_quantile_of_each_sample():
    model, x = Wide(), 10 * states().sign() * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    # Of |u| = 30, 60, 90, 120 the median is 75.
    expected = x.sign() * torch.tensor([30 / 75, 60 / 75, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Thresholded(model, 0.5).predict(x, 0.5).x0, expected)


def test_sample_applies_it_after_guidance():
    wide = Wide()
    out = sd.sample(wide, 5, solver="ddim", steps=4, threshold="static", guidance=lambda model: Wide(factor=5.0))
    expected = sd.sample(Thresholded(Wide(factor=5.0), "static"), 5, solver="ddim", steps=4)
    assert torch.equal(out.samples, expected.samples)
    assert out.samples.abs().max() < 1.1


@pytest.mark.parametrize("threshold", ["sttic", 0.0, 1.0, -0.5])
def test_an_unknown_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match=rf"threshold = {threshold!r}: must be 'static', 'dynamic' or a quantile"):
        sd.sample(Wide(), 2, solver="ddim", threshold=threshold)


def test_a_learned_variance_is_kept():
    class Learned(Wide):
        def predict(self, x, t):
            return sd.VariancePrediction(*super().predict(x, t), torch.full_like(x, 0.3))

    assert (Thresholded(Learned(), "static").predict(states(), 0.5).fraction == 0.3).all()
