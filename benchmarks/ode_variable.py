"""The probability-flow ODE over t and over u = log(σ/α): python benchmarks/ode_variable.py.

End-point error (root mean square) of dopri5 from the prior to t_end, against the same ODE solved at 1e-10, in float64.
"""

import torch
from mixtures import ring, rotated

import sde_diffusion as sd
from sde_diffusion.ode import integrate
from sde_diffusion.sde import drift_in_log_noise

T_END = 1e-3


def main() -> None:
    """Print the table."""
    print("| mixture | SDE | tolerance | nfe over t | error over t | nfe over u | error over u |")
    print("|---|---|---|---|---|---|---|")
    for name, distribution in (("2-D", ring()), ("64-D", rotated(64))):
        for sde in (sd.VPSDE(), sd.SubVPSDE(), sd.VESDE()):
            model = distribution.under(sde)
            generator = torch.Generator().manual_seed(7)
            x = sde.sample_prior((128, *model.data_shape), generator=generator, dtype=torch.float64)
            end = max(T_END, sde.t_min)
            reference, _ = over_u(model, x, end, 1e-10)
            for tolerance in (1e-3, 1e-4, 1e-5):
                row = [f"| {name} | {type(sde).__name__} | {tolerance:g}"]
                for solve in (over_t, over_u):
                    solution, nfe = solve(model, x, end, tolerance)
                    row.append(f"{nfe} | {float((solution - reference).square().mean().sqrt()):.1e}")
                print(" | ".join(row), "|", flush=True)


def over_t(model: sd.Model, x: torch.Tensor, end: float, tolerance: float) -> tuple[torch.Tensor, int]:
    """Solution and evaluations, integrating over t."""
    calls = []

    def velocity(state: tuple[torch.Tensor, ...], t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(t)
        return (model.velocity(state[0], t),)

    (solution,) = integrate(velocity, (x,), [model.sde.t_max, end], rtol=tolerance, atol=tolerance)
    return solution, len(calls)


def over_u(model: sd.Model, x: torch.Tensor, end: float, tolerance: float) -> tuple[torch.Tensor, int]:
    """Solution and evaluations, integrating over u."""
    calls = []

    def velocity(state: tuple[torch.Tensor, ...], u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(u)
        return (drift_in_log_noise(model.sde, model.predict, state[0], u),)

    grid = [model.sde.log_noise(model.sde.t_max), model.sde.log_noise(end)]
    (solution,) = integrate(velocity, (x,), grid, rtol=tolerance, atol=tolerance)
    return solution, len(calls)


if __name__ == "__main__":
    main()
