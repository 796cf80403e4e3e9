r"""Rectified flow on the teacher's pairs (Liu et al., 2022), https://arxiv.org/abs/2209.03003, and its one-step
distillation as in InstaFlow (Liu et al., 2023), https://arxiv.org/abs/2309.06380.

Pairs of noise z and the x to which the guided teacher's ODE takes it; the student's paths between them become straight:

    x = ODE(D_w; z, 1 -> 0),  x_t = alpha_t x + sigma_t z
    L = |(z - x) - u(x_t, t)|^2 = (alpha_t/sigma_t + 1)^2 |x - G(x_t, t)|^2,   u = eps - G

    reflow          t ~ p(t) on (0, 1]
    distillation    t ~ U{t_1, ..., t_K} of the student's grid; K = 1 is knowledge distillation at t = 1

The teacher's x, and never the data's, goes with z: with data this is plain flow matching again.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided
from distill.losses import snr
from distill.losses.regression import mse
from distill.methods.base import Method
from distill.noise import at_least_float32, bcast
from distill.solvers import solve
from distill.solvers import solver as solver_of
from distill.times import Grid, Uniform


class Reflow(Method):
    """Trains on pairs, from batches with `x` and `z`, else solved during training.

    Args:
        solver, solver_steps: the teacher's ODE solver and its uniform steps, where a batch has no `z`.
        only_grid: train at the times of the grid only (distillation), not at all times (reflow).
        density: distribution of t in reflow.
        base: arguments of Method.
    """

    needs_data = False

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        solver: str = "heun",
        solver_steps: int = 16,
        only_grid: bool = False,
        density: Any = None,
        **base,
    ):
        super().__init__(roles, **base)
        self.solver, self.times = solver_of(solver), Grid.uniform(solver_steps).times
        self.only_grid, self.density = only_grid, density or Uniform(1e-3, 1.0)
        self.guided = Guided(self.teacher, self.guidance)

    def turns(self, step):
        yield "student", self.loss

    def draw(self, x, z, cond):
        return x if self.paired else self.endpoint(z, cond), z, cond

    @torch.no_grad()
    def endpoint(self, z, cond):
        """x (B, ...) where the teacher's ODE takes the noise z."""
        return solve(self.guided, self.start_of(z), self.times, self.solver, **cond)

    path_times = (0.0, 1.0)

    def path(self, z, cond):
        """What `distill data pairs` stores: x and z, (B, 2, ...)."""
        x = self.endpoint(z, cond)
        return torch.stack([x, z.to(x)], 1)

    def start_of(self, z):
        """sigma_1 z: where sampling starts, without the trace of data that alpha_1 > 0 would leave."""
        return (
            bcast(self.teacher.schedule.sigma(torch.ones(len(z), device=z.device, dtype=at_least_float32(z).dtype)), z)
            * z
        )

    def loss(self, x, z, cond):
        n, schedule = len(z), self.teacher.schedule
        if self.only_grid:
            t, _ = self.grid.segment(self.grid.draw(n, device=z.device), at_least_float32(z).dtype)
        else:
            t = self.density(n, device=z.device, dtype=at_least_float32(z).dtype)
        x_t = torch.where(bcast(t == 1, z), self.start_of(z), schedule.add_noise(x, t, z))
        weight = snr.weight("flow", schedule.log_snr(t))
        return mse(self.student(x_t, t, **self.student_conditions(cond, n)), x, weight)
