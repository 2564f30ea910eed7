"""An SDE from functions of time: equal to the closed forms, accurate down to t = 0, and clear about bad functions."""

import math

import pytest
import torch

from sde_diffusion import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    BetaSDE,
    ConstantVESDE,
    LogSNRSDE,
    MarginalSDE,
    RateSDE,
    SubVPSDE,
)

F64 = torch.float64
CELLS = 1024
VP, SUB_VP, VE, EDM, CONSTANT_VE = VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), ConstantVESDE()


def cosine(t):
    return torch.cos(0.5 * math.pi * t)


def sine(t):
    return torch.sin(0.5 * math.pi * t)


class Circle(SDE):
    alpha, sigma = staticmethod(cosine), staticmethod(sine)


def rates_of(sde):
    return RateSDE(sde.drift_coefficient, sde.diffusion, T=sde.T)


FORMS = {
    "beta": (BetaSDE(VP.beta), VP),
    "rates of vp": (rates_of(VP), VP),
    "rates of subvp": (rates_of(SUB_VP), SUB_VP),
    "rates of edm": (rates_of(EDM), EDM),
    "rates of constant_ve": (rates_of(CONSTANT_VE), CONSTANT_VE),
    "log-SNR": (LogSNRSDE(VP.log_snr), VP),
    "marginals": (MarginalSDE(cosine, sine), Circle()),
}
every_form = pytest.mark.parametrize(("form", "closed"), FORMS.values(), ids=FORMS)


def all_times(sde, n=400):
    """(n,) from 1e-9 T to T, by equal factors."""
    # The last is rounded to just below 1.
    return sde.T * torch.logspace(-9, 0, n, dtype=F64).clamp(max=1)


@every_form
def test_marginals_are_those_of_the_closed_form(form, closed):
    t = all_times(closed)
    assert form.T == closed.T
    torch.testing.assert_close(form.alpha(t), closed.alpha(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(form.sigma(t), closed.sigma(t), rtol=1e-12, atol=0)
    # A relative error is an absolute one of the logarithm, and both marginals have it.
    torch.testing.assert_close(form.log_snr(t), closed.log_snr(t), rtol=1e-12, atol=4e-12)


@every_form
def test_rates_are_those_of_the_closed_form(form, closed):
    # Short of the circle's end, where f and g are infinite.
    t = all_times(closed)[:-1]
    for rate in ("alpha_dot", "drift_coefficient", "diffusion"):
        torch.testing.assert_close(getattr(form, rate)(t), getattr(closed, rate)(t), rtol=1e-12, atol=0)
    # Its terms f σ and g²/2σ cancel towards T.
    bound = 1e-12 * (closed.sigma_dot(t).abs() + (closed.drift_coefficient(t) * closed.sigma(t)).abs())
    assert ((form.sigma_dot(t) - closed.sigma_dot(t)).abs() <= bound).all()


def test_noise_added_to_blurred_data_is_what_ve_adds():
    """From σ(0) = 0, VE's g gives σ² − σ_min² = σ_min² (e^{2 t log(σ_max/σ_min)} − 1)."""
    t = all_times(VE)
    added = VE.sigma_min**2 * torch.expm1(2 * t * math.log(VE.sigma_max / VE.sigma_min))
    torch.testing.assert_close(rates_of(VE).sigma(t) ** 2, added, rtol=1e-12, atol=0)


@every_form
def test_time_from_log_snr_inverts_it(form, closed):
    # Nearer to its end the circle's log-SNR, which is infinite there, moves by the rounding of 1 − t.
    t = all_times(closed).clamp(max=0.999 * closed.T)
    torch.testing.assert_close(form.t_from_log_snr(form.log_snr(t)), t, rtol=1e-12, atol=0)
    assert form.t_from_log_snr(torch.tensor([math.inf, -math.inf], dtype=F64)).tolist() == [0, form.T]
    assert form.t_min == pytest.approx(closed.t_min if closed is not EDM else 1e-3, rel=1e-12)
    assert form.t_max == pytest.approx(closed.t_max, rel=1e-12)


def test_time_is_found_where_hardly_any_noise_is_added():
    """Newton's slope −g²/σ² vanishes at t = ½, the middle of the range; the log-SNR must come back all the same."""
    sde = BetaSDE(lambda t: 40 * (t - 0.5).square() + 1e-9)
    log_snr = sde.log_snr(torch.linspace(0.45, 0.55, 401, dtype=F64))
    torch.testing.assert_close(sde.log_snr(sde.t_from_log_snr(log_snr)), log_snr, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", [FORMS["beta"][0], FORMS["rates of subvp"][0]], ids=["beta", "rates"])
def test_float32_is_rounded_once(form):
    """The sums over a table are in float64 for a time of any dtype."""
    t = torch.linspace(1e-6, 1, 200)
    for name in ("alpha", "sigma", "log_snr"):
        function = getattr(form, name)
        assert torch.equal(function(t), function(t.double()).float())
    log_snr = torch.linspace(-9, 20, 200)
    assert torch.equal(form.t_from_log_snr(log_snr), form.t_from_log_snr(log_snr.double()).float())


def test_cancelling_rates_are_rounded_once():
    """σ̇ = f σ + g²/2σ of VP at T is 1/20000 of its terms, of which float32 would leave three digits."""
    t = torch.linspace(0.9, 1, 50)
    torch.testing.assert_close(rates_of(VP).sigma_dot(t).double(), VP.sigma_dot(t.double()), rtol=1e-6, atol=0)


@every_form
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3)])
def test_times_of_any_shape(form, closed, shape):
    t = closed.T * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    for name in ("alpha", "sigma", "alpha_dot", "sigma_dot", "drift_coefficient", "diffusion", "log_snr"):
        values = getattr(form, name)(t)
        assert values.shape == shape
        one_by_one = [getattr(form, name)(each) for each in t.flatten()]
        if one_by_one:
            torch.testing.assert_close(values.flatten(), torch.stack(one_by_one), rtol=1e-14, atol=1e-14)
    transposed = form.log_snr(t).transpose(0, -1) if shape else form.log_snr(t)
    assert form.t_from_log_snr(transposed).shape == transposed.shape


