"""Latents, interpolation and progressive generation, against closed forms and each other."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sde_diffusion as sd
from sde_diffusion.data import fashion_mnist
from sde_diffusion.latent import decode, encode, interpolate, progressive, slerp
from sde_diffusion.networks import MLP
from sde_diffusion.sde import expand_to

TIGHT = {"rtol": 1e-6, "atol": 1e-6}
# Some forty steps add up errors below the tolerance each; data of standard deviation 0.45 and more let them grow by at
# most 2.2 in units of the prior.
BOUND = 100 * TIGHT["rtol"]
MEAN = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.3, 0.1], [0.3, 0.5, 0.0], [0.1, 0.0, 0.2]], dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(sde=None, variance=1.0, dimension=3):
    distribution = sd.Gaussian(torch.zeros(dimension).double(), variance * torch.eye(dimension).double())
    return distribution.under(sde or sd.VPSDE())


class Shifted(sd.Model):
    """N(mean, I) with the mean as conditioning."""

    data_shape = (3,)

    def __init__(self):
        self.sde, self.calls, self.exact = sd.VPSDE(), 0, gaussian()

    def predict(self, x, t, *, mean):
        self.calls += 1
        x0, eps = self.exact.predict(x - expand_to(self.sde.alpha(t), x) * mean, t)
        return sd.Prediction(x0 + mean, eps)


def rms(x):
    return float(x.square().mean().sqrt())


def test_a_gaussian_is_whitened_and_comes_back(any_sde):
    model = sd.Gaussian(MEAN, COVARIANCE).under(any_sde)
    x = model.sample(16, t=any_sde.t_min)
    t = torch.tensor([any_sde.t_min, any_sde.t_max], dtype=torch.float64)
    (scale, last_scale), sigma = any_sde.alpha(t), any_sde.sigma(t)
    eigenvalues, axes = torch.linalg.eigh(COVARIANCE)
    std = torch.sqrt(scale**2 * eigenvalues + sigma[0] ** 2)
    last_std = torch.sqrt(last_scale**2 * eigenvalues + sigma[1] ** 2)
    exact = last_scale * MEAN + ((x - scale * MEAN) @ axes * last_std / std) @ axes.T
    z = encode(model, x, **TIGHT)
    back = decode(model, z, **TIGHT)
    assert float((z - exact).abs().max()) / any_sde.prior_std < BOUND
    assert float((back - x).abs().max()) < BOUND
    assert float((encode(model, back, **TIGHT) - z).abs().max()) / any_sde.prior_std < BOUND


def test_the_error_of_a_round_trip_falls_with_the_tolerance(ring):
    model = ring.under(sd.VPSDE())
    x = ring.sample(64, seed=3)
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        options = {"rtol": tolerance, "atol": tolerance}
        errors.append(rms(decode(model, encode(model, x, **options), **options) - x))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_the_shipped_network_returns_images_and_latents():
    model = sd.load(sd.pretrained("fashion_mnist"))
    codes = fashion_mnist("test")[0][0][None]
    x = model.data.dequantize(codes, torch.full(codes.shape, 0.5))
    tolerance = 1e-5
    options = {"rtol": tolerance, "atol": tolerance}
    assert rms(decode(model, encode(model, x, **options), **options) - x) < 30 * tolerance
    z = normal(*x.shape, dtype=torch.float32)
    # Where decoded pixels hardly vary there is as little left of z as there is noise at t_min, and an error of a
    # tolerance there is one of a tolerance/σ in z; a few steps make one each.
    growth = 1 / float(model.sde.sigma(torch.tensor(model.sde.t_min)))
    assert rms(encode(model, decode(model, z, **options), **options) - z) < 5 * growth * tolerance


def test_latents_of_data_look_like_the_prior(ring):
    model = ring.under(sd.VPSDE())
    z = encode(model, model.sample(2000, t=model.sde.t_min, seed=1))
    # Standard errors: of a mean 1/√n, of a variance √(2/n), of a covariance 1/√n.
    assert float((z.mean(0)).abs().max()) < 4 / math.sqrt(2000)
    assert float((z.T.cov() - torch.eye(2)).abs().max()) < 4 * math.sqrt(2 / 2000)


def test_part_of_the_way_and_the_rest_are_the_whole():
    model = sd.Gaussian(MEAN, COVARIANCE).under(sd.VPSDE())
    x = model.sample(8)
    middle = encode(model, x, t_end=0.4, **TIGHT)
    end = encode(model, middle, t_start=0.4, **TIGHT)
    torch.testing.assert_close(end, encode(model, x, **TIGHT), rtol=0, atol=BOUND)
    torch.testing.assert_close(decode(model, middle, t_start=0.4, **TIGHT), x, rtol=0, atol=BOUND)


def test_an_example_does_not_depend_on_its_batch(ring):
    model = ring.under(sd.VPSDE())
    x = ring.sample(7)
    torch.testing.assert_close(encode(model, x, batch_size=2, **TIGHT), encode(model, x, **TIGHT), rtol=0, atol=BOUND)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
def test_shape_and_dtype_are_kept(shape, dtype):
    size = math.prod(shape)
    model = sd.Gaussian(torch.zeros(shape, dtype=dtype), torch.eye(size, dtype=dtype)).under(sd.VPSDE())
    x = normal(5, *shape, dtype=dtype)
    for result in (encode(model, x), decode(model, x), slerp(x, -x + 1, 0.5), interpolate(model, x, x + 1, 2)[0]):
        assert (result.shape, result.dtype) == (x.shape, dtype)


def test_conditioning_is_cut_into_batches():
    model, mean = Shifted(), normal(5, 3, seed=1)
    x = mean + normal(5, 3, seed=2)
    z = encode(model, x, cond={"mean": mean}, batch_size=2, **TIGHT)
    # What is left of the mean at t_max is α; the rest of the map is the identity.
    start, left = (float(model.sde.alpha(torch.tensor(t))) for t in (model.sde.t_min, model.sde.t_max))
    torch.testing.assert_close(z, x - (start - left) * mean, rtol=0, atol=BOUND)
    torch.testing.assert_close(decode(model, z, cond={"mean": mean}, batch_size=2, **TIGHT), x, rtol=0, atol=BOUND)
    rows = interpolate(model, x, x, 3, cond={"mean": mean}, batch_size=2, **TIGHT)
    torch.testing.assert_close(rows, x.expand(3, -1, -1), rtol=0, atol=BOUND)


def test_dropout_is_off_and_the_mode_comes_back():
    network = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(3, 3))
    model = sd.DiffusionModel(lambda x, t: network(x), sd.VPSDE(), data_shape=(3,))
    model.add_module("part", network)
    model.train()
    x = normal(4, 3, dtype=torch.float32)
    assert torch.equal(encode(model, x), encode(model, x))
    assert model.training
    assert network[0].training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: encode(m, x[:, :2]), r"x has shape \(4, 2\): need \(B, 3\)"),
        (lambda m, x: encode(m, x.long()), "x has dtype torch.int64"),
        (lambda m, x: encode(m, x / 0), r"x\[0\] holds NaN or infinite"),
        (lambda m, x: encode(m, x[:0]), "0 examples"),
        (lambda m, x: encode(m, x, batch_size=0), "batch_size = 0"),
        (lambda m, x: encode(m, x, method="rk4"), "method = 'rk4': must be one of dormand_prince, dopri5"),
        (lambda m, x: encode(m, x, rtol=0.0), "rtol = 0.0"),
        (lambda m, x: encode(m, x, t_start=0.0), "t_start = 0.0: the log-SNR is infinite there"),
        (lambda m, x: encode(m, x, t_end=2.0), "t_end = 2.0 is outside"),
        (lambda m, x: encode(m, x, t_start=0.5, t_end=0.5), "t_end must be the larger"),
        (lambda m, x: encode(m, x, cond={"label": torch.zeros(3)}), "label.* has length 3: must be 4"),
        (lambda m, x: decode(m, x[:, :2]), r"z has shape \(4, 2\): need \(B, 3\)"),
        (lambda m, x: decode(m, x / 0), r"z\[0\] holds NaN or infinite"),
        (lambda m, x: decode(m, x[:0]), "n = 0"),
        (lambda m, x: decode(m, x, method="rk4"), "method = 'rk4': must be one of dormand_prince, dopri5"),
        (lambda m, x: decode(m, x, t_start=0.3, t_end=0.5), "t_start must be the larger"),
        (lambda m, x: slerp(x, x[:2], 0.5), r"a has shape \(4, 3\), b \(2, 3\)"),
        (lambda m, x: slerp(x, x, 1.5), r"weights = \[1.5\]: must be"),
        (lambda m, x: slerp(x, 0 * x, 0.5), "b holds an example of norm 0"),
        (lambda m, x: slerp(x, -2 * x, 0.5), "opposite directions"),
        (lambda m, x: interpolate(m, x, x[:2]), "x_a holds 4 examples, x_b 2"),
        (lambda m, x: interpolate(m, x, x[:, :2]), "x_b has shape"),
        (lambda m, x: interpolate(m, x, x, 1), "weights = 1: must be at least 2"),
        (lambda m, x: interpolate(m, x, x, []), r"weights = \[\]: must be at least one"),
        (lambda m, x: interpolate(m, x, x, [0.5, -0.1]), r"weights = \[0.5, -0.1\]"),
        (lambda m, x: interpolate(m, x, x, method="linear"), "method = 'linear': must be one of ode, shared_noise"),
        (lambda m, x: interpolate(m, x, x, t=1.5), "t = 1.5 is outside"),
        (lambda m, x: interpolate(m, x, x, method="shared_noise"), "t = None: method 'shared_noise' needs"),
        (lambda m, x: interpolate(m, x, x, method="shared_noise", t=0.5, etta=1.0), "etta: solver 'ddpm' takes"),
        (lambda m, x: progressive(m, 2, levels=1), "levels = 1, steps = 1000: need 2 <= levels <= steps"),
        (lambda m, x: progressive(m, 2, levels=9, steps=8), "levels = 9, steps = 8"),
        (lambda m, x: progressive(m, 2, solver="heun"), "solver = 'heun': must be one with one evaluation a step"),
        (lambda m, x: progressive(m, 2, solver="ode"), "solver = 'ode': must be one with one evaluation a step"),
        (lambda m, x: progressive(m, 2, solver="dpm"), "solver = 'dpm': must be one of auto"),
        (lambda m, x: progressive(m, 0, steps=10), "n = 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(gaussian(), normal(4, 3))


directions = st.lists(st.floats(-10, 10), min_size=4, max_size=4).filter(lambda v: max(map(abs, v)) > 1e-3)
shares = st.floats(0, 1)


def angle(a, b):
    """Between the directions of two vectors, right for small angles too."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))


