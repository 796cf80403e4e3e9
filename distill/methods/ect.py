r"""Consistency training: data, no teacher. CT and its improvement (Song et al. 2023, https://arxiv.org/abs/2303.01469;
Song and Dhariwal 2023, https://arxiv.org/abs/2310.14189) and easy consistency tuning of a pretrained diffusion model
(Geng et al. 2024, https://arxiv.org/abs/2406.14548).

At times t > r with one noise z for both, and y = sigma / alpha:

    x_t = alpha_t x + sigma_t z,   x_r = alpha_r x + sigma_r z
    L   = d( G(x_t, t), sg G(x_r, r) ) / (y_t - y_r),   G(x_r, r) = x_r at the smallest time

CT: t and r are neighbours on a grid that doubles (`distill.times.Doubling`). ECT: y_r = y_t (1 - gap), the gap shrinking
from 1, where the objective is diffusion's (`distill.times.Shrinking`). The optimum is the Euler solver's map on the same
pairs of times in the coordinates x_t / alpha_t, as that of distillation with DDIM.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from distill.denoise import Denoiser
from distill.losses.regression import huber_norm, mse
from distill.methods.base import Method
from distill.noise import at_least_float32, bcast
from distill.solvers import Renoise
from distill.tangent import ReplayRNG
from distill.times import Shrinking, TimePairs


class ConsistencyTraining(Method):
    """Student against itself at a smaller time of the same sample and noise.

    Args:
        pairs: distribution of (t, r), an object of `distill.times`: Doubling for CT, Shrinking (the default) for ECT.
        huber: constant of the per-sample pseudo-Huber sqrt(|.|^2 + c^2) - c in units of sqrt(elements): 0 is the plain
            norm of ECT, 0.00054 improved CT's; none is the squared distance of CT.
        weigh: divide by the gap y_t - y_r. Times with alpha_t = 0 then weigh nothing.
        target_ema: decay of the target network; 0 is the student itself without gradient (improved CT and ECT).
        base: arguments of Method.
    """

    target: Denoiser
    frozen, sampler, serving = (), Renoise(), "renoise"
    needs_total_steps = True

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        pairs: TimePairs | None = None,
        huber: float | None = 0.0,
        weigh: bool = True,
        target_ema: float = 0.0,
        **base,
    ):
        super().__init__(roles, averages={"target": ("student", target_ema)}, **base)
        self.pairs, self.huber, self.weigh = pairs or Shrinking(), huber, weigh
        self.schedule = self.student.schedule

    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z, cond):
        step, total = self.schedule_step()
        t, r = self.pairs(len(x), self.schedule, step / max(total, step + 1), x.device, at_least_float32(x).dtype)
        x_t, x_r = self.schedule.add_noise(x, t, z), self.schedule.add_noise(x, r, z)
        rewind = ReplayRNG(x.device)
        with torch.autocast(x.device.type, enabled=False):  # the two differ by less than bfloat16 resolves
            y = self.student(x_t, t, **cond)
            with torch.no_grad(), rewind:
                target = torch.where(bcast(r > self.pairs.floor, x), self.target(x_r, r, **cond), x_r)
        weight = 1 / (self.ratio(t) - self.ratio(r)) if self.weigh else None
        if self.huber is None:
            return mse(y, target, weight)
        return huber_norm(y, target, self.huber * math.sqrt(x[0].numel()), weight)

    def ratio(self, t):
        """y_t = sigma_t / alpha_t, the time of EDM."""
        return torch.exp(-self.schedule.log_snr(t) / 2)
