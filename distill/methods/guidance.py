r"""Guidance distillation, stage one (Meng et al., 2022), https://arxiv.org/abs/2210.03142.

One network learns every strength of classifier-free guidance, so that a guided step costs one evaluation:

    w ~ U[w_min, w_max],  t ~ p(t),  x_t = alpha_t x + sigma_t z
    L = max(SNR_t, 1) |G(x_t, t, w, c) - (D(x_t, t) + w (D(x_t, t, c) - D(x_t, t)))|^2

w = 1 is the conditional model; the paper's w is ours minus 1. Stage two, fewer steps, is `Progressive` with this
student as its teacher.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided, network_of
from distill.errors import BadInput
from distill.losses import snr
from distill.losses.regression import mse
from distill.methods.base import Method
from distill.noise import at_least_float32
from distill.solvers import solver
from distill.times import Uniform


class Guidance(Method):
    """The guided teacher at every w in one network with an input w.

    Args:
        guidance_range: [w_min, w_max]; `guidance` is the w of validation and samples.
        density: distribution of t; any object of `distill.times` with `density(n, device=...)`.
        sampler: `ddim`, or `overshoot`, the paper's stochastic sampler.
        base: arguments of Method; `grid` is what validation samples with.

    Raises:
        BadInput: if the student's network has no input w, or the range is empty.
    """

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        guidance_range: list[float] | tuple[float, float] = (1.0, 5.0),
        density: Any = None,
        sampler: str = "ddim",
        **base,
    ):
        super().__init__(roles, **base)
        if not network_of(self.student).guided:
            raise BadInput("roles.student: guidance distillation needs a network with an input w; set guided: true.")
        low, high = guidance_range
        if low > high:
            raise BadInput(f"method.guidance_range: [{low}, {high}] is empty; give [low, high].")
        self.strength, self.density = Uniform(low, high), density or Uniform()
        self.sampler = solver(sampler)
        self.serving = "overshoot" if self.sampler.stochastic else "ode"
        self.guided = Guided(self.teacher)

    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z, cond):
        schedule, n = self.teacher.schedule, len(x)
        t = self.density(n, device=x.device, dtype=at_least_float32(x).dtype)
        w = self.strength.draw(n, device=x.device, dtype=t.dtype)
        x_t = schedule.add_noise(x, t, z)
        with torch.no_grad():
            target = self.guided(x_t, t, w=w, **cond)
        weight = snr.weight("snr", schedule.log_snr(t))
        return mse(self.student(x_t, t, w=w, **cond), target, weight)
