"""Stock schedulers walk a Denoiser as they walk their own networks: the training-free opponents that users have at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor

from distill.denoise import Denoiser
from distill.errors import BadInput, suggest
from distill.nets.diffusers.schedulers import stock_class
from distill.noise import VE, RectifiedFlow, Schedule, Table, bcast, over, wide

NOISY = 2.0**-24  # alpha-bar of a last step without signal: stock solvers take its logarithm
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
}  # DEIS and SA-Solver stop a flow at their last positive sigma, so they make no sample of it
DRAWING = ("SASolverScheduler", "EulerAncestralDiscreteScheduler")


def applicable(schedule: Schedule) -> Mapping[str, tuple[str, dict[str, Any]]]:
    """Name -> (class, settings) of the stock schedulers that serve a teacher of this schedule."""
    return FLOWS if isinstance(schedule, RectifiedFlow) else TABLES


def scheduler_for(name: str, schedule: Schedule):
    """The stock scheduler `name` on this schedule: flow matching on its shift, all else on a table of alpha-bar.

    It takes v = alpha z - sigma x from the network, or z - x of a flow. A table's last alpha-bar of 0, which most of
    them divide by, is taken as 2^-24, as stock does for zero terminal SNR.

    Raises:
        BadInput: for a name that does not apply.
    """
    known = applicable(schedule)
    if name not in known:
        raise BadInput(f"no stock solver '{name}' serves {type(schedule).__name__}.{suggest(name, known)}")
    kind, settings = known[name]
    if isinstance(schedule, RectifiedFlow):
        shift = {"shift": schedule.shift} if kind.startswith("FlowMatch") else {
            "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": schedule.shift}
        return stock_class(kind, "Scheduler")(**settings, **shift)
    bar = torch.tensor(tabled(schedule).alphas_cumprod, dtype=torch.float64).clamp(min=NOISY)
    betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
    settings = settings | {"num_train_timesteps": len(bar), "trained_betas": betas.tolist()}
    return stock_class(kind, "Scheduler")(prediction_type="v_prediction", **settings)


@lru_cache(maxsize=8)
def tabled(schedule: Schedule) -> Table:
    """The schedule as a table: itself, or a thousand of its steps, least noise sigma/alpha = 0.002 where it is VE."""
    if isinstance(schedule, Table):
        return schedule
    if not isinstance(schedule, VE):
        return Table.of(schedule)
    first = float(schedule.time(torch.tensor([-2 * math.log(0.002)], dtype=torch.float64)))
    alpha, sigma = schedule(torch.linspace(first, 1, 1000, dtype=torch.float64))
    return Table(tuple((alpha**2 / (alpha**2 + sigma**2)).tolist()))


@torch.no_grad()
def walk(denoiser: Denoiser, z: Tensor, name: str, calls: int, generator: Generator | None = None, **cond) -> Tensor:
    """Samples (B, ...) of a stock solver from noise z (B, ...) ~ N(0, I) in at most `calls` calls of the denoiser.

    Args:
        denoiser: any; asked under the solver's table where its own schedule is another one.
        name: one of `applicable(denoiser.schedule)`.
        calls: as many steps are taken as they pay for: solvers that ask twice a step take fewer.
        generator: for the stochastic ones (SA-Solver, Euler ancestral), on z's device.

    Raises:
        BadInput: an unknown name, or one that makes no sample in so few calls.
    """
    schedule, scheduler = denoiser.schedule, scheduler_for(name, denoiser.schedule)
    steps = affordable(scheduler, calls)
    if not steps:
        raise BadInput(f"{name} makes no sample in {calls} calls; give it more.")
    _ready(scheduler, steps)
    flow = isinstance(schedule, RectifiedFlow)
    asked = denoiser if flow or isinstance(schedule, Table) else denoiser.under(tabled(schedule))
    noise = {"generator": generator} if type(scheduler).__name__ in DRAWING else {}
    x = z * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else z
    for i, n in enumerate(scheduler.timesteps):
        t = _time(schedule, scheduler, i, n).to(z.device).expand(len(z))
        x_t = x if flow else scheduler.scale_model_input(x, n)
        out = _native(asked, x_t, t, flow, cond)
        x = scheduler.step(out, n, x, **noise).prev_sample
    return x


def affordable(scheduler, calls: int) -> int:
    """The most steps that cost at most `calls` calls; 0 where none does."""
    steps = calls
    while steps > 0:
        cost = _calls(scheduler, steps)
        if cost <= calls:
            return steps
        steps = min(steps - 1, int(calls * steps / cost) + 1)  # near where a solver that asks twice a step ends up
    return 0


def _calls(scheduler, steps: int) -> float:
    try:
        _ready(scheduler, steps)
    except (ValueError, IndexError, ZeroDivisionError):
        return math.inf
    return len(scheduler.timesteps)


def _ready(scheduler, steps: int) -> None:
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":  # as stock pipelines of flow models ask for
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        scheduler.set_timesteps(steps)


def _time(schedule: Schedule, scheduler, i: int, n) -> Tensor:
    """Our time of the i-th call, at timestep n."""
    if isinstance(schedule, RectifiedFlow):
        sigma = scheduler.sigmas[i].double()
        return schedule.time(2 * ((1 - sigma).log() - sigma.log())).float()
    return (torch.as_tensor(n, dtype=torch.float32).cpu() + 1) / len(tabled(schedule).alphas_cumprod)


def _native(denoiser: Denoiser, x_t: Tensor, t: Tensor, flow: bool, cond: Mapping[str, Any]) -> Tensor:
    """v or flow of E[x | x_t]."""
    x, x_t = wide(denoiser(x_t, t, **cond)), wide(x_t)
    alpha_t, sigma_t = (bcast(a, x_t) for a in denoiser.schedule(t))
    z = over(x_t - alpha_t * x, sigma_t)
    return z - x if flow else alpha_t * z - sigma_t * x


def cost(name: str, schedule: Schedule, calls: int) -> int:
    """How many of `calls` calls the solver makes use of; 0 where it makes no sample of so few."""
    scheduler = scheduler_for(name, schedule)
    steps = affordable(scheduler, calls)
    return int(_calls(scheduler, steps)) if steps else 0
