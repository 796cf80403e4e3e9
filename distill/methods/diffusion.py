r"""Diffusion and flow matching: train a teacher.

    L = E |N(x_t, t) - n(x, x_t, t)|^2,   x_t = alpha_t x + sigma_t z

with N the network's native output (eps, x, v, flow or EDM) and n its target in that parametrisation, so that each
parameterisation trains under the weighting it is known by. Ho et al. 2020, https://arxiv.org/abs/2006.11239; Lipman et al. 2023,
https://arxiv.org/abs/2210.02747; Karras et al. 2022, https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.losses.regression import native_mse
from distill.methods.base import Method
from distill.times import Uniform


class Diffusion(Method):
    """A denoiser from data.

    Args:
        density: distribution of t; any object of `distill.times` with `density(n, device=...)`.
        drop_label: share of samples that lose their label, so that guidance has an unconditional model.
        base: arguments of Method; `grid` is what validation samples with.
    """

    trainable, frozen = ("student",), ()

    def __init__(self, roles: dict[str, Any], *, density: Any = None, drop_label: float = 0.1, grid: Any = 50, **base):
        super().__init__(roles, grid=grid, **base)
        self.density = density or Uniform(1e-3, 1.0)
        self.drop_label = drop_label

    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z, cond):
        t = self.density(len(x), device=x.device)
        if self.drop_label and cond:
            cond = self.student.drop(cond, torch.rand_like(t) < self.drop_label)
        x_t = self.student.schedule.add_noise(x, t, z)
        return native_mse(self.student, x, x_t, t, cond)
