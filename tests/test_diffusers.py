"""The chain, DDPM and DDIM against diffusers: the same betas, predictions and noise, step by step and in whole runs.

The peer keeps ᾱ in float32, whatever the dtype of the samples, and takes differences of it. 1 − ᾱ has then an error of
6e-8, which is a relative 6e-4 where it is 1e-4, at the first timestep, and DDIM's 1 − ᾱ − ς² is all error after a step
from ᾱ = 2e-9, as the cosine schedule has. So its formulas are compared after its table is replaced by the same product
of 1 − β in float64, and the peer as it is only where float32 leaves it enough digits.
"""

import math

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.samplers.noise import StepNoise, Streams

T, SHAPE, SEED = 1000, (3, 4, 4), 5
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
EPS = torch.finfo(torch.float32).eps
ONE_STEP, WHOLE_RUN = {torch.float32: 1e-5, torch.float64: 1e-10}, {torch.float32: 1e-4, torch.float64: 1e-9}


@pytest.fixture(scope="module")
def peer():
    """peer(solver, schedule, **options): its scheduler, without clipping, over the betas of that name."""
    # Its import takes seconds, which only the process that runs these tests should wait for.
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    classes = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}

    def build(solver, schedule, **options):
        return classes[solver](num_train_timesteps=T, clip_sample=False, **SCHEDULES[schedule], **options)

    return build


def betas(schedule, zero_snr=False):
    values = sd.BETAS[schedule](T)
    return sd.zero_terminal_snr(values) if zero_snr else values


def network(chain, prediction, learned_variance=False):
    """What a network would put out for x at the peer's timestep, in one of three ways that predict the same pair.

    About that of N(0, I) data, so that states stay of order one, and a term that mixes the entries of x.
    """

    def run(x, timestep):
        alpha, sigma = chain.marginal_scales[timestep + 1].to(x), chain.marginal_stds[timestep + 1].to(x)
        mixed = 0.3 * torch.sin(3 * x.roll(1, -1))
        output = {
            "eps": sigma * (x + alpha * mixed),
            "x0": alpha * x - sigma.square() * mixed,
            "v": sigma * mixed,
        }[prediction]
        return torch.cat([output, torch.cos(2 * x)], 1) if learned_variance else output

    return run


class Comparison:
    """One run of ours, from N(0, I) through the states of the peer's timesteps to x₀, and the peer's on its noise.

    DDIM with the spacing "linspace" is not compared: the peer steps to t − T/count, which is not its next timestep.
    """

    def __init__(self, scheduler, schedule, count, dtype, prediction="eps", zero_snr=False, as_it_is=False, **options):
        scheduler.set_timesteps(count)
        self.scheduler, self.timesteps, self.eta = scheduler, scheduler.timesteps.tolist(), options.get("eta", 0.0)
        beta = betas(schedule, zero_snr)
        if not as_it_is:
            scheduler.alphas_cumprod = torch.cumprod(1 - beta, 0)
        chain = sd.GaussianChain.ddpm(beta)
        self.solver = "ddpm" if "variance" in options else "ddim"
        learned = options.get("variance") == "learned"
        self.network = network(chain, prediction, learned)
        model = sd.DiffusionModel(
            lambda x, t: self.network(x, round(float(t[0]) * T) - 1),
            chain.to_sde(),
            prediction,
            data_shape=SHAPE,
            learned_variance=learned,
        )
        # The state after the peer's timestep k is our k + 1, and x₀ is the last.
        grid = [*chain.times[[k + 1 for k in self.timesteps]].tolist(), 0.0]
        x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        run = sd.sample(
            model, 2, solver=self.solver, grid=grid, x_start=x, seed=SEED, trajectory=True, dtype=dtype, **options
        )
        self.states = run.trajectory
        alpha = model.sde.alpha(torch.tensor(grid, dtype=torch.float64))
        # What a rounding error of x becomes in a step that divides by a small α, in whichever order it is done.
        self.rounding = 8 * torch.finfo(dtype).eps * float((alpha[1:] / alpha[:-1]).max() * x.abs().max())
        draw = StepNoise(Streams(SEED, range(2)), SHAPE, dtype)
        self.noise = [draw() for _ in self.timesteps]

    def peer_step(self, monkeypatch, i, x):
        """Step i of the peer, from x, with our noise."""
        timestep = self.timesteps[i]
        output = self.network(x, timestep)
        if self.solver == "ddim":
            step = self.scheduler.step(output, timestep, x, eta=self.eta, variance_noise=self.noise[i])
        else:
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: self.noise[i].reshape(shape)
            )
            step = self.scheduler.step(output, timestep, x)
        return step.prev_sample

    def check(self, monkeypatch, last_step=True):
        """Each step from our state, and the whole run from the start; ``last_step`` False leaves out that to x₀."""
        states = self.states if last_step else self.states[:-1]
        steps, run = [], [states[0]]
        for i, x in enumerate(states[:-1]):
            steps.append(self.peer_step(monkeypatch, i, x))
            run.append(self.peer_step(monkeypatch, i, run[-1]))
        one_step, whole_run = ONE_STEP[states.dtype] + self.rounding, WHOLE_RUN[states.dtype] + 2 * self.rounding
        torch.testing.assert_close(states[1:], torch.stack(steps), rtol=one_step, atol=one_step)
        torch.testing.assert_close(states, torch.stack(run), rtol=whole_run, atol=whole_run)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_are_the_peers(peer, schedule):
    scheduler, ours = peer("ddpm", schedule), sd.BETAS[schedule](T)
    torch.testing.assert_close(ours.float(), scheduler.betas, rtol=3 * EPS, atol=0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_marginals_are_the_peers(peer, schedule, zero_snr):
    scheduler = peer("ddpm", schedule, rescale_betas_zero_snr=zero_snr)
    alpha_bar = sd.GaussianChain.ddpm(betas(schedule, zero_snr)).marginal_scales[1:].square()
    # Of the peer's two roundings a step, of 1 − β and of the product, some √T are left.
    torch.testing.assert_close(alpha_bar.float(), scheduler.alphas_cumprod, rtol=0, atol=2 * math.sqrt(T) * EPS)
    assert (float(alpha_bar[-1]) == 0) == (float(scheduler.alphas_cumprod[-1]) == 0) == zero_snr


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("count", "spacing"), [(10, "leading"), (50, "leading"), (10, "trailing"), (50, "trailing")])
def test_ddim(peer, monkeypatch, schedule, eta, count, spacing, dtype):
    scheduler = peer("ddim", schedule, timestep_spacing=spacing)
    Comparison(scheduler, schedule, count, dtype, eta=eta).check(monkeypatch)


