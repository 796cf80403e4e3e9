"""Deterministic multistep solvers: one evaluation a step, and the memory of the step before."""

from __future__ import annotations

import torch

from distill.noise import bcast
from distill.solvers.base import Solver, ddim, half_log_snr


class DPMSolverPP2M(Solver):
    r"""DPM-Solver++(2M): a DDIM step with x extrapolated linearly in lambda = log(alpha / sigma),

    x = D_t + (D_t - D_p) h / (2 h_p), h = lambda_s - lambda_t, h_p = lambda_t - lambda_p for the step before from p.

    Order 1 at the first step, and where lambda is infinite: s = 0, or p with alpha_p = 0.
    `history` is a list that holds (t, x) of the step before; it is updated here.
    Lu et al., 2022, https://arxiv.org/abs/2211.01095, Algorithm 2.
    """

    order = 2

    def __call__(self, denoiser, x_t, t, s, *, history=None, noise=None, **cond):
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
