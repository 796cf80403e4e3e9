"""The stochastic sampler of guidance distillation: twice the step down, one step of noise back."""

from __future__ import annotations

from distill.solvers.base import Solver, ddim


class Overshoot(Solver):
    r"""A DDIM step of twice the length, t -> u = max(2 s - t, 0), then the forward process back up: x_s ~ q(x_s | x_u).

    A step that ends at s = 0 is DDIM's. Its student must know jumps of twice the grid's steps from every time of the
    grid (`stochastic` of `distill.methods.Progressive`). With an exact jump x_s has the law of the noised data.
    Meng et al., 2022, https://arxiv.org/abs/2210.03142, section 3.3.
    """

    order, stochastic = 1, True

    def __call__(self, denoiser, x_t, t, s, *, history=None, noise=None, **cond):
        noise, schedule = self._needs(noise), denoiser.schedule
        u = (2 * s - t).clamp(min=0)
        x_u = ddim(schedule, denoiser(x_t, t, **cond), x_t, t, u)
        return schedule.transition(x_u, u, s, noise)
