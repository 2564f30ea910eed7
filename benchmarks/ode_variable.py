"""The probability-flow ODE over t, u = log(σ/α) and θ = atan(σ/α): python benchmarks/ode_variable.py.

End-point error (root mean square) of dopri5 from the prior to t_end, against the same ODE solved at 1e-10, in float64.
"""

from collections.abc import Callable

import torch
from mixtures import ring, rotated

import sde_diffusion as sd
from sde_diffusion.ode import ProbabilityFlow, integrate
from sde_diffusion.sde import drift_in_log_noise

T_END = 1e-3


def main() -> None:
    """Print the table."""
    columns = [f"{quantity} over {variable}" for variable in "tuθ" for quantity in ("nfe", "error")]
    print("| mixture | SDE | tolerance |", " | ".join(columns), "|")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, distribution in (("2-D", ring()), ("64-D", rotated(64))):
        for sde in (sd.VPSDE(), sd.SubVPSDE(), sd.VESDE(), sd.EDMSDE()):
            model = distribution.under(sde)
            generator = torch.Generator().manual_seed(7)
            x = sde.sample_prior((128, *model.data_shape), generator=generator, dtype=torch.float64)
            end = max(T_END, sde.t_min)
            reference, _ = over_angle(model, x, end, 1e-10)
            for tolerance in (1e-3, 1e-4, 1e-5):
                row = [f"| {name} | {type(sde).__name__} | {tolerance:g}"]
                for solve in (over_t, over_u, over_angle):
                    solution, nfe = solve(model, x, end, tolerance)
                    row.append(f"{nfe} | {float((solution - reference).square().mean().sqrt()):.1e}")
                print(" | ".join(row), "|", flush=True)


def counted(model: sd.Model) -> tuple[Callable[[torch.Tensor, torch.Tensor], sd.Prediction], list[torch.Tensor]]:
    """The model's prediction, and a list that grows by one with every evaluation."""
    calls: list[torch.Tensor] = []

    def predict(x: torch.Tensor, t: torch.Tensor) -> sd.Prediction:
        calls.append(t)
        return model.predict(x, t)

    return predict, calls


def over_t(model: sd.Model, x: torch.Tensor, end: float, tolerance: float) -> tuple[torch.Tensor, int]:
    """Solution and evaluations, integrating over t."""
    predict, calls = counted(model)

    def velocity(state: tuple[torch.Tensor, ...], t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x0, eps = predict(state[0], t)
        return (model.sde.alpha_dot(t) * x0 + model.sde.sigma_dot(t) * eps,)

    (solution,) = integrate(velocity, (x,), [model.sde.t_max, end], rtol=tolerance, atol=tolerance)
    return solution, len(calls)


def over_u(model: sd.Model, x: torch.Tensor, end: float, tolerance: float) -> tuple[torch.Tensor, int]:
    """Solution and evaluations, integrating over u."""
    predict, calls = counted(model)

    def velocity(state: tuple[torch.Tensor, ...], u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (drift_in_log_noise(model.sde, predict, state[0], u),)

    grid = [model.sde.log_noise(model.sde.t_max), model.sde.log_noise(end)]
    (solution,) = integrate(velocity, (x,), grid, rtol=tolerance, atol=tolerance)
    return solution, len(calls)


def over_angle(model: sd.Model, x: torch.Tensor, end: float, tolerance: float) -> tuple[torch.Tensor, int]:
    """Solution and evaluations, integrating the scaled state over θ, as the library does."""
    predict, calls = counted(model)
    flow = ProbabilityFlow(model.sde, predict)
    return flow.solve(x, [model.sde.t_max, end], rtol=tolerance, atol=tolerance), len(calls)


if __name__ == "__main__":
    main()