@pytest.mark.parametrize(
    ("variance", "name"), [("posterior", "fixed_small"), ("noising", "fixed_large"), ("learned", "learned_range")]
)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("count", "spacing"),
    [(10, "leading"), (50, "leading"), (10, "trailing"), (50, "trailing"), (10, "linspace"), (50, "linspace")],
)
def test_ddpm(peer, monkeypatch, schedule, variance, name, count, spacing, dtype):
    scheduler = peer("ddpm", schedule, timestep_spacing=spacing, variance_type=name)
    # The peer leaves out the noise at its timestep 0, which is the last step except with this spacing.
    last_step = spacing != "trailing"
    Comparison(scheduler, schedule, count, dtype, variance=variance).check(monkeypatch, last_step)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize(("count", "spacing"), [(10, "leading"), (10, "trailing"), (50, "leading"), (50, "trailing")])
@pytest.mark.parametrize(
    ("solver", "options"), [("ddim", {"eta": 0.0}), ("ddim", {"eta": 1.0}), ("ddpm", {"variance": "posterior"})]
)
def test_the_peer_as_it_is(peer, monkeypatch, schedule, solver, options, count, spacing):
    scheduler = peer(solver, schedule, timestep_spacing=spacing)
    comparison = Comparison(scheduler, schedule, count, torch.float32, as_it_is=True, **options)
    comparison.check(monkeypatch, last_step=solver == "ddim" or spacing != "trailing")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("solver", "options"), [("ddim", {"eta": 0.5}), ("ddpm", {"variance": "posterior"})])
