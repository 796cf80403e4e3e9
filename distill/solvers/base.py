"""The solver interface, and the DDIM step that most solvers are built on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.noise import Schedule, bcast, safe_divide

History = list[tuple[Tensor, Tensor]]  # (t, x) of earlier steps


class Solver:
    """One step (x_t, t) -> x_s for s <= t under the schedule of the denoiser; every sample has its own t and s.

    Attributes:
        order: global order of convergence (weak order if stochastic); 0 if the solver does not converge to the flow.
        evaluations: denoiser evaluations per step.
        stochastic: whether `noise` is required.
    """

    order: int = 1
    evaluations: int = 1
    stochastic: bool = False

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
        """x_s (B, ...) from x_t (B, ...) and t, s (B,). Finite at s = 0 and, if alpha_1 = 0, at t = 1.

        Args:
            denoiser: a Denoiser.
            x_t: the state (B, ...) at t.
            t, s: times (B,) in [0, 1], s <= t.
            history: (t, x) of earlier steps of the trajectory, empty at its start; multistep solvers update it in place.
            noise: N(0, I) of the shape of x_t; required by stochastic solvers.
            cond: conditions, passed to the denoiser.

        Raises:
            BadInput: if the solver is stochastic and `noise` is missing.
        """
        raise NotImplementedError

    def _require(self, noise: Tensor | None) -> Tensor:
        if noise is None:
            raise BadInput(f"{type(self).__name__} is stochastic: pass noise=torch.randn_like(x_t).")
        return noise


def ddim(schedule: Schedule, x: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    r"""x_s = alpha_s x + sigma_s eps with eps = (x_t - alpha_t x) / sigma_t, without dividing by alpha.

    Exactly x_t where s = t and exactly x where s = 0. Song et al., 2021, https://arxiv.org/abs/2010.02502.
    """
    a, b = ddim_coefs(schedule, t, s)
    return bcast(a, x_t) * x_t + bcast(b, x_t) * x


def ddim_coefs(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (a, b), each (B,), of x_s = a x_t + b x: a = sigma_s / sigma_t, b = alpha_s - a alpha_t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    a = torch.where(sigma_t == 0, 1.0, safe_divide(sigma_s, sigma_t))
    return a, alpha_s - alpha_t * a


def half_log_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """lambda_t = log(alpha_t / sigma_t) (B,), the time of DPM-Solver."""
    return schedule.log_snr(t) / 2
