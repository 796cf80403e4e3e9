r"""Flow maps: networks with the end time s as an input, their sampling step, and coordinates with straight paths.

The output G(x_t, t, s) is the x for which the DDIM step from x_t arrives at x_s. In the coordinates

    y = x_t / (alpha_t + sigma_t),   r = sigma_t / (alpha_t + sigma_t),   u = dy/dr = eps - x

a flow map predicts the average velocity, y_s = y_t - (r_t - r_s) u(x_t, t, s). For rectified flow, y = x_t and r = t.
MeanFlow, https://arxiv.org/abs/2505.13447; Align Your Flow, https://arxiv.org/abs/2506.14603.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.noise import Schedule, at_least_float32, bcast
from distill.solvers.base import History, Solver, ddim


class FlowMap(Solver):
    r"""A step to u = (1 - gamma) s, x_u = ddim(G(x_t, t, u)), then the forward process, x_s ~ q(x_s | x_u).

    gamma = 0 is deterministic; gamma = 1 predicts x and adds new noise at every step (multistep consistency sampling).
    The denoiser is called with `s=u`. The gamma of TCD, https://arxiv.org/abs/2402.19159.

    Args:
        gamma: in [0, 1].

    Raises:
        BadInput: if gamma is outside [0, 1].
    """

    def __init__(self, gamma: float = 0.0):
        if not 0 <= gamma <= 1:
            raise BadInput(f"{type(self).__name__}: gamma must be within [0, 1], got {gamma}.")
        self.gamma, self.stochastic = gamma, gamma > 0

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
        schedule, u = denoiser.schedule, self.end_time(denoiser.schedule, s)
        x_u = self.step(schedule, denoiser(x_t, t, s=u, **cond), x_t, t, u)
        return schedule.transition(x_u, u, s, self._require(noise)) if self.stochastic else x_u

    def end_time(self, schedule: Schedule, s: Tensor) -> Tensor:
        """u (B,), the end time of the deterministic part of a step to s."""
        return (1 - self.gamma) * s

    def step(self, schedule: Schedule, x: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s for given x = G(x_t, t, s)."""
        return ddim(schedule, x, x_t, t, s)


class GammaSampler(FlowMap):
    r"""The gamma-sampler of CTM, in which the new noise has standard deviation gamma sigma_s:

    sigma_u / alpha_u = sqrt(1 - gamma^2) sigma_s / alpha_s,   x_s = alpha_s / alpha_u x_u + gamma sigma_s noise.

    Kim et al. 2023, https://arxiv.org/abs/2310.02279, Algorithm 3.
    """

    def end_time(self, schedule: Schedule, s: Tensor) -> Tensor:
        if self.gamma == 1:
            return torch.zeros_like(s)
        return schedule.time(schedule.log_snr(s) - math.log1p(-(self.gamma**2)))


def predicted_flow(denoiser: Denoiser, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """u = eps - x (B, ...) at x_t for t > 0; the native output of a denoiser with prediction "flow"."""
    if denoiser.prediction == "flow":
        return at_least_float32(denoiser.native(x_t, t, **cond))
    x = denoiser(x_t, t, **cond)
    return denoiser.schedule.eps(x, x_t, t) - x


def straight_time(schedule: Schedule, t: Tensor) -> Tensor:
    """r = sigma_t / (alpha_t + sigma_t) (B,): 0 at t = 0, and 1 where alpha_t = 0."""
    alpha_t, sigma_t = schedule(t)
    return sigma_t / (alpha_t + sigma_t)


def path_tangent(schedule: Schedule, u: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""(dx_t/dr (B, ...), dt/dr (B,)) of the path through x_t with velocity u = dy/dr, for t > 0.

    x = (x_t - sigma u) / (alpha + sigma) and eps = x + u are constant along the path, and
    dr/dt = (alpha sigma' - sigma alpha') / (alpha + sigma)^2.
    """
    alpha_t, sigma_t = schedule.at(t, x_t)
    d_alpha, d_sigma = bcast(schedule.d_alpha(t), x_t), bcast(schedule.d_sigma(t), x_t)
    x = (x_t - sigma_t * u) / (alpha_t + sigma_t)
    dt_dr = (alpha_t + sigma_t).square() / (alpha_t * d_sigma - sigma_t * d_alpha)
    return (d_alpha * x + d_sigma * (x + u)) * dt_dr, dt_dr.reshape(t.shape)
