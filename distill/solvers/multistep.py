"""Deterministic multistep solvers: one evaluation per step, using the previous step's prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.denoise import Denoiser
from distill.noise import bcast
from distill.solvers.base import History, Solver, ddim, half_log_snr


class DPMSolverPP2M(Solver):
    r"""DPM-Solver++(2M): a DDIM step with x extrapolated linearly in lambda = log(alpha / sigma),

    x = D_t + (D_t - D_p) h / (2 h_p), h = lambda_s - lambda_t, h_p = lambda_t - lambda_p, previous step from p to t.

    Order 1 in the first step, and where lambda is infinite: s = 0, or p with alpha_p = 0.
    `history` holds (t, x) of the previous step and is updated in place.
    Lu et al., 2022, https://arxiv.org/abs/2211.01095, Algorithm 2.
    """

    order = 2

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
        schedule = denoiser.schedule
        x_now = x = denoiser(x_t, t, **cond)
        if history:
            p, x_p = history[-1]
            lambda_p, lambda_t, lambda_s = (half_log_snr(schedule, a) for a in (p, t, s))
            ratio = (lambda_s - lambda_t) / (lambda_t - lambda_p)
            ratio = torch.where(ratio.isfinite(), ratio, 0.0)
            x = x_now + bcast(ratio, x_t) * (x_now - x_p) / 2
        if history is not None:
            history[:] = [(t, x_now)]
        return ddim(schedule, x, x_t, t, s)
