r"""Diffusion-DPO (Wallace et al., 2023), https://arxiv.org/abs/2311.12908.

    L = -log sigmoid(-beta [(e_w - e_w^ref) - (e_l - e_l^ref)]),   e = mean |N(x_t, t) - n(x, x_t, t)|^2

with N the student's network and the unguided teacher as the reference, at one t and one noise for winner and loser.
`guidance` shapes the pairs alone.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided, network_of
from distill.errors import BadInput
from distill.losses.preference import dpo, rank
from distill.losses.regression import mse
from distill.methods.base import Method
from distill.solvers import DDIM, solve
from distill.times import Grid, Uniform


class DiffusionDPO(Method):
    """Finetune on pairs: a batch's `x` over its `loser`, or two samples of the teacher ranked by a metric.

    Args:
        metric: called `metric(x, data=, **cond) -> (B,)`, higher is better; none if batches have `loser`.
        beta: strength of the tie to the teacher, for errors averaged over elements.
        pair_steps: DDIM steps that make a pair.
        density, base: distribution of t; arguments of Method.
    """

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        metric: Any = None,
        beta: float = 1000.0,
        pair_steps: int = 8,
        density: Any = None,
        grid: Any = 50,
        **base,
    ):
        super().__init__(roles, grid=grid, **base)
        self.metric, self.beta, self.pair_steps = metric, beta, pair_steps
        self.density, self.guided = density or Uniform(1e-3, 1.0), Guided(self.teacher, self.guidance)
        self.reference = self.guided if network_of(self.teacher).guided else self.teacher

    def turns(self, step):
        yield "student", self.loss

    @torch.no_grad()
    def draw(self, x, z, cond):
        if "loser" in cond:
            return x, cond["loser"], {k: v for k, v in cond.items() if k != "loser"}
        if self.metric is None:
            raise BadInput("DiffusionDPO needs pairs: give method.metric, or data whose batches have the key 'loser'.")
        times = Grid.uniform(self.pair_steps)
        starts = (self.teacher.schedule.start(noise) for noise in (z, torch.randn_like(z)))
        a, b = (solve(self.guided, start, times, DDIM(), **cond) for start in starts)
        return *rank(a, b, self.reward_of(a, x, cond) >= self.reward_of(b, x, cond)), cond

    def loss(self, winner, loser, cond):
        t, noise = self.density(len(winner), device=winner.device, dtype=winner.dtype), torch.randn_like(winner)
        (w, ref_w), (l, ref_l) = (self.errors(x, t, noise, cond) for x in (winner, loser))
        return dpo(w, l, ref_w, ref_l, self.beta)

    def errors(self, x, t, noise, cond):
        """Squared errors (B,) of student and teacher at one noise, in the student's own output."""
        x_t = self.student.schedule.add_noise(x, t, noise)
        target = self.student.from_x(x, x_t, t)
        native = self.student.native(x_t, t, **self.student_conditions(cond, len(x)))
        with torch.no_grad():
            ref = self.student.from_x(self.reference(x_t, t, **cond), x_t, t)
        return mse(native, target, per_sample=True), mse(ref, target, per_sample=True)
