"""Linear multistep methods over σ/α: orders and where they hold, exactness, DDIM, and PNDM's published steps."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad

import sde_diffusion as sd

VP = sd.VPSDE()
# Its time is σ/α.
EDM = sd.EDMSDE(sigma_min=0.1, sigma_max=10.0)
ORDERS = (1, 2, 3, 4)
LMS = [("lms", {"order": p}) for p in ORDERS]
PNDM = [("pndm", {"order": p, "warmup": w}) for p in ORDERS for w in ("runge_kutta", "multistep")]


def start(sde, n=8, size=2):
    return sde.prior_std * torch.randn(n, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def solve(model, x, solver, **options):
    return sd.sample(model, len(x), solver=solver, x_start=x, dtype=x.dtype, **options)


@pytest.fixture(scope="module")
def convergence(two_modes):
    """convergence(sde, solver, options, grids): binary logarithm of the errors' ratio, against the ODE's end point."""
    known = {}

    def measure(sde, solver, options, grids):
        model, x = two_modes(dtype=torch.float64).distribution.under(sde), start(sde)
        # Equal to rounding for all grids to the same end.
        key = sde, round(grids[0][-1], 9)
        if key not in known:
            ends = {"t_start": grids[0][0], "t_end": grids[0][-1]}
            known[key] = solve(model, x, "ode", method="dopri8", rtol=1e-11, atol=1e-11, **ends).samples
        coarse, fine = (
            float((solve(model, x, solver, grid=grid, **options).samples - known[key]).square().mean().sqrt())
            for grid in grids
        )
        return math.log2(coarse / fine)

    return measure


def equal_in_log_snr(sde, steps, cuts=0):
    """To a log-SNR of 4, with the first step cut in halves down to 2⁻ᶜᵘᵗˢ of it."""
    first = float(sde.log_snr(torch.tensor(sde.t_max, dtype=torch.float64)))
    halves = [2.0**-i for i in range(cuts, 0, -1)]
    fractions = torch.tensor([0.0, *halves, *range(1, steps + 1)], dtype=torch.float64) / steps
    return [sde.t_max, *sde.t_from_log_snr(first + (4 - first) * fractions[1:]).tolist()]


@pytest.mark.parametrize("order", ORDERS)
def test_lms_has_its_order(convergence, order):
    # The first step, which is of first order, would show in the error from fourth order on.
    steps = {1: 40, 2: 80, 3: 160, 4: 320}[order]
    grids = [equal_in_log_snr(VP, n, cuts=12) for n in (steps, 2 * steps)]
    assert convergence(VP, "lms", {"order": order}, grids) == pytest.approx(order, abs=0.2)
    assert sd.samplers.SOLVERS["lms"](order=order).convergence_order == order


def test_lms_has_its_order_for_every_sde(any_sde, convergence):
    grids = [equal_in_log_snr(any_sde, n, cuts=8) for n in (160, 320)]
    assert convergence(any_sde, "lms", {"order": 3}, grids) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize(("solver", "options"), PNDM, ids=str)
def test_pndm_is_of_second_order_at_most(solver, options, convergence):
    order = min(options["order"], 2)
    assert sd.samplers.SOLVERS[solver](**options).convergence_order == order
    grids = [equal_in_log_snr(VP, n) for n in (160, 320)]
    assert convergence(VP, solver, options, grids) == pytest.approx(order, abs=0.2)


def test_pndm_is_of_second_order_for_every_sde(any_sde, convergence):
    grids = [equal_in_log_snr(any_sde, n) for n in (160, 320)]
    assert convergence(any_sde, "pndm", {}, grids) == pytest.approx(2, abs=0.2)


def test_pndm_is_of_its_weights_order_where_steps_are_equal_in_the_ratio(convergence):
    for order, steps in ((3, 600), (4, 1200)):
        grids = [torch.linspace(10.0, 0.5, n + 1, dtype=torch.float64).tolist() for n in (steps, 2 * steps)]
        assert convergence(EDM, "pndm", {"order": order}, grids) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("order", ORDERS)
def test_there_pndm_is_lms(order, pointwise):
    model, x = pointwise(EDM), start(EDM, size=3)
    options = {"order": order, "steps": 12, "grid": "t", "trajectory": True}
    pndm, lms = (solve(model, x, "pndm", warmup="multistep", **options), solve(model, x, "lms", **options))
    torch.testing.assert_close(pndm.trajectory, lms.trajectory, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("solver", "options"), [LMS[0], *PNDM[:2]], ids=str)
def test_first_order_is_ddim(any_sde, solver, options, two_modes):
    model, x = two_modes(dtype=torch.float64).distribution.under(any_sde), start(any_sde)
    ours = solve(model, x, solver, steps=20, trajectory=True, **options)
    ddim = solve(model, x, "ddim", steps=20, trajectory=True)
    # Up to 1e3 between signal and noise, which cancel in both, over 20 steps.
    torch.testing.assert_close(ours.trajectory, ddim.trajectory, rtol=1e-10, atol=1e-10)


class OfTime(sd.Model):
    """Predicts what ``pair`` says of a number t, whatever the state, and keeps the times."""

    def __init__(self, sde, pair):
        self.sde, self.pair, self.data_shape, self.asked = sde, pair, (2,), []

    def predict(self, x, t):
        self.asked.append(float(t.reshape(-1)[0]))
        return sd.Prediction(*self.pair(self.asked[-1]))


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize(("solver", "options"), [*LMS, *PNDM], ids=str)
@pytest.mark.parametrize("sde", [VP, EDM], ids=["vp", "edm"])
def test_constant_predictions_are_solved_exactly(sde, solver, options, steps):
    pair = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = OfTime(sde, lambda t: pair)
    ends = torch.tensor([sde.t_max, 0.0], dtype=torch.float64)
    x, exact = (sde.alpha(t) * pair[0] + sde.sigma(t) * pair[1] for t in ends)
    grid = torch.linspace(sde.t_max, 0.0, steps + 1, dtype=torch.float64).tolist()
    out = solve(model, x, solver, grid=grid, **options)
    # From t_max, where the noise is 150 times the data.
    torch.testing.assert_close(out.samples, exact, rtol=1e-10, atol=1e-10)
    assert min(model.asked) > 0


@pytest.mark.parametrize("grid", ["log_snr", "quadratic"])
@pytest.mark.parametrize("order", ORDERS)
def test_lms_integrates_a_polynomial_exactly(order, grid):
    """ε̂ is one of σ/α; once enough times are past, a step is its integral by SciPy."""

    def ratio(t):
        t = torch.tensor(t, dtype=torch.float64)
        return float(VP.sigma(t) / VP.alpha(t))

    def polynomial(rho):
        return (0.5 + rho / 3) ** (order - 1)

    zero = torch.zeros(1, 2, dtype=torch.float64)
    model = OfTime(VP, lambda t: (zero, zero + polynomial(ratio(t))))
    x = torch.ones(1, 2, dtype=torch.float64)
    out = solve(model, x, "lms", t_start=0.6, steps=6, grid=grid, order=order, trajectory=True)
    for i in range(order - 1, 6):
        t, s = out.times[i], out.times[i + 1]
        alpha = VP.alpha(torch.tensor([t, s], dtype=torch.float64))
        integral = quad(polynomial, ratio(t), ratio(s), epsabs=1e-13, epsrel=1e-13)[0]
        exact = alpha[1] / alpha[0] * out.trajectory[i] + alpha[1] * integral
        torch.testing.assert_close(out.trajectory[i + 1], exact, rtol=1e-10, atol=1e-10)


def test_pndm_is_the_published(pointwise):
    """Liu et al. 2022, eq. 11 to 13, over ᾱ = α²: three pseudo Runge-Kutta steps, then the linear multistep ones."""
    model, x = pointwise(VP), start(VP, size=3)
    times = [0.9, 0.75, 0.6, 0.45, 0.3, 0.15]
    out = solve(model, x, "pndm", grid=times, trajectory=True)

    def noise(x, t):
        return model.predict(x, torch.tensor(t, dtype=torch.float64)).eps

    def transfer(x, eps, t, s):
        a, b = VP.alpha(torch.tensor([t, s], dtype=torch.float64)).square()
        denominator = a.sqrt() * (((1 - b) * a).sqrt() + ((1 - a) * b).sqrt())
        return b.sqrt() / a.sqrt() * x - (b - a) / denominator * eps

    past = []
    for i, (t, s) in enumerate(pairwise(times)):
        e1 = noise(x, t)
        past.append(e1)
        if i < 3:
            e2 = noise(transfer(x, e1, t, (t + s) / 2), (t + s) / 2)
            e3 = noise(transfer(x, e2, t, (t + s) / 2), (t + s) / 2)
            e4 = noise(transfer(x, e3, t, s), s)
            mean = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        else:
            mean = (55 * past[-1] - 59 * past[-2] + 37 * past[-3] - 9 * past[-4]) / 24
        x = transfer(x, mean, t, s)
        torch.testing.assert_close(out.trajectory[i + 1], x, rtol=1e-10, atol=1e-10)


# Evaluations, and what is refused.


@pytest.mark.parametrize(
    ("options", "nfe", "steps", "used"),
    [
        ({}, 1, 1, 1),
        ({}, 4, 1, 1),
        ({}, 5, 2, 5),
        ({}, 12, 3, 9),
        ({}, 13, 4, 13),
        ({}, 14, 5, 14),
        ({}, 50, 41, 50),
        ({"order": 2}, 6, 3, 6),
        ({"order": 1}, 6, 6, 6),
        ({"warmup": "multistep"}, 6, 6, 6),
    ],
    ids=str,
)
def test_evaluations_are_turned_into_steps(options, nfe, steps, used, counting, pointwise):
    model = counting(pointwise(VP))
    out = sd.sample(model, 2, solver="pndm", nfe=nfe, **options)
    assert len(out.times) == steps + 1
    assert out.nfe == model.calls == used


@pytest.mark.parametrize(("solver", "options"), [LMS[-1], *PNDM[-2:]], ids=str)
def test_a_start_without_data_is_refused(solver, options, pointwise):
    x = start(VP, size=3)
    with pytest.raises(ValueError, match=r"grid: the coefficient '\w+' is not finite at t = 1\.0"):
        solve(pointwise(sd.FlowSDE()), x, solver, grid=[1.0, 0.9, 0.8], **options)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("lms", {"order": 0}, "order = 0: must be one of 1, 2, 3, 4"),
        ("lms", {"order": 5}, "order = 5: must be one of 1, 2, 3, 4"),
        ("pndm", {"order": 5}, "order = 5: must be one of 1, 2, 3, 4"),
        ("pndm", {"warmup": "heun"}, "warmup = 'heun': must be one of runge_kutta, multistep"),
    ],
)
def test_errors_name_the_option(solver, options, message, pointwise):
    with pytest.raises(ValueError, match=message):
        sd.sample(pointwise(VP), 2, solver=solver, **options)