def test_time_ends_where_asked():
    """A clock half as fast: the same marginals at twice the time."""
    slow = BetaSDE(lambda t: 0.5 * VP.beta(0.5 * t), T=2.0)
    t = all_times(VP)
    torch.testing.assert_close(slow.sigma(2 * t), VP.sigma(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(slow.alpha(2 * t), VP.alpha(t), rtol=1e-12, atol=0)
    assert slow.t_max == 2
    for form in (
        LogSNRSDE(lambda t: VP.log_snr(0.5 * t), T=2.0),
        MarginalSDE(lambda t: VP.alpha(0.5 * t), lambda t: VP.sigma(0.5 * t), 2.0),
    ):
        assert form.t_max == 2
        assert form.t_min == pytest.approx(2 * VP.t_min, rel=1e-12)


class OrnsteinUhlenbeck(RateSDE):
    """dx = −k x dt + √(2k) dW: α = e^{−kt}, with its own argument and end of time."""

    T = 3.0

    def __init__(self, pull=2.5):
        self.pull, self.calls = pull, 0

    def drift_coefficient(self, t):
        self.calls += 1
        return torch.full_like(t, -self.pull)

    def diffusion(self, t):
        return torch.full_like(t, math.sqrt(2 * self.pull))


def test_a_subclass_need_define_only_its_two_rates():
    sde = OrnsteinUhlenbeck()
    assert sde.calls == 0, "the table is made on first use"
    t = all_times(sde)
    torch.testing.assert_close(sde.alpha(t), torch.exp(-2.5 * t), rtol=1e-12, atol=0)
    # Of the table and of the times asked for; again, only the latter.
    first, sde.calls = sde.calls, 0
    torch.testing.assert_close(sde.sigma(t), torch.sqrt(-torch.expm1(-5 * t)), rtol=1e-12, atol=0)
    assert 0 < sde.calls < first
    assert sde.t_min == pytest.approx(math.log1p(1e-6) / 5, rel=1e-12)
    assert sde.t_max == pytest.approx(math.log1p(1e6) / 5, rel=1e-12)
    assert OrnsteinUhlenbeck(pull=1.0).alpha(torch.tensor(1.0, dtype=F64)) == pytest.approx(math.exp(-1), rel=1e-13)


def test_a_subclass_may_use_the_constructor():
    class Brownian(RateSDE):
        T = 4.0

        def drift_coefficient(self, t):
            return torch.zeros_like(t)

        def diffusion(self, t):
            return torch.full_like(t, 3.0)

    assert Brownian().T == 4
    t = all_times(Brownian())
    torch.testing.assert_close(Brownian().sigma(t), 3 * torch.sqrt(t), rtol=1e-12, atol=0)
    assert Brownian(T=9.0).sigma(torch.tensor(9.0, dtype=F64)) == pytest.approx(9, rel=1e-13)


@pytest.mark.parametrize("kink", [0.5, 0.337, 1 / 3, 0.1 + 0.5 / CELLS])
def test_accuracy_at_a_kink(kink):
    """β changes its slope by 40, and f by half of it: an error of order of that times the width of a cell squared."""
    sde = BetaSDE(lambda t: 1 + 20 * (t - kink).abs())
    t = torch.linspace(0, 1, 2001, dtype=F64)
    integral = t + 10 * ((t - kink) * (t - kink).abs() + kink**2)
    at_a_cells_end = (kink * CELLS).is_integer()
    bound = 1e-14 if at_a_cells_end else 0.01 * 20 / CELLS**2
    assert (torch.log(sde.alpha(t)) + 0.5 * integral).abs().max() < bound
    assert (sde.sigma(t) ** 2 + torch.expm1(-integral)).abs().max() < 2 * bound


@pytest.mark.parametrize(("power", "near_0", "later"), [(0.5, 1.4e-4, 4e-6), (1.5, 3e-6, 1e-8), (3.0, 1e-13, 1e-13)])
def test_accuracy_of_a_rate_that_starts_as_a_power_of_time(power, near_0, later):
    """Within the first cell the relative error is that of 8 points for ∫ t^power, however small t is."""
    sde = BetaSDE(lambda t: 10 * t**power)
    t = all_times(sde)
    exact = torch.sqrt(-torch.expm1(-10 * t ** (power + 1) / (power + 1)))
    error = (sde.sigma(t) / exact - 1).abs()
    assert error.max() < near_0
    assert error[t >= 0.01].max() < later
    # Those of powers that are not whole are no rounding, so that the bounds above say how large they are.
    assert power == 3 or error.max() > 0.5 * near_0


def from_then_on(value):
    """VP's β but for a value it takes from t = 0.3 on."""
    return lambda t: torch.where(t < 0.3, VP.beta(t), value)


def one(t):
    return torch.ones_like(t)


def half_the_precision(t):
    return VP.beta(t).float()


def another_shape(t):
    return VP.beta(t)[..., :1]


def a_number(t):
    return 1.0


NEGATIVE, NAN, INFINITE = from_then_on(-1.0), from_then_on(math.nan), from_then_on(math.inf)
BAD_TYPES = [
    (half_the_precision, r"returned torch\.float32 of shape \(\d+,\) for torch\.float64 times of shape \(\d+,\): must"),
    (another_shape, r"returned torch\.float64 of shape \(1,\) for torch\.float64 times of shape \(\d+,\): must"),
    (a_number, r"returned 1\.0 for torch\.float64 times of shape \(\d+,\): must be the same"),
]
# At the first end of a cell, or point of one, from 0.3 on.
AT = r"\(0\.300[0-9]*\) = "
BAD_VALUES = [(NAN, AT + "nan: must be finite"), (INFINITE, AT + "inf: must be finite")]
BAD_SIGNS = [(NEGATIVE, AT + "-1: must be finite and at least 0")]
BUILDERS = {
    "alpha": lambda f: MarginalSDE(f, sine),
    "sigma": lambda f: MarginalSDE(cosine, f),
    "log_snr": LogSNRSDE,
    "beta": BetaSDE,
    "drift_coefficient": lambda f: RateSDE(f, one),
    "diffusion": lambda f: RateSDE(lambda t: -one(t), f),
}
BAD_FUNCTIONS = [
    (name, *bad)
    for name in BUILDERS
    for bad in BAD_TYPES + BAD_VALUES + (BAD_SIGNS if name not in ("log_snr", "drift_coefficient") else [])
]


@pytest.mark.parametrize(("name", "function", "message"), BAD_FUNCTIONS)
def test_a_bad_function_is_named_with_where_it_is_bad(name, function, message):
    with pytest.raises(ValueError, match=f"^{name} ?{message}"):
        BUILDERS[name](function)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: LogSNRSDE(lambda t: 5 * t),
            r"log_snr goes from 0 at t = 0 to 0\.0048\d* at t = 0\.00097\d*: must fall",
        ),
        (lambda: LogSNRSDE(one), "log_snr goes from 1 at t = 0 to 1 at"),
        (lambda: LogSNRSDE(lambda t: 10 * (t - 0.5).square()), r"log_snr goes from .* at t = 0\.5 to .*: must fall"),
        (lambda: MarginalSDE(one, lambda t: 2 - t), "alpha, sigma: the log-SNR .* at t = 0 to .*: must fall with t"),
        (lambda: MarginalSDE(one, one), "alpha, sigma: the log-SNR .* goes from 0 at t = 0 to 0 at"),
        (lambda: BetaSDE(lambda t: (t - 0.5).clamp(min=0)), r"the log-SNR .* goes from inf at t = 0 to inf at"),
        (lambda: BetaSDE(lambda t: (0.5 - t).clamp(min=0)), r"the log-SNR .* at t = 0\.5 to .*: must fall"),
        (lambda: BetaSDE(lambda t: 1 / (1 - t)), r"beta\(1\) = inf: must be finite .* MarginalSDE instead"),
        (lambda: RateSDE(lambda t: -1 / t, one), r"drift_coefficient\(0\) = -inf: must be finite; .* MarginalSDE"),
        (lambda: RateSDE(one, lambda t: 1 / (1 - t)), r"diffusion\(1\) = inf: must be finite .* MarginalSDE instead"),
        (lambda: RateSDE(one, torch.zeros_like), r"diffusion: the log-SNR .* goes from inf at t = 0 to inf at"),
        (lambda: RateSDE(lambda t: 1000 * one(t), one), r"σ²\(0\.35\d*\) = inf: must be finite"),
    ],
)
def test_functions_that_make_no_diffusion_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("end", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "build",
    [
        lambda T: MarginalSDE(cosine, sine, T),
        lambda T: LogSNRSDE(VP.log_snr, T),
        lambda T: BetaSDE(VP.beta, T),
        lambda T: RateSDE(VP.drift_coefficient, VP.diffusion, T),
        lambda T: OrnsteinUhlenbeckTo(T),
    ],
    ids=["marginals", "log-SNR", "beta", "rates", "subclass"],
)
def test_the_end_of_time_is_checked(build, end):
    with pytest.raises(ValueError, match=f"T = {end}: must be positive and finite"):
        build(end)