@given(directions, directions, shares)
def test_slerp_goes_along_a_great_circle(a, b, weight):
    a, b = torch.tensor([a]).double(), torch.tensor([b]).double()
    assume(angle(a, b) < 3.1)
    middle = slerp(a, b, weight)
    # sin θ > 0.04 divides the rounding of a few operations.
    close = {"abs": 1e-12, "rel": 1e-12}
    assert float(middle.norm()) == pytest.approx((1 - weight) * float(a.norm()) + weight * float(b.norm()), **close)
    assert angle(a, middle) == pytest.approx(weight * angle(a, b), **close)
    assert angle(middle, b) == pytest.approx((1 - weight) * angle(a, b), **close)


@given(directions, directions)
def test_slerp_ends_exactly(a, b):
    a, b = torch.tensor([a]).double(), torch.tensor([b]).double()
    assume(angle(a, b) < 3.1)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)


@given(directions, st.floats(-10, -2), shares)
def test_slerp_of_nearly_parallel_vectors_is_linear(a, exponent, weight):
    a = torch.tensor([a]).double()
    b = a + 10**exponent * a.norm() * torch.tensor([[0.5, -0.5, 0.5, 0.5]]).double()
    # The straight line leaves the circle by at most θ²/8 of the norm, and θ is close to 10^exponent.
    bound = float(a.norm()) * (0.2 * 10 ** (2 * exponent) + 1e-14)
    assert float((slerp(a, b, weight) - torch.lerp(a, b, weight)).abs().max()) < bound


