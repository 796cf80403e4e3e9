"""Stochastic solvers. The noise is an argument, so every step is a pure map."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.noise import Schedule, bcast, over
from distill.solvers.base import Solver


class Ancestral(Solver):
    r"""The DDPM posterior q(x_s | x_t, x) at x = D(x_t), with rho = alpha_t sigma_s / (alpha_s sigma_t):

    x_s = alpha_s x + sigma_s (sqrt(1 - eta^2 (1 - rho^2)) eps + eta sqrt(1 - rho^2) noise).

    eta = 1 is ancestral sampling (Ho et al., 2020, https://arxiv.org/abs/2006.11239), also SDE-DPM-Solver++(1);
    eta = 0 is DDIM, and between them lie the samplers of https://arxiv.org/abs/2010.02502, eq. 16.
    """

    stochastic = True

    def __init__(self, eta: float = 1.0):
        self.eta = eta

    def __call__(self, denoiser, x_t, t, s, *, history=None, noise=None, **cond):
        return self.step(denoiser.schedule, denoiser(x_t, t, **cond), x_t, t, s, self._needs(noise))

    def step(self, schedule: Schedule, x: Tensor, x_t: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """x_s for x already known."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t, x_t), schedule.at(s, x_t)
        rho = torch.where(bcast(t == s, x_t), 1.0, over(alpha_t, alpha_s) * over(sigma_s, sigma_t))
        fresh = self.eta * (1 - rho**2).clamp(min=0).sqrt()
        return alpha_s * x + sigma_s * ((1 - fresh**2).sqrt() * schedule.eps(x, x_t, t) + fresh * noise)


class ReverseSDE(Solver):
    r"""Euler-Maruyama on the reverse SDE, in the schedule's own t:

    x_s = x_t + (s - t) (v_t + g^2 eps / (2 sigma_t)) + g sqrt(t - s) noise,
    with v_t the probability-flow velocity and g^2 = d sigma^2/dt - 2 sigma^2 d log alpha/dt.

    Where g is infinite (alpha_t = 0), or the end is clean data (s = 0), the step is the posterior's (Ancestral).
    Song et al., 2021, https://arxiv.org/abs/2011.13456.
    """

    stochastic = True

    def __call__(self, denoiser, x_t, t, s, *, history=None, noise=None, **cond):
        noise, schedule = self._needs(noise), denoiser.schedule
        x = denoiser(x_t, t, **cond)
        alpha_t, sigma_t = schedule(t)
        edge = (alpha_t < 1e-6) | (s == 0)
        g2 = 2 * sigma_t * (schedule.d_sigma(t) - sigma_t * over(schedule.d_alpha(t), alpha_t))
        drift = schedule.velocity(x, x_t, t) + bcast(over(g2, 2 * sigma_t), x_t) * schedule.eps(x, x_t, t)
        dt = bcast(t - s, x_t)
        x_s = x_t - dt * drift + (bcast(g2, x_t) * dt).clamp(min=0).sqrt() * noise
        return torch.where(bcast(edge, x_t), Ancestral().step(schedule, x, x_t, t, s, noise), x_s)


class Renoise(Solver):
    """x_s = alpha_s x + sigma_s noise: predict the data, noise it afresh; multistep consistency sampling.

    Its law is the data's only if the denoiser is a consistency function: order 0.
    Song et al., 2023, https://arxiv.org/abs/2303.01469, Algorithm 1.
    """

    order, stochastic = 0, True

    def __call__(self, denoiser, x_t, t, s, *, history=None, noise=None, **cond):
        return self.step(denoiser.schedule, denoiser(x_t, t, **cond), s, self._needs(noise))

    def step(self, schedule: Schedule, x: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """x_s for x already known."""
        return schedule.add_noise(x, s, noise)