class OrnsteinUhlenbeckTo(OrnsteinUhlenbeck):
    """One that hands its end of time on."""

    def __init__(self, end):
        RateSDE.__init__(self, T=end)


def test_a_subclass_is_checked_when_first_used():
    class Negative(OrnsteinUhlenbeck):
        def diffusion(self, t):
            return -one(t)

    t = torch.tensor(0.5)
    sde = Negative()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"diffusion\(0\) = -1: must be finite and at least 0"):
            sde.sigma(t)


def test_both_rates_must_be_given_or_defined():
    with pytest.raises(NotImplementedError, match=r"RateSDE must be given, or define, diffusion\(t\)"):
        RateSDE(VP.drift_coefficient)
    with pytest.raises(NotImplementedError, match=r"RateSDE must be given, or define, drift_coefficient\(t\)"):
        RateSDE(diffusion=VP.diffusion)
    with pytest.raises(NotImplementedError, match=r"must be given, or define, drift_coefficient\(t\)"):
        RateSDE().alpha(torch.tensor(0.5))


def test_a_log_snr_may_be_infinite_at_both_ends():
    sde = LogSNRSDE(lambda t: 2 * (torch.log1p(-t) - torch.log(t)))
    ends = torch.tensor([0, 1], dtype=F64)
    assert sde.alpha(ends).tolist() == [1, 0]
    assert sde.sigma(ends).tolist() == [0, 1]
    # α/σ = (1 − t)/t, as the straight path's, whose scale it has not.
    assert sde.t_max == pytest.approx(1 / (1 + 1e-3), rel=1e-12)


def test_repr_names_the_functions():
    assert repr(MarginalSDE(cosine, sine)) == "MarginalSDE(alpha=cosine, sigma=sine, T=1.0)"
    assert repr(LogSNRSDE(VP.log_snr, 1)) == "LogSNRSDE(log_snr=log_snr, T=1.0)"
    assert repr(BetaSDE(VP.beta)) == "BetaSDE(beta=beta, T=1.0)"
    assert repr(RateSDE(torch.neg, one, 2.0)) == "RateSDE(drift_coefficient=neg, diffusion=one, T=2.0)"
    sde = OrnsteinUhlenbeck()
    assert sde.t_min < sde.t_max
    assert repr(sde).startswith("OrnsteinUhlenbeck(pull=2.5")
