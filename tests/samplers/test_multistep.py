"""Multistep exponential integrators: orders, exactness, the limits at either end, and the published updates."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad

import sde_diffusion as sd
from sde_diffusion.samplers.grids import time_grid
from sde_diffusion.samplers.multistep import FORMS

VP = sd.VPSDE()
# Solver, options, order.
DATA_PREDICTION = [
    *[("deis", {"form": "data", "order": p}, p) for p in (1, 2, 3, 4)],
    ("dpmpp_2s", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_3m", {}, 3),
    *[("unipc", {"order": p, "variant": variant}, p + 1) for p in (1, 2, 3) for variant in ("bh1", "bh2")],
]
NOISE_PREDICTION = [("deis", {"form": "noise", "order": p}, p) for p in (1, 2, 3, 4)]
OTHERS = [("deis", {"form": "velocity", "order": p}, p) for p in (1, 2, 3, 4)]
OTHERS += [("unipc", {"order": p, "form": form}, p + 1) for p in (1, 2) for form in ("noise", "velocity")]
ALL = DATA_PREDICTION + NOISE_PREDICTION + OTHERS
DEFAULTS: list[tuple[str, dict, int]] = [("deis", {}, 3), ("unipc", {}, 3)]


def solve(model, x, solver, **options):
    return sd.sample(model, len(x), solver=solver, x_start=x, dtype=x.dtype, **options)


def noise_end(sde):
    """Where the log-SNR is 8: the exact ODE is then found in little time."""
    return float(sde.t_from_log_snr(torch.tensor(8.0, dtype=torch.float64)))


@pytest.fixture(scope="module")
def flow(two_modes):
    """flow(sde, tolerance): a mixture under it, starts, and the end points of the ODE."""
    known = {}

    def build(sde, tolerance):
        if (sde, tolerance) not in known:
            model = two_modes(dtype=torch.float64).distribution.under(sde)
            x = sde.prior_std * torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            options = {"method": "dopri8", "rtol": tolerance, "atol": tolerance}
            known[sde, tolerance] = model, x, solve(model, x, "ode", t_end=noise_end(sde), **options).samples
        return known[sde, tolerance]

    return build


def check_order(flow, solver, options, order, grids):
    model, x, exact = flow
    ends = [solve(model, x, solver, grid=grid, **options).samples for grid in grids]
    errors = [float((end - exact).square().mean().sqrt()) for end in ends]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("solver", "options", "order"), ALL, ids=str)
def test_a_solver_has_its_order(flow, solver, options, order):
    """In log-SNR, over equal steps, of which the first is cut in halves down to 2⁻¹² of it.

    Else the first step, which is of first order, shows in the error from fourth order on.
    """

    def grid(steps):
        start, end = VP.log_snr(torch.tensor([VP.t_max, noise_end(VP)], dtype=torch.float64))
        fractions = torch.tensor([0.0, *(2.0**-i for i in range(12, 0, -1)), *range(1, steps + 1)], dtype=torch.float64)
        return VP.t_from_log_snr(start + (end - start) * fractions / steps).tolist()

    steps = {1: (80, 160), 2: (160, 320), 3: (320, 640), 4: (640, 1280)}[order]
    check_order(flow(VP, 1e-12), solver, options, order, [grid(n) for n in steps])


@pytest.mark.parametrize(("solver", "options", "order"), DEFAULTS, ids=str)
def test_a_solver_has_its_order_for_every_sde(any_sde, flow, solver, options, order):
    ends = any_sde.t_max, noise_end(any_sde)
    grids = [time_grid(any_sde, "log_snr", *ends, n) for n in (80, 160)]
    check_order(flow(any_sde, 1e-9), solver, options, order, grids)


@pytest.mark.parametrize("form", FORMS)
def test_deis_of_first_order_is_ddim(any_sde, two_modes, form):
    model = two_modes(dtype=torch.float64).distribution.under(any_sde)
    x = any_sde.prior_std * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, ddim = (
        solve(model, x, solver, steps=20, trajectory=True, **options).trajectory
        for solver, options in (("deis", {"order": 1, "form": form}), ("ddim", {}))
    )
    # Up to 1e3 between signal and noise, which cancel in both, over 20 steps.
    torch.testing.assert_close(ours, ddim, rtol=1e-10, atol=1e-10)


class OfTime(sd.Model):
    """Predicts what ``pair`` says of t, whatever the state."""

    def __init__(self, sde, pair):
        self.sde, self.pair, self.data_shape = sde, pair, (2,)

    def predict(self, x, t):
        return sd.Prediction(*self.pair(t))


def random_pair():
    return torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("solver", "options", "order"), ALL, ids=str)
@pytest.mark.parametrize("sde", [VP, sd.VESDE(), sd.FlowSDE()], ids=["vp", "ve", "flow"])
def test_constant_predictions_are_solved_exactly(sde, solver, options, order):
    pair = random_pair()
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    start, exact = (sde.alpha(t) * pair[0] + sde.sigma(t) * pair[1] for t in ends)
    for steps in (1, 6):
        out = solve(OfTime(sde, lambda t: pair), start, solver, steps=steps, grid="t", **options)
        # The shares add up to 1 within some roundings of the largest; those of order 4 reach 1e3 over a grid in t.
        torch.testing.assert_close(out.samples, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", ["log_snr", "quadratic"])
@pytest.mark.parametrize(
    ("solver", "options", "degree"),
    [*[("deis", {"form": f, "order": p}, p - 1) for f in FORMS for p in (1, 2, 3, 4)], ("dpmpp_3m", {}, 2)],
    ids=str,
)
def test_a_polynomial_is_integrated_exactly(solver, options, degree, grid):
    """The prediction is one of the variable κ; once enough times are past, a step is the integral of it by SciPy."""
    form = options.get("form", "data")

    def ratio(t):
        return float(VP.alpha(t) / VP.sigma(t))

    def polynomial(k):
        return (0.5 + k / 3) ** degree

    variable = {"data": lambda t: math.log(ratio(t)), "noise": lambda t: math.log(ratio(t))}
    variable["velocity"] = lambda t: 1 / (1 + ratio(t))

    def pair(t):
        value = torch.full((1, 2), polynomial(variable[form](t)), dtype=torch.float64)
        zero = torch.zeros_like(value)
        return (value, zero) if form == "data" else (zero, value)

    start = torch.ones(1, 2, dtype=torch.float64)
    options = options | ({"lower_order_final": False} if solver == "dpmpp_3m" else {})
    out = solve(OfTime(VP, pair), start, solver, steps=6, grid=grid, trajectory=True, **options)
    for i in range(degree, 6):
        t, s = torch.tensor(out.times[i : i + 2], dtype=torch.float64)
        scale = {"data": VP.sigma, "noise": VP.alpha, "velocity": lambda t: VP.alpha(t) + VP.sigma(t)}[form]
        bounds = variable[form](t), variable[form](s)
        rate = {
            "data": lambda k: math.exp(k),
            "noise": lambda k: -math.exp(-k),
            "velocity": lambda k: 1.0,
        }[form]
        integral = quad(lambda k, rate=rate: polynomial(k) * rate(k), *bounds, epsabs=1e-13, epsrel=1e-13)[0]
        exact = scale(s) / scale(t) * out.trajectory[i] + scale(s) * integral
        torch.testing.assert_close(out.trajectory[i + 1], exact, rtol=1e-10, atol=1e-10)


def test_2m_is_the_published():
    """x_s = (σ_s/σ_t) x − α_s (e^{−h} − 1) ((1 + 1/2r) D_i − 1/2r D_{i−1}), r = h_{i−1}/h_i, over uneven steps."""
    grid = [0.9, 0.7, 0.62, 0.3]
    times = torch.tensor(grid, dtype=torch.float64)
    data = random_pair()[0]
    out = solve(
        OfTime(VP, lambda t: (t * data, data)), data, "dpmpp_2m", grid=grid, lower_order_final=False, trajectory=True
    )
    h = VP.log_snr(times).diff() / 2
    for i in (1, 2):
        r = h[i - 1] / h[i]
        combined = ((1 + 1 / (2 * r)) * times[i] - 1 / (2 * r) * times[i - 1]) * data
        s, t = times[i + 1], times[i]
        expected = VP.sigma(s) / VP.sigma(t) * out.trajectory[i] - VP.alpha(s) * torch.expm1(-h[i]) * combined
        torch.testing.assert_close(out.trajectory[i + 1], expected, rtol=1e-12, atol=1e-12)


# Ends at which the log-SNR is infinite.


@pytest.mark.parametrize("sde", [VP, sd.EDMSDE(), sd.FlowSDE()], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize(("solver", "options", "order"), DATA_PREDICTION + NOISE_PREDICTION, ids=str)
def test_the_step_to_no_noise_is_the_data_predicted(sde, solver, options, order, pointwise):
    asked = []

    class Recording(pointwise):
        def predict(self, x, t):
            asked.append(super().predict(x, t))
            return asked[-1]

    grid = [sde.t_max, *(sde.T * f for f in (0.8, 0.5, 0.3)), 0.0]
    out = solve(Recording(sde), sde.prior_std * random_pair()[0][:, [0, 1, 1]], solver, grid=grid, **options)
    torch.testing.assert_close(out.samples, asked[-1].x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "options", "order"), ALL, ids=str)
def test_from_no_data_the_first_step_is_ddims(solver, options, order, pointwise):
    model = pointwise(sd.FlowSDE())
    x = random_pair()[0][:, [0, 1, 1]]
    start = {"grid": [1.0, 0.9, 0.8, 0.7], "trajectory": True}
    if options.get("form") == "noise":
        with pytest.raises(ValueError, match=r"grid: the coefficient 'scale' is not finite at t = 1\.0"):
            solve(model, x, solver, **start, **options)
        return
    out, ddim = solve(model, x, solver, **start, **options), solve(model, x, "ddim", **start)
    torch.testing.assert_close(out.trajectory[1], ddim.trajectory[1], rtol=1e-12, atol=1e-12)
    assert out.samples.isfinite().all()


# What ends a run of few steps, and what is refused.


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc"])
@pytest.mark.parametrize("steps", [5, 14, 15])
def test_few_steps_end_at_lower_order(solver, steps, two_modes):
    model = two_modes(dtype=torch.float64).distribution.under(VP)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = (
        solve(model, x, solver, steps=steps, lower_order_final=final, trajectory=True).trajectory
        for final in (True, False)
    )
    changed = [i for i in range(steps + 1) if not torch.equal(low[i], high[i])]
    many = {"dpmpp_2m": [steps], "dpmpp_3m": [steps - 1, steps], "unipc": [steps]}[solver]
    assert changed == (many if steps < 15 else [])


def test_the_last_of_few_steps_is_ddims(two_modes):
    model = two_modes(dtype=torch.float64).distribution.under(VP)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = solve(model, x, "dpmpp_3m", steps=6, trajectory=True)
    ddim = solve(model, out.trajectory[-2], "ddim", grid=out.times[-2:])
    torch.testing.assert_close(out.samples, ddim.samples, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("deis", {"order": 0}, "order = 0: must be one of 1, 2, 3, 4"),
        ("deis", {"order": 5}, "order = 5: must be one of 1, 2, 3, 4"),
        ("deis", {"form": "angle"}, "form = 'angle': must be one of data, noise, velocity"),
        ("deis", {"order": 2.0}, "order = 2.0: solver 'deis' takes a int"),
        ("unipc", {"order": 5}, "order = 5: must be one of 1, 2, 3, 4"),
        ("unipc", {"form": "flow"}, "form = 'flow': must be one of data, noise, velocity"),
        ("unipc", {"variant": "bh3"}, "variant = 'bh3': must be one of bh1, bh2"),
        ("dpmpp_2m", {"order": 3}, "order: solver 'dpmpp_2m' takes lower_order_final"),
        ("dpmpp_2s", {"order": 3}, "order: solver 'dpmpp_2s' takes no options"),
    ],
)
def test_errors_name_the_option(solver, options, message, pointwise):
    with pytest.raises(ValueError, match=message):
        sd.sample(pointwise(VP), 2, solver=solver, **options)
