r"""Diversity-rewarded CFG distillation (Cideron et al., 2024), https://arxiv.org/abs/2410.06084, as a diffusion method.

The paper's model is autoregressive. Here, on the student's own path x_{t_K} = z, ..., x_{t_1} (on policy, no gradient):

    L = sum_k |G(x_{t_k}, t_k, c) - sg D_w(x_{t_k}, t_k, c)|^2 / K  -  b E[1 - cos(E(x), E(x'))]

x, x' are two samples of one condition, differentiated through their last step only, and E any features. Two students,
trained with b = 0 and b > 0, are merged by `losses.diversity.interpolate` when the model is served.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distill.denoise import Guided
from distill.losses.diversity import diversity
from distill.losses.regression import mse
from distill.methods.base import Method
from distill.solvers import DDIM, solve


class DiversityRewarded(Method):
    """Distils the guided teacher into one evaluation per step, with a reward for diversity; needs conditions, no data.

    Args:
        reward: b, weight of the diversity of a pair.
        base: arguments of Method; `guidance` is the teacher's w. `roles.features`, a module x (B, ...) -> (B, d), is
            optional: none compares the samples themselves.
    """

    features: nn.Module
    trainable, frozen = ("student",), ("teacher", "features")
    sampler, serving = DDIM(), "ode"
    needs_data = False

    def __init__(self, roles: dict[str, Any], *, reward: float = 0.0, grid: Any = 8, **base):
        super().__init__({"features": nn.Flatten()} | roles, grid=grid, **base)
        self.reward, self.guided = reward, Guided(self.teacher, self.guidance)

    def turns(self, step):
        yield "student", self.loss

    @torch.no_grad()
    def draw(self, x, z, cond):
        """Two paths a condition, (K + 1, 2B, ...), with the conditions of both."""
        pairs = {k: torch.cat([v, v]) for k, v in cond.items()}
        student_cond, z = self.student_conditions(pairs, 2 * len(z)), torch.cat([z, torch.randn_like(z)])
        x_1 = self.student.schedule.start(z)
        return solve(self.student, x_1, self.grid, self.sampler, trajectory=True, **student_cond), pairs, student_cond

    def loss(self, path, cond, student_cond):
        n, steps = path.shape[1], self.grid.steps
        t = self.grid.tensor(path.device, path.dtype)[:-1].repeat_interleave(n)
        x_t = path[:-1].flatten(0, 1)
        every = lambda c: {k: torch.cat([v] * steps) for k, v in c.items()}  # noqa: E731
        x = self.student(x_t, t, **every(student_cond))
        with torch.no_grad():
            target = self.guided(x_t, t, **every(cond))
        loss = mse(x, target)
        if self.reward:
            a, b = self.features(x[-n:]).chunk(2)  # the last step of the path ends in x itself
            found = diversity(a, b).mean()
            self.log_value("student/diversity", found)
            loss = loss - self.reward * found
        return loss