def test_slerp_of_a_vector_and_itself_is_the_vector(dtype):
    a = normal(6, 5, dtype=dtype)
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_each_example_is_turned_by_its_own_angle():
    a, b = normal(5, 2, 3), normal(5, 2, 3, seed=1)
    apart = torch.cat([slerp(a[i : i + 1], b[i : i + 1], 0.4) for i in range(5)])
    torch.testing.assert_close(slerp(a, b, 0.4), apart)


def test_interpolation_of_white_data_is_spherical():
    """Variance preserving noise leaves N(0, I) what it is: data are their own latents."""
    a, b = normal(4, 3), normal(4, 3, seed=1)
    weights = [0.0, 0.2, 0.7, 1.0]
    expected = torch.stack([slerp(a, b, weight) for weight in weights])
    torch.testing.assert_close(interpolate(gaussian(), a, b, weights, **TIGHT), expected, rtol=0, atol=BOUND)
    torch.testing.assert_close(interpolate(gaussian(), a, b, weights, t=0.3, **TIGHT), expected, rtol=0, atol=BOUND)


def test_interpolation_by_ode_ends_at_the_data(ring):
    model = ring.under(sd.VPSDE())
    a, b = ring.sample(6, seed=1), ring.sample(6, seed=2)
    rows = interpolate(model, a, b, 5, **TIGHT)
    assert rows.shape == (5, 6, 2)
    torch.testing.assert_close(rows[[0, -1]], torch.stack([a, b]), rtol=0, atol=BOUND)
    # There are no data half-way along the straight line; the ODE passes through the ring's modes instead.
    density = model.log_prob(rows[2], model.sde.t_min).mean()
    straight = model.log_prob(torch.lerp(a, b, 0.5), model.sde.t_min).mean()
    assert float(density) > float(straight) + 10


