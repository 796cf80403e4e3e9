r"""Score identity distillation, SiD (Zhou et al., 2024), https://arxiv.org/abs/2404.04057;
several steps: https://arxiv.org/abs/2505.12674.

    x = G(x_t, t), x_t from the student's own rollout to a time t of its grid;  x_u = alpha_u x + sigma_u noise
    critic   min_F  |F(x_u) - sg x|^2 in the network's own output
    student  <D_w - F, (D_w - x) - a (D_w - F)>(x_u) / mean|x - D_w|,  with gradient through D_w and F into x_u
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided
from distill.losses.identity import identity
from distill.losses.matching import gap
from distill.losses.regression import native_mse
from distill.methods.base import Method
from distill.solvers import Renoise
from distill.times import Uniform


class SiD(Method):
    """Student and critic take turns, data-free.

    Args:
        alpha: a; 1.2 in the paper, 1.0 the safer choice.
        student_every: critic turns for one of the student.
        density: distribution of u; the noisiest fifth is left out as in the paper.
        base: arguments of Method.
    """

    trainable, frozen = ("critic", "student"), ("teacher",)
    sampler, serving = Renoise(), "renoise"
    needs_data = False

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        alpha: float = 1.2,
        student_every: int = 1,
        density: Any = None,
        grid: Any = 1,
        **base,
    ):
        super().__init__(roles, grid=grid, **base)
        self.alpha, self.student_every = alpha, student_every
        self.density, self.guided = density or Uniform(0.02, 0.8), Guided(self.teacher, self.guidance)

    def turns(self, step):
        yield "critic", self.critic_loss
        if (step + 1) % self.student_every == 0:
            yield "student", self.student_loss

    def sampled(self, z, cond):
        """x = G(x_t, t) from fresh inputs, and x_u, u."""
        student_cond = self.student_conditions(cond, len(z))
        x = self.student(*self.simulate(z, student_cond), **student_cond)
        u = self.density(len(x), device=x.device, dtype=x.dtype)
        return x, self.teacher.schedule.add_noise(x, u, torch.randn_like(x)), u

    def critic_loss(self, _, z, cond):
        with torch.no_grad():
            x, x_u, u = self.sampled(z, cond)
        return native_mse(self.critic, x, x_u, u, cond)

    def student_loss(self, _, z, cond):
        x, x_u, u = self.sampled(torch.randn_like(z), cond)  # the critic has seen those of z
        real, fake = self.guided(x_u, u, **cond), self.critic(x_u, u, **cond)
        self.log_value("student/gap", gap(x, fake, real))
        return identity(x, fake, real, self.alpha)
