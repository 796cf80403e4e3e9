"""Sampling from a Denoiser with the schedulers of diffusers: the baselines of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor

from distill.denoise import Denoiser
from distill.errors import BadInput, suggest
from distill.models.diffusers.schedulers import stock_class
from distill.noise import VE, RectifiedFlow, Schedule, Table, at_least_float32, safe_divide

MIN_ALPHA_BAR = 2.0**-24  # replaces alpha-bar = 0 at the last step, of which stock solvers take the logarithm
TRAILING = {"timestep_spacing": "trailing"}
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True} | TRAILING),
    "Euler": ("EulerDiscreteScheduler", TRAILING),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", TRAILING),
    "Heun": ("HeunDiscreteScheduler", TRAILING),
    "DPM2": ("KDPM2DiscreteScheduler", TRAILING),
    "LMS": ("LMSDiscreteScheduler", TRAILING),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True} | TRAILING),
    "DPM-Solver++ 2S": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", TRAILING),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3} | TRAILING),
    "UniPC": ("UniPCMultistepScheduler", TRAILING),
    "DEIS": ("DEISMultistepScheduler", TRAILING),
    "SA-Solver": ("SASolverScheduler", TRAILING),
}
FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "Flow Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Flow Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}  # without DEIS and SA-Solver, which stop at the last positive sigma of a flow
STOCHASTIC = ("SASolverScheduler", "EulerAncestralDiscreteScheduler")


def stock_solvers(schedule: Schedule) -> Mapping[str, tuple[str, dict[str, Any]]]:
    """Name -> (scheduler class, settings) of the stock solvers for teachers of this schedule."""
    return FLOWS if isinstance(schedule, RectifiedFlow) else TABLES


def scheduler_for(name: str, schedule: Schedule) -> Any:
    """The stock scheduler of a solver: flow matching with the schedule's shift, or v-prediction on a table of alpha-bar.

    An alpha-bar of 0 at the last step is replaced by 2^-24, as stock schedulers do for zero terminal SNR.

    Args:
        name: a key of `stock_solvers(schedule)`.
        schedule: the teacher's schedule.

    Raises:
        BadInput: for another name.
    """
    known = stock_solvers(schedule)
    if name not in known:
        raise BadInput(f"no stock solver '{name}' for {type(schedule).__name__}.{suggest(name, known)}")
    kind, settings = known[name]
    scheduler_class = stock_class(kind, "Scheduler")
    if isinstance(schedule, RectifiedFlow):
        if kind.startswith("FlowMatch"):
            return scheduler_class(**settings, shift=schedule.shift)
        return scheduler_class(
            **settings, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=schedule.shift
        )
    alphas_cumprod = torch.tensor(as_table(schedule).alphas_cumprod, dtype=torch.float64).clamp(min=MIN_ALPHA_BAR)
    betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    settings = settings | {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}
    return scheduler_class(prediction_type="v_prediction", **settings)


@lru_cache(maxsize=8)
def as_table(schedule: Schedule) -> Table:
    """The schedule as a Table: itself, or 1000 of its steps; VE starts at sigma / alpha = 0.002."""
    if isinstance(schedule, Table):
        return schedule
    if not isinstance(schedule, VE):
        return Table.of(schedule)
    first = float(schedule.time(torch.tensor([-2 * math.log(0.002)], dtype=torch.float64)))
    alpha, sigma = schedule(torch.linspace(first, 1, 1000, dtype=torch.float64))
    return Table(tuple((alpha**2 / (alpha**2 + sigma**2)).tolist()))


@torch.no_grad()
def sample_stock(
    denoiser: Denoiser, z: Tensor, name: str, calls: int, generator: Generator | None = None, **cond: Any
) -> Tensor:
    """Samples of a stock solver in at most `calls` calls of the denoiser.

    Args:
        denoiser: a Denoiser of any schedule.
        z: initial noise (B, ...) ~ N(0, I).
        name: a key of `stock_solvers(denoiser.schedule)`.
        calls: upper bound of the number of calls; solvers with two calls per step take fewer steps.
        generator: source of noise of the stochastic solvers (SA-Solver, Euler ancestral), on the device of z.
        cond: conditions, passed to the denoiser.

    Returns:
        x (B, ...).

    Raises:
        BadInput: for an unknown name, or a solver that cannot sample in so few calls.
    """
    schedule, scheduler = denoiser.schedule, scheduler_for(name, denoiser.schedule)
    steps = affordable_steps(scheduler, calls)
    if not steps:
        raise BadInput(f"{name} cannot sample in {calls} calls: allow more.")
    _set_timesteps(scheduler, steps)
    kind, flow = type(scheduler).__name__, isinstance(schedule, RectifiedFlow)
    model = denoiser if flow or isinstance(schedule, Table) else denoiser.with_schedule(as_table(schedule))
    options = {"generator": generator} if kind in STOCHASTIC else {}
    x = z if kind.startswith("FlowMatch") else z * scheduler.init_noise_sigma
    for i, timestep in enumerate(scheduler.timesteps):
        t = _time(schedule, scheduler, i, timestep).to(z.device).expand(len(z))
        x_t = x if flow else scheduler.scale_model_input(x, timestep)
        out = _native(model, x_t, t, flow, cond)
        x = scheduler.step(out, timestep, x, **options).prev_sample
    return x


def affordable_steps(scheduler: Any, calls: int) -> int:
    """The largest number of steps that needs at most `calls` calls; 0 if there is none."""
    steps = calls
    while steps > 0:
        cost = _calls(scheduler, steps)
        if cost <= calls:
            return steps
        steps = min(steps - 1, int(calls * steps / cost) + 1)  # close to the result for two calls per step
    return 0


def _calls(scheduler: Any, steps: int) -> float:
    """Network calls of `steps` steps; infinite if the scheduler cannot take so many."""
    try:
        _set_timesteps(scheduler, steps)
    except (ValueError, IndexError, ZeroDivisionError):
        return math.inf
    return len(scheduler.timesteps)


def _set_timesteps(scheduler: Any, steps: int) -> None:
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":  # with the sigmas of the stock flow pipelines
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        scheduler.set_timesteps(steps)


def _time(schedule: Schedule, scheduler: Any, i: int, timestep: Any) -> Tensor:
    """The time t in [0, 1] of the i-th call, at `timestep`."""
    if isinstance(schedule, RectifiedFlow):
        sigma = scheduler.sigmas[i].double()
        return schedule.time(2 * ((1 - sigma).log() - sigma.log())).float()
    return (torch.as_tensor(timestep, dtype=torch.float32).cpu() + 1) / len(as_table(schedule).alphas_cumprod)


def _native(denoiser: Denoiser, x_t: Tensor, t: Tensor, flow: bool, cond: Mapping[str, Any]) -> Tensor:
    """The prediction that the scheduler expects, from E[x | x_t]: the flow z - x, or v = alpha z - sigma x."""
    x, x_t = at_least_float32(denoiser(x_t, t, **cond)), at_least_float32(x_t)
    alpha_t, sigma_t = denoiser.schedule.at(t, x_t)
    z = safe_divide(x_t - alpha_t * x, sigma_t)
    return z - x if flow else alpha_t * z - sigma_t * x


def calls_used(name: str, schedule: Schedule, calls: int) -> int:
    """The number of calls, at most `calls`, that the solver uses; 0 if it cannot sample in so few."""
    scheduler = scheduler_for(name, schedule)
    steps = affordable_steps(scheduler, calls)
    return int(_calls(scheduler, steps)) if steps else 0
