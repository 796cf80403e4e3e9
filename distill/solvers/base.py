"""What a solver is: a pure map (x_t, t, s) -> x_s, with its own t and s for every sample."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.errors import BadInput
from distill.noise import Schedule, bcast, over


class Solver:
    """A step from t down to s <= t. `denoiser.schedule` says under which schedule.

    Attributes:
        order: global order of convergence in the step; weak order if stochastic; 0 if it does not follow the flow.
        evaluations: denoiser evaluations a step.
        stochastic: whether it needs `noise`.
    """

    order: int = 1
    evaluations: int = 1
    stochastic: bool = False

    def __call__(
        self,
        denoiser,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        *,
        history: list | None = None,
        noise: Tensor | None = None,
        **cond,
    ) -> Tensor:
        """x_s (B, ...) from x_t (B, ...) and t, s (B,). Finite at s = 0 and, if alpha_1 = 0, at t = 1.

        Args:
            history: a list that a multistep solver keeps between the steps of one trajectory; empty at its start.
            noise: N(0, I) of the shape of x_t, for a stochastic solver.
            cond: passed to the denoiser.
        """
        raise NotImplementedError

    def _needs(self, noise: Tensor | None) -> Tensor:
        if noise is None:
            raise BadInput(f"{type(self).__name__} is stochastic: pass noise=torch.randn_like(x_t).")
        return noise


def ddim(schedule: Schedule, x: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    r"""x_s = alpha_s x + sigma_s eps with eps = (x_t - alpha_t x) / sigma_t, without dividing by alpha.

    Exactly x_t where s = t and exactly x where s = 0. Song et al., 2021, https://arxiv.org/abs/2010.02502.
    """
    keep, pull = ddim_coefs(schedule, t, s)
    return bcast(keep, x_t) * x_t + bcast(pull, x_t) * x


def ddim_coefs(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma_s / sigma_t, alpha_s - alpha_t sigma_s / sigma_t), each (B,): the weights of x_t and x in a DDIM step."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    keep = torch.where(sigma_t == 0, 1.0, over(sigma_s, sigma_t))
    return keep, alpha_s - alpha_t * keep


def half_log_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """lambda_t = log(alpha_t / sigma_t) (B,), the time of DPM-Solver."""
    return schedule.log_snr(t) / 2