def test_predictions(peer, monkeypatch, prediction, solver, options, dtype):
    scheduler = peer(solver, "linear", prediction_type=PREDICTIONS[prediction])
    Comparison(scheduler, "linear", 50, dtype, prediction, **options).check(monkeypatch)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize(
    ("solver", "options"), [("ddim", {"eta": 0.0}), ("ddim", {"eta": 0.5}), ("ddpm", {"variance": "noising"})]
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_from_a_start_without_signal(peer, monkeypatch, schedule, prediction, solver, options, dtype):
    """Zero terminal SNR: α = 0 at the first step."""
    variance = {"variance_type": "fixed_large"} if solver == "ddpm" else {}
    scheduler = peer(
        solver,
        schedule,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        prediction_type=PREDICTIONS[prediction],
        **variance,
    )
    comparison = Comparison(scheduler, schedule, 10, dtype, prediction, zero_snr=True, **options)
    comparison.check(monkeypatch, last_step=solver == "ddim")


@pytest.mark.parametrize(("solver", "options"), [("ddim", {"eta": 0.5}), ("ddpm", {"variance": "posterior"})])
def test_all_thousand_steps(peer, monkeypatch, solver, options, dtype):
    comparison = Comparison(peer(solver, "linear"), "linear", T, dtype, **options)
    assert comparison.timesteps == list(range(T - 1, -1, -1))
    comparison.check(monkeypatch)


# Multistep solvers. The peer takes its timesteps' σ/α from a table, which is replaced by ours, in float64, and
# computes DPM-Solver++ in float32 whatever the dtype of the samples: 1e-7 of states of order one, a few times.

MULTISTEP = {
    "dpmpp_2m": ("dpmpp", {"solver_order": 2, "solver_type": "midpoint"}, {}),
    "unipc_1_bh1": ("unipc", {"solver_order": 1, "solver_type": "bh1"}, {"order": 1, "variant": "bh1"}),
    "unipc_2_bh1": ("unipc", {"solver_order": 2, "solver_type": "bh1"}, {"order": 2, "variant": "bh1"}),
    "unipc_2_bh2": ("unipc", {"solver_order": 2, "solver_type": "bh2"}, {"order": 2, "variant": "bh2"}),
    "unipc_3_bh1": ("unipc", {"solver_order": 3, "solver_type": "bh1"}, {"order": 3, "variant": "bh1"}),
    "unipc_3_bh2": ("unipc", {"solver_order": 3, "solver_type": "bh2"}, {"order": 3, "variant": "bh2"}),
    "deis_1": ("deis", {"solver_order": 1}, {"order": 1, "form": "noise"}),
    "deis_2": ("deis", {"solver_order": 2}, {"order": 2, "form": "noise"}),
    "deis_3": ("deis", {"solver_order": 3}, {"order": 3, "form": "noise"}),
}


class MultistepComparison:
    """A run of ours over a VP SDE, and the peer's scheduler at the same σ/α."""

    def __init__(self, solver, peer_solver, peer_options, steps, grid, **options):
        from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        classes = {
            "dpmpp": DPMSolverMultistepScheduler,
            "unipc": UniPCMultistepScheduler,
            "deis": DEISMultistepScheduler,
        }
        self.sde = sd.VPSDE()
        self.model = sd.DiffusionModel(self.eps, self.sde, "eps", data_shape=SHAPE)
        x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        run = sd.sample(
            self.model,
            2,
            solver=solver,
            steps=steps,
            grid=grid,
            t_end=1e-3,
            x_start=x,
            trajectory=True,
            dtype=x.dtype,
            **options,
        )
        self.states, self.times = run.trajectory, torch.tensor(run.times, dtype=torch.float64)
        if peer_solver != "deis":
            peer_options = peer_options | {"final_sigmas_type": "sigma_min"}
        self.scheduler = classes[peer_solver](num_train_timesteps=T, **peer_options)
        self.scheduler.set_timesteps(steps)
        self.scheduler.sigmas = self.sde.sigma(self.times) / self.sde.alpha(self.times)
        self.scheduler.set_begin_index(0)

    def eps(self, x, t):
        """About that of N(0, I) data, with a term that mixes the entries of x."""
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (self.sde.alpha, self.sde.sigma))
        return sigma * (x + alpha * 0.3 * torch.sin(3 * x.roll(1, -1)))

    def peer_step(self, i, x):
        output = self.eps(x, self.times[i].expand(len(x)))
        return self.scheduler.step(output, self.scheduler.timesteps[i], x).prev_sample


@pytest.mark.parametrize(("steps", "grid"), [(20, "log_snr"), (20, "quadratic"), (8, "log_snr")])
@pytest.mark.parametrize("case", MULTISTEP)
def test_multistep(case, steps, grid):
    peer_solver, peer_options, options = MULTISTEP[case]
    solver = "dpmpp_2m" if peer_solver == "dpmpp" else peer_solver
    # Ours keeps its order up to the end from 15 steps on, as the peer's DPM-Solver++ but not its UniPC; DEIS always.
    peer_options = peer_options | {"lower_order_final": steps < 15 and peer_solver != "deis"}
    comparison = MultistepComparison(solver, peer_solver, peer_options, steps, grid, **options)
    run = [comparison.states[0]]
    for i in range(steps):
        run.append(comparison.peer_step(i, run[-1]))
    tolerance = 1e-5 if peer_solver == "dpmpp" else 1e-9
    torch.testing.assert_close(comparison.states, torch.stack(run), rtol=tolerance, atol=tolerance)


def test_the_peers_third_order_lacks_half_its_last_term():
    """The peer's D₂ is the divided difference, of which the second derivative is twice: its order is 2, not 3.

    h² D″/2 = (D₁₀ − D₁₁)/(r₀ + r₁) stands there for h² D″ in the Taylor series of D. Ours has the whole term.
    """
    steps = 20
    peer_options = {"solver_order": 3, "solver_type": "midpoint"}
    comparison = MultistepComparison("dpmpp_3m", "dpmpp", peer_options, steps, "quadratic")
    sde, times = comparison.sde, comparison.times
    h = sde.log_snr(times).diff() / 2
    data = [comparison.model.denoise(x, t) for x, t in zip(comparison.states, times, strict=True)]
    largest = 0.0
    for i, x in enumerate(comparison.states[:-1]):
        missing = torch.zeros_like(x)
        if i > 1:
            r0, r1 = h[i - 1] / h[i], h[i - 2] / h[i]
            slopes = (data[i] - data[i - 1]) / r0, (data[i - 1] - data[i - 2]) / r1
            factor = (torch.expm1(-h[i]) + h[i]) / h[i] ** 2 - 0.5
            missing = -sde.alpha(times[i + 1]) * factor * (slopes[0] - slopes[1]) / (r0 + r1)
            largest = max(largest, float(missing.abs().max()))
        peers = comparison.peer_step(i, x)
        torch.testing.assert_close(comparison.states[i + 1], peers + missing, rtol=1e-5, atol=1e-5)
    assert largest > 1e-3
