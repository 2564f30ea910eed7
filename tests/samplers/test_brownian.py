"""torchsde on the reverse SDE: every method, its law, and its independence of the batch."""

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.brownian import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_moments_of_p(method, two_modes, deviations):
    target = two_modes()
    model = target.distribution.under(sd.VPSDE())
    # reversible_heun does not damp what the others do, and needs many more steps.
    steps = 1600 if method == "reversible_heun" else 200
    out = sd.sample(model, 5000, solver="torchsde", method=method, steps=steps, t_end=0.3)
    t = torch.tensor(0.3, dtype=torch.float64)
    covariance = sd.VPSDE().alpha(t) ** 2 * target.covariance + sd.VPSDE().sigma(t) ** 2 * torch.eye(2)
    assert float(deviations(out.samples, covariance).abs().max()) < 4


@pytest.mark.parametrize("method", ["srk"])
def test_adaptive_steps_follow_the_path_of_small_steps(method, two_modes):
    """The tighter the tolerance, the nearer to the limit on the same Brownian path."""
    model = two_modes(dtype=torch.float64).distribution.under(sd.VPSDE())
    options = {"solver": "torchsde", "method": method, "adaptive": True, "steps": 10, "t_end": 0.1}

    def solve(tolerance):
        return sd.sample(model, 3, rtol=tolerance, atol=tolerance, dtype=torch.float64, **options).samples

    loose, tight, limit = solve(1e-1), solve(1e-3), solve(1e-4)
    assert float((tight - limit).abs().max()) < float((loose - limit).abs().max())


def test_adaptive_samples_do_not_depend_on_their_batch(two_modes):
    model = two_modes(dtype=torch.float64).distribution.under(sd.VPSDE())
    options = {"solver": "torchsde", "adaptive": True, "steps": 10, "dtype": torch.float64}
    together = sd.sample(model, 5, **options).samples
    torch.testing.assert_close(sd.sample(model, 5, batch_size=2, **options).samples, together, rtol=0, atol=1e-10)


def test_a_stage_is_evaluated_once(two_modes):
    """srk has four stages, but asks for their drifts nine times a step."""
    model = two_modes().distribution.under(sd.VPSDE())
    assert sd.sample(model, 2, solver="torchsde", method="srk", steps=10).nfe <= 4 * 10
    assert sd.sample(model, 2, solver="torchsde", method="euler", steps=10).nfe == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk"}, "method = 'rk': must be one of euler, "),
        ({"eta": 0.0}, "eta = 0.0"),
        ({"rtol": 0.0}, "rtol = 0.0"),
        ({"grid": "t"}, "equal steps in log-SNR"),
        ({"nfe": 10}, "nfe"),
    ],
)
def test_wrong_options_are_named(options, message, two_modes):
    with pytest.raises(ValueError, match=message):
        sd.sample(two_modes().distribution.under(sd.VPSDE()), 2, solver="torchsde", **options)