def test_interpolation_at_a_noise_level_mixes_the_data_under_one_noise():
    model, t = gaussian(variance=0.5), 0.3
    a, b = normal(4, 3), normal(4, 3, seed=1)
    rows = interpolate(model, a, b, 5, method="shared_noise", t=t, solver="ode", seed=2, **TIGHT)
    ends = torch.tensor([t, model.sde.t_min], dtype=torch.float64)
    scale, std = model.sde.alpha(ends), torch.sqrt(0.5 * model.sde.alpha(ends) ** 2 + model.sde.sigma(ends) ** 2)
    # The flow of a Gaussian is linear, and one noise for both cancels in a difference.
    step = (b - a) / 4 * scale[0] * std[1] / std[0]
    torch.testing.assert_close(rows.diff(dim=0), step.expand(4, -1, -1), rtol=0, atol=BOUND)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_noise_of_a_mixture_is_that_of_its_level_and_not_that_of_decoding(weight):
    # From 16 numbers on, torch draws the same first ones whether it is asked for one step's or for many.
    model, t, n = gaussian(variance=0.5, dimension=16), 0.3, 500
    zero = torch.zeros(n, 16, dtype=torch.float64)
    (row,) = interpolate(model, zero, zero, [weight], method="shared_noise", t=t, steps=1, t_end=0.1, grid="t")
    # One step is x_s = c x_t + s z, whose variances add up if z does not know x_t.
    times = torch.tensor([0.1, t], dtype=torch.float64)
    (_, a), (_, b), (_, v) = sd.GaussianChain.from_sde(model.sde, times.tolist()).posterior()
    alpha, sigma = model.sde.alpha(times[1]), model.sde.sigma(times[1])
    x0 = alpha * 0.5 / (alpha**2 * 0.5 + sigma**2)
    expected = float((a * x0 + b) ** 2 * sigma**2 + v)
    assert float(row.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / row.numel()))


def test_along_a_row_only_the_weight_changes():
    model = gaussian(variance=0.5)
    a, b = normal(4, 3), normal(4, 3, seed=1)
    rows = interpolate(model, a, b, 3, method="shared_noise", t=0.3, steps=20)
    torch.testing.assert_close(rows[1], (rows[0] + rows[2]) / 2)


def test_a_pair_has_its_own_noise_whatever_its_batch():
    model = gaussian(variance=0.5)
    a, b = normal(5, 3), normal(5, 3, seed=1)
    options = {"method": "shared_noise", "t": 0.3, "steps": 10}
    rows = interpolate(model, a, b, 3, **options)
    torch.testing.assert_close(interpolate(model, a, b, 3, batch_size=2, **options), rows)
    torch.testing.assert_close(interpolate(model, a[:2], b[:2], 3, **options), rows[:, :2])
    assert not torch.allclose(interpolate(model, a, b, 3, seed=1, **options), rows)
    same = interpolate(model, a[:1].expand(2, -1), b[:1].expand(2, -1), 3, **options)
    assert not torch.allclose(same[:, 0], same[:, 1])


