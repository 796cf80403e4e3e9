r"""Consistency distillation, LCM form (Song et al. 2023, https://arxiv.org/abs/2303.01469; Luo et al. 2023,
https://arxiv.org/abs/2310.04378).

On a fine grid 1 = t_N > ... > t_0, uniform down to t_0 = 0 or given, with t = t_j, s = t_{j-1}, j ~ U{1..N}:

    x_s = one step of the guided teacher's ODE from (x_t, t) to s
    L   = d( G(x_t, t, w),  sg G_target(x_s, s, w) ),   G_target(x, t_0) = x

The optimum is the N-step solver's map from x_t to data, so the discretisation error is the solver's.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Denoiser, Guided
from distill.errors import BadInput
from distill.losses.regression import huber, mse
from distill.methods.base import Method
from distill.noise import at_least_float32, bcast
from distill.solvers import Renoise
from distill.solvers import solver as solver_of
from distill.tangent import ReplayRNG


class Consistency(Method):
    """Student against its own target one solver step ahead.

    Args:
        intervals: N, for t_j = j/N (the skip of LCM is 1/N), or the decreasing times t_N > ... > t_0 themselves; where
            t_0 > 0 it is the smallest time, at which the student is the identity.
        solver: the teacher's ODE step, by name (`ddim`, `heun`, ...).
        target_ema: decay of the target network; 0 is the student itself without gradient (the rule of LCM-LoRA).
        huber: constant of the per-element pseudo-Huber; none for the squared distance.
        guidance_range: draw w per sample from [low, high] instead of the fixed `guidance`; a student whose network
            has a guidance input gets w.
        base: arguments of Method.

    Raises:
        BadInput: if the times do not decrease within [0, 1].
    """

    target: Denoiser
    sampler, serving = Renoise(), "renoise"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        intervals: int | list[float] = 50,
        solver: str = "ddim",
        target_ema: float = 0.95,
        huber: float | None = None,
        guidance_range: list[float] | None = None,
        **base,
    ):
        super().__init__(roles, averages={"target": ("student", target_ema)}, **base)
        self.times, self.huber, self.guidance_range = times_of(intervals), huber, guidance_range
        self.solver = solver_of(solver)
        self.guided = Guided(self.teacher, self.guidance)

    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z, cond):
        times = torch.tensor(self.times, dtype=at_least_float32(x).dtype, device=x.device)
        j = torch.randint(1, len(times), (len(x),), device=x.device)
        t, s = times[j], times[j - 1]
        w, student_cond = self.draw_guidance(x, cond, self.guidance_range)
        x_t = self.teacher.schedule.add_noise(x, t, z)
        rewind = ReplayRNG(x.device)
        y = self.student(x_t, t, **student_cond)
        with torch.no_grad():
            x_s = self.solver(self.guided, x_t, t, s, w=w, **cond)
            with rewind:
                ahead = self.target(x_s, s, **student_cond)
            target = torch.where(bcast(j > 1, x_s), ahead, x_s)
        return mse(y, target) if self.huber is None else huber(y, target, self.huber)


def times_of(intervals: int | list[float]) -> tuple[float, ...]:
    """t_0 < ... < t_N."""
    if isinstance(intervals, int):
        times = tuple(j / intervals for j in range(intervals + 1)) if intervals else ()
    else:
        times = tuple(float(t) for t in intervals)[::-1]
    if len(times) < 2 or not 0 <= times[0] < times[-1] <= 1 or any(s >= t for s, t in zip(times, times[1:])):
        raise BadInput("method.intervals: give a number of steps, or two or more times that decrease from 1 towards 0.")
    return times
