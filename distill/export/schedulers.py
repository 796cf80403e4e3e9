r"""Stock schedulers for text-conditioned students: the served times are read back and must equal those of training.

Tables go to DDIM and LCM as `folder.stock_scheduler` makes them, or keep the family's own DDIM. Flows go to
FlowMatchEulerDiscreteScheduler and FlowMatchLCMScheduler, which take K numbers r_i from 1 down to their smallest one
(or the pipeline's own, 1 to 1/K), shift them, sigma = S r / (1 + (S - 1) r), and may stretch the result so that the last is
`shift_terminal`. For times k/K under a shift that is not a grid of theirs, but 1 - sigma_i is then i / (a - b i), and so
is theirs: another S and a terminal serve these times exactly (`fitted_shift`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.noise import RectifiedFlow
from distill.times import Grid

KINDS = {"ode": "FlowMatchEulerDiscreteScheduler", "renoise": "FlowMatchLCMScheduler"}
CLOSE = 1e-6  # tolerance between float32 sigmas


def flow_scheduler(student: Denoiser, grid: Grid, sampler: str, even: bool, listed: bool) -> tuple[Any, dict]:
    """The stock scheduler of a flow student, and the arguments that the pipeline's call needs besides the number of steps.

    Args:
        even: whether the pipeline passes its own evenly spaced sigmas.
        listed: whether the pipeline's call takes a list of sigmas.

    Raises:
        BadInput: the schedule or prediction has no stock scheduler, or none serves these times.
    """
    from distill.models.diffusers import scheduler_of

    schedule, steps = student.schedule, grid.steps
    if not isinstance(schedule, RectifiedFlow) or student.prediction != "flow":
        raise BadInput(
            f"A student that predicts '{student.prediction}' under {type(schedule).__name__} has no stock "
            "scheduler: train it to predict 'flow' under RectifiedFlow."
        )
    wanted = schedule.sigma(grid.tensor(dtype=torch.float64)[:-1])
    last = wanted[-1].item()
    settings = {"num_train_timesteps": student.net.timesteps}
    settings_tried = [{"shift": schedule.shift}]
    if steps > 1:
        settings_tried += [
            {"shift": schedule.shift, "shift_terminal": last},
            fitted_shift(wanted, student.net.timesteps, even),
        ]
    schedulers = [scheduler_of(KINDS[sampler], **settings | kw) for kw in settings_tried]
    for scheduler in schedulers:
        served = served_sigmas(scheduler, steps, even)
        if (served - wanted).abs().max() < CLOSE:
            return scheduler, {}
    if listed:
        return schedulers[0], {"sigmas": list(grid.times[:-1])}
    shown = [round(t, 4) for t in schedule.time(2 * ((1 - served).log() - served.log())).tolist()]
    raise BadInput(
        f"{KINDS[sampler]} serves {[*shown, 0]} at best, but the student was trained on {list(grid.times)}: "
        f"train on grid: {steps}, or on the times of grid_of(folder, {steps})."
    )


def lattice_scheduler(student: Denoiser, grid: Grid) -> tuple[Any, dict]:
    """LCM's scheduler with the list of timesteps that the call needs, for a grid that has no stock spacing.

    Raises:
        BadInput: a time falls between two timesteps, or on the last one, at which LCM ignores the network.
    """
    from distill.export.folder import stock_scheduler
    from distill.models.diffusers import scheduler_of

    total = len(student.schedule.alphas_cumprod)
    exact = [t * total - 1 for t in grid.times[:-1]]
    nodes = [round(n) for n in exact]
    if max(abs(a - b) for a, b in zip(exact, nodes)) > 1e-2 or nodes[-1] < 1:
        raise BadInput(
            f"LCMScheduler evaluates at whole timesteps above 0 of {total}; the student was trained on "
            f"{list(grid.times)}, that is {[round(n, 2) for n in exact]}: train on multiples of 1/{total}."
        )
    scheduler = scheduler_of(stock_scheduler(student, Grid.uniform(1), "renoise"), original_inference_steps=total)
    return scheduler, {"timesteps": nodes}


def served_sigmas(scheduler: Any, steps: int, even: bool) -> Tensor:
    """The K sigmas at which the scheduler evaluates the network."""
    scheduler.set_timesteps(**{"sigmas": np.linspace(1, 1 / steps, steps)} if even else {"num_inference_steps": steps})
    return scheduler.sigmas[:-1].double()


def fitted_shift(wanted: Tensor, total: int, even: bool) -> dict[str, float]:
    r"""Shift and terminal with which the stock scheduler serves these sigmas, if they are 1 - i / (a - b i).

    r_i = 1 - i d gives 1 - sigma_i = c i / (S - (S - 1) d i), c from the stretching, so that b / a = d (S - 1) / S. d is
    1/K for evenly spaced sigmas, else (1 - r_last) / (K - 1) with r_last = S / (N + S - 1), N = `total`, which the
    stock class shifts before it begins.
    """
    steps = len(wanted)
    i = np.arange(1, steps)
    slope, a = np.polyfit(i, i / (1 - wanted[1:].numpy()), 1) if steps > 2 else (0.0, 1.0)
    ratio, shift = -slope / a, 1.0
    for _ in range(200):  # a contraction by 1/N
        d = 1 / steps if even else (1 - shift / (total + shift - 1)) / (steps - 1)
        shift = 1 / max(1 - ratio / d, 1e-3)
    return {"shift": float(shift), "shift_terminal": wanted[-1].item()}
