"""Likelihoods against closed forms."""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.networks import UNet

SDES = {"vp": sd.VPSDE(), "subvp": sd.SubVPSDE(), "ve": sd.VESDE(), "edm": sd.EDMSDE()}


@pytest.fixture(params=list(SDES.values()), ids=list(SDES))
def sde(request):
    return request.param


@pytest.fixture(scope="module")
def image_model():
    """A small random U-Net with attention, of 8-bit images, in float64 so that tolerances are what decides."""
    torch.manual_seed(0)
    network = UNet(
        (1, 4, 4), base_channels=4, channel_multipliers=(1, 2), blocks_per_level=1, attention_resolutions=(2,)
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return sd.DiffusionModel(network, sd.VPSDE(), data_shape=(1, 4, 4), data=sd.DataInfo(bits=8)).double()


def test_exact_trace_gives_the_closed_form_of_the_density_at_t_min(mixture, sde):
    model = mixture.under(sde)
    x = mixture.sample(32, seed=3).float()
    result = sd.log_likelihood(model, x, trace="exact")
    error = (result.log_prob - model.log_prob(x, result.t_min)).abs().mean() / x.shape[1]
    assert float(error) < 1e-3
    assert result.t_min == sde.t_min
    assert not bool(result.std_error.any())
    assert 0 < result.nfe < 300


def test_error_falls_with_the_tolerance(ring):
    model = ring.under(sd.VPSDE())
    x = ring.sample(64, seed=3)
    exact = model.log_prob(x, model.sde.t_min)
    errors = [
        float((sd.log_likelihood(model, x, trace="exact", rtol=tol, atol=tol).log_prob - exact).abs().max())
        for tol in (1e-3, 1e-5, 1e-7)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_its_standard_error_is_right(rotated, probe):
    distribution = rotated(16)
    model = distribution.under(sd.VPSDE())
    count, probes = 200, 16
    x = distribution.sample(count, seed=5)
    result = sd.log_likelihood(model, x, probes=probes, probe=probe, seed=1)
    deviation = result.log_prob - model.log_prob(x, result.t_min)
    # The mean over independent examples, against its own standard error.
    assert abs(float(deviation.mean())) < 4 * float(result.std_error.square().sum().sqrt()) / count
    # The square of Student's t with 15 degrees of freedom has mean 15/13 = 1.15 and variance 3.4: over 200 examples
    # 1.15 ± 0.13.
    squares = (deviation / result.std_error).square().mean()
    assert 1.15 - 4 * 0.13 < float(squares) < 1.15 + 4 * 0.13


def test_hutchinson_is_exact_for_a_diagonal_jacobian():
    """With z² = 1 a Rademacher probe reads a diagonal Jacobian without error."""
    model = sd.Gaussian(torch.zeros(5, dtype=torch.float64), torch.diag(torch.linspace(0.1, 2, 5).double())).under(
        sd.VPSDE()
    )
    x = model.sample(7)
    exact = sd.log_likelihood(model, x, trace="exact")
    estimate = sd.log_likelihood(model, x, probes=3)
    torch.testing.assert_close(estimate.log_prob, exact.log_prob, rtol=1e-9, atol=1e-9)
    assert float(estimate.std_error.max()) < 1e-9


def test_one_probe_has_no_standard_error(ring):
    model = ring.under(sd.VPSDE())
    assert bool(sd.log_likelihood(model, ring.sample(3), probes=1).std_error.isnan().all())


def test_latent_has_the_prior_density(ring):
    model = ring.under(sd.VPSDE())
    x = ring.sample(16, seed=2)
    result = sd.log_likelihood(model, x, trace="exact", rtol=1e-8, atol=1e-8)
    back = sd.sample(model, 16, x_start=result.latent, rtol=1e-8, atol=1e-8, dtype=torch.float64)
    torch.testing.assert_close(back.samples, x, rtol=0, atol=1e-5)


def test_data_rank_and_dtype(ring):
    """(B, C, H, W) is (B, D) reshaped; float32 follows float64."""
    means = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariances = 0.2 * torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    images = sd.GaussianMixture(means, covariances).under(sd.VPSDE())
    flat = sd.GaussianMixture(means.flatten(1), covariances).under(sd.VPSDE())
    x = images.sample(5)
    options = {"trace": "exact", "rtol": 1e-6, "atol": 1e-6}
    of_images = sd.log_likelihood(images, x, **options)
    torch.testing.assert_close(of_images.log_prob, sd.log_likelihood(flat, x.flatten(1), **options).log_prob)
    in_single = sd.log_likelihood(images, x.float(), **options)
    assert in_single.log_prob.dtype == torch.float32
    torch.testing.assert_close(in_single.log_prob.double(), of_images.log_prob, rtol=0, atol=4e-3)


@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
def test_an_example_does_not_depend_on_its_batch(image_model, trace):
    images = torch.randint(0, 256, (7, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    options = {"trace": trace, "rtol": 1e-5, "atol": 1e-5}
    together = sd.bits_per_dim(image_model, images, **options)
    apart = sd.bits_per_dim(image_model, images, batch_size=2, **options)
    # The tolerance is of nats a dimension; the steps of a batch are shared, so that only it can differ.
    torch.testing.assert_close(apart.per_example, together.per_example, rtol=0, atol=1e-3)


def test_exact_trace_of_a_network_is_the_mean_of_hutchinson(image_model):
    images = torch.randint(0, 256, (2, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    exact = sd.bits_per_dim(image_model, images, trace="exact")
    estimate = sd.bits_per_dim(image_model, images, probes=32)
    assert bool(((estimate.per_example - exact.per_example).abs() < 4 * estimate.per_example_std_error).all())


def test_bits_per_dim_of_a_known_density():
    """8-bit data under a Gaussian: the value is the closed form's at the same dequantised points."""
    mean, covariance = torch.zeros(2, 2), 0.1 * torch.eye(4) + 0.05
    model = sd.Gaussian(mean[None], covariance).under(sd.VPSDE())
    model.data = sd.DataInfo(low=-1.0, high=1.0, bits=8)
    codes = model.data.quantize(model.sample(400).clamp(-1, 0.999))
    result = sd.bits_per_dim(model, codes, trace="exact", t_min=1e-4)
    # Averaged over the bin the log-density is that of the code's centre, to second order in the bin's width.
    centre = (codes.float() + 0.5) / 128 - 1
    expected = -(model.log_prob(centre, 1e-4) / 4 + math.log(2 / 256)) / math.log(2)
    assert abs(result.mean - float(expected.mean())) < 4 * float((result.per_example - expected).std()) / 20 + 1e-3
    assert result.sampling_error == pytest.approx(float(result.per_example.double().std()) / 20)
    assert result.std_error == 0


def test_standard_errors_of_the_mean_are_kept_apart(image_model):
    images = torch.randint(0, 256, (4, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    result = sd.bits_per_dim(image_model, images, probes=4)
    assert result.std_error == pytest.approx(float(result.per_example_std_error.square().sum().sqrt()) / 4)
    assert result.sampling_error == pytest.approx(float(result.per_example.std()) / 2)
    assert result.mean == pytest.approx(float(result.per_example.mean()))


def test_dropout_is_off_and_the_mode_restored(image_model):
    network = UNet((1, 4, 4), base_channels=4, channel_multipliers=(1, 2), attention_resolutions=(), dropout=0.5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = sd.DiffusionModel(network, sd.VPSDE(), data_shape=(1, 4, 4)).double().train()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    first, second = (sd.log_likelihood(model, x, rtol=1e-3, atol=1e-3) for _ in range(2))
    assert torch.equal(first.log_prob, second.log_prob)
    assert model.training


def test_conditioning_reaches_the_network_in_batches():
    network = UNet((1, 4, 4), base_channels=4, channel_multipliers=(1, 2), attention_resolutions=(), classes=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = sd.DiffusionModel(network, sd.VPSDE(), data_shape=(1, 4, 4)).double()
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64).expand(3, -1, -1, -1)
    options = {"trace": "exact", "rtol": 1e-6, "atol": 1e-6}
    label = torch.tensor([0, 1, 2])
    whole = sd.log_likelihood(model, x, cond={"label": label}, **options)
    parts = sd.log_likelihood(model, x, cond={"label": label}, batch_size=2, **options)
    torch.testing.assert_close(whole.log_prob, parts.log_prob, rtol=0, atol=1e-3)
    assert float(whole.log_prob.std()) > 5e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trace": "exakt"}, "trace = 'exakt'.*hutchinson, exact"),
        ({"probe": "uniform"}, "probe = 'uniform'.*rademacher, gaussian"),
        ({"method": "decoupled!"}, "method = .*adaptive"),
        ({"probes": 0}, "probes = 0"),
        ({"t_min": 2.0}, r"t_min = 2.0 is outside the range \[0, 1.0\]"),
        ({"t_min": 1.0}, "t_min = 1.0: must be below t_max"),
        ({"t_min": 0.0}, "t_min = 0.0: the noise is 0 there"),
        ({"solver": "dopri6"}, "solver = 'dopri6'.*dopri5"),
        ({"solver": "rk4"}, "solver = 'rk4': must be one of dopri5"),
        ({"rtol": 0.0}, "rtol = 0.0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"cond": {"label": torch.zeros(3)}}, "cond.*length 3"),
    ],
)
def test_wrong_arguments_are_named(ring, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd.log_likelihood(ring.under(sd.VPSDE()), ring.sample(2), **arguments)


def test_wrong_data_are_named(ring, image_model):
    model = ring.under(sd.VPSDE())
    x = ring.sample(4)
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\)"):
        sd.log_likelihood(model, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64: need a floating dtype"):
        sd.log_likelihood(model, torch.zeros(4, 2, dtype=torch.int64))
    x[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"x\[2\] holds NaN"):
        sd.log_likelihood(model, x)
    with pytest.raises(ValueError, match="0 examples"):
        sd.log_likelihood(model, x[:0])
    with pytest.raises(ValueError, match="bits is None"):
        sd.bits_per_dim(model, torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images has dtype torch\.float32: need integer codes"):
        sd.bits_per_dim(image_model, torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"values in \[300, 300\]: need 0 to 255"):
        sd.bits_per_dim(image_model, torch.full((1, 1, 4, 4), 300))