def test_decoding_draws_from_the_seed():
    model, t = gaussian(variance=0.5), 0.3
    a, b = normal(4, 3), normal(4, 3, seed=1)
    shared = {"method": "shared_noise", "t": t, "seed": 1}
    # The flow of a Gaussian is a factor: undone, it gives the mixture that is decoded.
    ends = torch.tensor([t, model.sde.t_min], dtype=torch.float64)
    std = torch.sqrt(0.5 * model.sde.alpha(ends) ** 2 + model.sde.sigma(ends) ** 2)
    mixture = interpolate(model, a, b, [0.3], solver="ode", **shared, **TIGHT)[0] * std[0] / std[1]
    decoded = sd.sample(model, 4, solver="ddpm", steps=10, x_start=mixture, t_start=t, seed=1).samples
    torch.testing.assert_close(interpolate(model, a, b, [0.3], steps=10, **shared)[0], decoded, rtol=0, atol=BOUND)


def test_more_noise_keeps_less_of_the_data(ring):
    model = ring.under(sd.VPSDE())
    a = ring.sample(100, seed=1)
    near, middle, far = (
        rms(interpolate(model, a, a, [0.0], method="shared_noise", t=t, steps=50)[0] - a) for t in (0.02, 0.2, 0.6)
    )
    assert near < 0.1
    assert 2 * near < middle < far


def test_progress_is_what_the_model_expects_along_the_way(ring):
    model = ring.under(sd.VPSDE())
    progress = progressive(model, 6, levels=4, steps=30, seed=3, batch_size=4)
    whole = sd.sample(model, 6, solver="ddpm", steps=30, grid="angle", seed=3, trajectory=True)
    torch.testing.assert_close(progress.samples, whole.samples)
    assert progress.times == [whole.times[i] for i in (0, 10, 19, 29)]
    for x0, t in zip(progress.x0, progress.times, strict=True):
        expected = model.denoise(whole.trajectory[whole.times.index(t)], t)
        torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-5)


def test_the_coarse_comes_first(ring):
    progress = progressive(ring.under(sd.VPSDE()), 50, levels=5, steps=100)
    distances = [rms(x0 - progress.samples) for x0 in progress.x0]
    assert distances == sorted(distances, reverse=True)
    # Of pure noise a model expects the mean of the data, and the last step goes to its expectation but for t_min.
    assert rms(progress.x0[0]) < 0.05
    assert distances[-1] < 0.01


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "em"])
def test_progress_takes_no_evaluations_of_its_own(solver):
    model = Shifted()
    progress = progressive(
        model, 3, levels=3, steps=12, solver=solver, cond={"mean": normal(3, 3)}, dtype=torch.float64
    )
    assert model.calls == progress.nfe == 12
    assert progress.x0.shape == (3, 3, 3)


def test_progress_is_that_of_the_guided_model():
    class Guided(Shifted):
        def predict(self, x, t, *, mean):
            return super().predict(x, t, mean=2 * mean)

    mean = normal(3, 3)
    options = {"levels": 2, "steps": 10, "seed": 1, "dtype": torch.float64}
    guided = progressive(Shifted(), 3, guidance=lambda _: Guided(), cond={"mean": mean}, **options)
    doubled = progressive(Shifted(), 3, cond={"mean": 2 * mean}, **options)
    torch.testing.assert_close(guided.x0, doubled.x0)


def test_a_network_with_labels_goes_all_the_way():
    torch.manual_seed(0)
    model = sd.DiffusionModel(MLP((2,), width=8, classes=3), sd.VPSDE(), data_shape=(2,))
    cond = {"label": torch.tensor([0, 1, 2])}
    x = normal(3, 2, dtype=torch.float32)
    options = {"rtol": 1e-5, "atol": 1e-5, "cond": cond}
    torch.testing.assert_close(decode(model, encode(model, x, **options), **options), x, rtol=0, atol=1e-2)
    assert progressive(model, 3, levels=2, steps=5, cond=cond).x0.shape == (2, 3, 2)
