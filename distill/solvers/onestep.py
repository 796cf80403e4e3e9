"""Deterministic one-step solvers of the probability-flow ODE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.noise import Schedule, bcast, safe_divide
from distill.solvers.base import History, Solver, ddim, ddim_coefs, half_log_snr


class DDIM(Solver):
    r"""x_s = alpha_s x + sigma_s eps with x = D(x_t) and eps = (x_t - alpha_t x) / sigma_t.

    Equal to Euler's method for the velocity of rectified flow, to Euler's method in sigma of EDM, and to DPM-Solver-1.
    Song et al., 2021, https://arxiv.org/abs/2010.02502.

    Examples:
        >>> from distill.denoise import Gaussian
        >>> from distill.noise import RectifiedFlow
        >>> denoiser = Gaussian([1.0], 0.5, RectifiedFlow())
        >>> x_t, t, s = torch.zeros(1, 1), torch.tensor([1.0]), torch.tensor([0.5])
        >>> DDIM()(denoiser, x_t, t, s)  # 0.5 x + 0.5 eps with x = 1 and eps = 0
        tensor([[0.5000]])
    """

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
        return self.step(denoiser.schedule, denoiser(x_t, t, **cond), x_t, t, s)

    def step(self, schedule: Schedule, x: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s = alpha_s x + sigma_s (x_t - alpha_t x) / sigma_t for given x (B, ...)."""
        return ddim(schedule, x, x_t, t, s)

    def invert(self, schedule: Schedule, x_s: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The x (B, ...) whose step from x_t arrives at x_s; 0 where s = t, and ill-conditioned for s close to t.

        The target of progressive distillation, Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512.
        """
        a, b = ddim_coefs(schedule, t, s)
        return safe_divide(x_s - bcast(a, x_t) * x_t, bcast(b, x_t))


class Euler(Solver):
    """x_s = x_t + (s - t) v_t with v_t = dx/dt; the result depends on the schedule's parametrisation of time."""

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
        v_t = denoiser.schedule.velocity(denoiser(x_t, t, **cond), x_t, t)
        return x_t + bcast(s - t, x_t) * v_t


class Heun(Solver):
    r"""The trapezoidal rule in coordinates y = x_t / c_t, r = sigma_t / c_t, in which DDIM is Euler's method.

    y_s = y_t + (r_s - r_t) (d_t + d_s) / 2, d = dy/dr, with d_s evaluated after a DDIM step; a DDIM step where s = 0.

    chart "edm":  c = alpha,          d = eps      (Karras et al., 2022, https://arxiv.org/abs/2206.00364)
    chart "flow": c = alpha + sigma,  d = eps - x  (finite at alpha = 0)

    Args:
        chart: "edm" or "flow"; None chooses "flow" if alpha_1 = 0 and "edm" otherwise.

    Raises:
        BadInput: for another chart.
    """

    order, evaluations = 2, 2

    def __init__(self, chart: str | None = None):
        if chart not in (None, "edm", "flow"):
            raise BadInput(f"Heun: chart must be edm or flow, got '{chart}'.")
        self.chart = chart

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
        b = float(self.chart == "flow" if self.chart else schedule.zero_terminal_snr)
        x = denoiser(x_t, t, **cond)
        x_s = ddim(schedule, x, x_t, t, s)
        last = s == 0
        u = torch.where(last, t, s)  # a time > 0, where eps is defined; the value is not used
        x_u = torch.where(bcast(last, x_t), x_t, x_s)
        x_next = denoiser(x_u, u, **cond)
        d_t = schedule.eps(x, x_t, t) - b * x
        d_s = schedule.eps(x_next, x_u, u) - b * x_next
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        c_t, c_s = alpha_t + b * sigma_t, alpha_s + b * sigma_s
        gain = torch.where(last, 0.0, sigma_s - sigma_t * c_s / c_t)  # c_s (r_s - r_t)
        return x_s + bcast(gain, x_t) * (d_s - d_t) / 2


class DPMSolverPP(Solver):
    r"""Single-step DPM-Solver++ of order 1 (= DDIM) or 2 (2S, midpoint in lambda = log(alpha / sigma)).

    x_u by DDIM to lambda_u = (lambda_t + lambda_s) / 2, then x_s by DDIM from x_t with x = D(x_u, u).
    Order 1 in steps with an infinite lambda: s = 0, or t with alpha_t = 0.
    Lu et al., 2022, https://arxiv.org/abs/2211.01095, Algorithm 1 with r = 1/2.
    """

    def __init__(self, order: int = 2):
        if order not in (1, 2):
            raise BadInput(f"DPMSolverPP: order must be 1 or 2, got {order}.")
        self.order = self.evaluations = order

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
        x = denoiser(x_t, t, **cond)
        if self.order == 2:
            lambda_u = (half_log_snr(schedule, t) + half_log_snr(schedule, s)) / 2
            finite = lambda_u.isfinite()
            u = torch.where(finite, schedule.time(torch.where(finite, 2 * lambda_u, 0.0)), t)
            x_u = ddim(schedule, x, x_t, t, u)  # x_t where u = t
            x = denoiser(x_u, u, **cond)
        return ddim(schedule, x, x_t, t, s)
