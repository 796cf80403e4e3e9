r"""Consistency distillation, LCM form (Song et al. 2023, https://arxiv.org/abs/2303.01469; Luo et al. 2023,
https://arxiv.org/abs/2310.04378).

On a fine grid of N intervals, t = j/N, s = (j-1)/N, j ~ U{1..N}:

    x_s = one step of the guided teacher's ODE from (x_t, t) to s
    L   = d( G(x_t, t, w),  sg G_target(x_s, s, w) ),   G_target(x, 0) = x

The optimum is the N-step solver's map from x_t to data, so the discretisation error is the solver's.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided
from distill.losses.regression import huber, mse
from distill.methods.base import Method
from distill.noise import bcast
from distill.solvers import Renoise, solver


class Consistency(Method):
    """Student against its own target one solver step ahead.

    Args:
        intervals: N; the skip of LCM is 1/N.
        solver: the teacher's ODE step, by name (`ddim`, `heun`, ...).
        target_ema: decay of the target network; 0 is the student itself without gradient (the rule of LCM-LoRA).
        huber: constant of the per-element pseudo-Huber; none for the squared distance.
        guidance_range: draw w per sample from [low, high] instead of the fixed `guidance`; a student whose network has a
            guidance input is told w.
        base: arguments of Method.
    """

    sampler, serving = Renoise(), "renoise"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        intervals: int = 50,
        solver: str = "ddim",
        target_ema: float = 0.95,
        huber: float | None = None,
        guidance_range: list[float] | None = None,
        **base,
    ):
        super().__init__(roles, averages={"target": ("student", target_ema)}, **base)
        self.intervals, self.huber, self.guidance_range = intervals, huber, guidance_range
        self.solver = solver_of(solver)
        self.guided = Guided(self.teacher, self.guidance)

    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z, cond):
        j = torch.randint(1, self.intervals + 1, (len(x),), device=x.device)
        t, s = j / self.intervals, (j - 1) / self.intervals
        w = self.strength(x)
        told = cond | ({"w": w} if getattr(self.student.net, "guided", False) else {})
        x_t = self.teacher.schedule.add_noise(x, t, z)
        y = self.student(x_t, t, **told)
        with torch.no_grad():
            x_s = self.solver(self.guided, x_t, t, s, w=w, **cond)
            target = torch.where(bcast(s, x_s) > 0, self.target(x_s, s, **told), x_s)
        return mse(y, target) if self.huber is None else huber(y, target, self.huber)

    def strength(self, x):
        """w (B,): drawn per sample, or the one number."""
        if self.guidance_range is None:
            return torch.full((len(x),), float(self.guidance), device=x.device)
        low, high = self.guidance_range
        return low + (high - low) * torch.rand(len(x), device=x.device)


solver_of = solver
