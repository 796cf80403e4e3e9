"""Stochastic solvers. Noise is passed in, so each step is deterministic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.denoise import Denoiser
from distill.noise import Schedule, bcast, safe_divide
from distill.solvers.base import History, Solver


class Ancestral(Solver):
    r"""A sample of the DDPM posterior q(x_s | x_t, x) at x = D(x_t), with rho = alpha_t sigma_s / (alpha_s sigma_t):

    x_s = alpha_s x + sigma_s (sqrt(1 - eta^2 (1 - rho^2)) eps + eta sqrt(1 - rho^2) noise).

    eta = 1 is ancestral sampling (Ho et al., 2020, https://arxiv.org/abs/2006.11239), also SDE-DPM-Solver++(1).
    eta = 0 is DDIM. 0 < eta < 1 interpolates between them: https://arxiv.org/abs/2010.02502, eq. 16.
    """

    stochastic = True

    def __init__(self, eta: float = 1.0):
        self.eta = eta

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
        return self.step(denoiser.schedule, denoiser(x_t, t, **cond), x_t, t, s, self._require(noise))

    def step(self, schedule: Schedule, x: Tensor, x_t: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """x_s for given x (B, ...) and noise."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t, x_t), schedule.at(s, x_t)
        rho = torch.where(bcast(t == s, x_t), 1.0, safe_divide(alpha_t, alpha_s) * safe_divide(sigma_s, sigma_t))
        fresh = self.eta * (1 - rho**2).clamp(min=0).sqrt()
        return alpha_s * x + sigma_s * ((1 - fresh**2).sqrt() * schedule.eps(x, x_t, t) + fresh * noise)


class Renoise(Solver):
    """x_s = alpha_s x + sigma_s noise with x = D(x_t): multistep consistency sampling.

    Samples follow the data distribution only if the denoiser is a consistency function, hence order 0.
    Song et al., 2023, https://arxiv.org/abs/2303.01469, Algorithm 1.
    """

    order, stochastic = 0, True

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
        return self.step(denoiser.schedule, denoiser(x_t, t, **cond), s, self._require(noise))

    def step(self, schedule: Schedule, x: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """x_s for given x (B, ...) and noise."""
        return schedule.add_noise(x, s, noise)
