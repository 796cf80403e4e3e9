r"""Flow maps: networks told where they go, their step, and the chart in which their paths are straight.

A flow map takes the time s of arrival as an input. With G(x_t, t, s) read as the x whose DDIM step lands on x_s,
it is one network under every schedule. In the chart of straight paths

    y = x_t / (alpha_t + sigma_t),   r = sigma_t / (alpha_t + sigma_t),   u = dy/dr = eps - x

its output is the average velocity, y_s = y_t - (r_t - r_s) u(x_t, t, s); under rectified flow y = x_t and r = t.
MeanFlow, https://arxiv.org/abs/2505.13447; Align Your Flow, https://arxiv.org/abs/2506.14603.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.errors import BadInput
from distill.noise import Schedule, bcast, wide
from distill.solvers.base import Solver, ddim


class FlowMap(Solver):
    r"""x_s = ddim(G(x_t, t, s)); with gamma > 0 to u = (1 - gamma) s, then noised back up, x_s ~ q(x_s | x_u).

    gamma = 0 is deterministic, gamma = 1 predicts the data and noises it afresh at every step.
    The denoiser is asked with `s=` the time of arrival. https://arxiv.org/abs/2402.19159 (the gamma of TCD, CTM).
    """

    def __init__(self, gamma: float = 0.0):
        if not 0 <= gamma <= 1:
            raise BadInput(f"gamma of FlowMap must be within [0, 1], got {gamma}.")
        self.gamma, self.stochastic = gamma, gamma > 0

    def __call__(self, denoiser, x_t, t, s, *, history=None, noise=None, **cond):
        schedule, u = denoiser.schedule, self.landing(denoiser.schedule, s)
        x_u = self.step(schedule, denoiser(x_t, t, s=u, **cond), x_t, t, u)
        return schedule.transition(x_u, u, s, self._needs(noise)) if self.stochastic else x_u

    def landing(self, schedule: Schedule, s: Tensor) -> Tensor:
        """u (B,), where a step to s lands before it is noised."""
        return (1 - self.gamma) * s

    def step(self, schedule: Schedule, x: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s for x = G(x_t, t, s) already known."""
        return ddim(schedule, x, x_t, t, s)


class Gamma(FlowMap):
    r"""CTM's gamma-sampler: the fresh noise is the share gamma of x_s's, in units of alpha_s:

    sigma_u / alpha_u = sqrt(1 - gamma^2) sigma_s / alpha_s,   x_s = alpha_s / alpha_u x_u + gamma sigma_s noise.

    Kim et al. 2023, https://arxiv.org/abs/2310.02279, Algorithm 3.
    """

    def landing(self, schedule, s):
        if self.gamma == 1:
            return torch.zeros_like(s)
        return schedule.time(schedule.log_snr(s) - math.log1p(-(self.gamma**2)))


def flow(denoiser, x_t: Tensor, t: Tensor, **cond) -> Tensor:
    """u (B, ...) = eps - x of a denoiser at x_t, t > 0: its own output if it predicts "flow"."""
    if denoiser.prediction == "flow":
        return wide(denoiser.native(x_t, t, **cond))
    x = denoiser(x_t, t, **cond)
    return denoiser.schedule.eps(x, x_t, t) - x


def straight_time(schedule: Schedule, t: Tensor) -> Tensor:
    """r (B,) = sigma_t / (alpha_t + sigma_t), from 0 at the data to 1 where alpha_t = 0."""
    alpha_t, sigma_t = schedule(t)
    return sigma_t / (alpha_t + sigma_t)


def along(schedule: Schedule, u: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""(dx_t/dr, dt/dr) on the path through x_t that has velocity u there: tangents for a derivative in r, t > 0.

    x = (x_t - sigma u) / (alpha + sigma) and eps = x + u are constant along it, and
    dr/dt = (alpha sigma' - sigma alpha') / (alpha + sigma)^2.
    """
    alpha_t, sigma_t = schedule.at(t, x_t)
    d_alpha, d_sigma = bcast(schedule.d_alpha(t), x_t), bcast(schedule.d_sigma(t), x_t)
    x = (x_t - sigma_t * u) / (alpha_t + sigma_t)
    dt_dr = (alpha_t + sigma_t).square() / (alpha_t * d_sigma - sigma_t * d_alpha)
    return (d_alpha * x + d_sigma * (x + u)) * dt_dr, dt_dr.reshape(t.shape)
