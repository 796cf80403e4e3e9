"""The stochastic sampler of guidance distillation: a denoising step of twice the length, then one step of noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.denoise import Denoiser
from distill.solvers.base import History, Solver, ddim


class Overshoot(Solver):
    r"""A DDIM step of twice the length, t -> u = max(2 s - t, 0), then the forward process: x_s ~ q(x_s | x_u).

    A step to s = 0 is a DDIM step. The student must be trained on steps of twice the grid's length from every time of
    the grid (`stochastic` of `distill.methods.Progressive`). If these are exact, x_s is distributed as the noised data.
    Meng et al., 2022, https://arxiv.org/abs/2210.03142, section 3.3.
    """

    order, stochastic = 1, True

    def __call__(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        *,
        history: History | None = None,
        noise: Tensor | None = None,
        **cond: Any,
    ) -> Tensor:
        noise, schedule = self._require(noise), denoiser.schedule
        u = (2 * s - t).clamp(min=0)
        x_u = ddim(schedule, denoiser(x_t, t, **cond), x_t, t, u)
        return schedule.transition(x_u, u, s, noise)
