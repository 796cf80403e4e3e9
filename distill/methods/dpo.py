r"""Distillation-DPO (Zhao et al., 2025), https://arxiv.org/abs/2504.11447. Two samples a condition, ranked by a metric:

    winner  min_W |W(x_w,u) - sg x_w|^2;   loser  min_L |L(x_l,u) - sg x_l|^2      (critics, in the network's chart)
    student d/dx_w  (W - D - p (W - L)) / mean|x_w - D|;   d/dx_l  (l (L - D) - p (W - L)) / mean|x_l - D|

l = -1, p = 0 is the paper. p > 0 climbs log p_w/p_l, an increasing function of the reward's rank, and then l = 1 keeps
all samples near the teacher (derived; see the docs).
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided
from distill.losses.matching import matching
from distill.losses.preference import rank
from distill.losses.regression import mse
from distill.methods.base import Method
from distill.solvers import Renoise
from distill.times import Uniform


class DistillationDPO(Method):
    """A critic for winners, one for losers, and the student.

    Args:
        metric: called `metric(x, data=, **cond) -> (B,)`, higher is better; only ranks.
        loser: l, weight of the losers' pull towards the teacher; -1 pushes them off it.
        prefer: p, weight of the pull from losers to winners.
        spread: the second sample starts from `spread` times the first one's noise (1.1 in the paper); none: its own.
        student_every: critics' turns for one of the student.
        density, base: law of u; arguments of Method.
    """

    trainable, frozen = ("winner", "loser", "student"), ("teacher",)
    sampler, serving = Renoise(), "renoise"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        metric: Any,
        loser: float = -1.0,
        prefer: float = 0.0,
        spread: float | None = None,
        student_every: int = 1,
        density: Any = None,
        grid: Any = 1,
        **base,
    ):
        super().__init__(roles, grid=grid, **base)
        self.metric, self.sign, self.prefer, self.spread = metric, loser, prefer, spread
        self.student_every, self.density = student_every, density or Uniform(0.02, 0.98)
        self.schedule, self.guided = self.teacher.schedule, Guided(self.teacher, self.guidance)

    def turns(self, step):
        yield "winner", lambda pair, cond, _: self.critic_loss(self.winner, pair[0], cond)
        yield "loser", lambda pair, cond, _: self.critic_loss(self.loser, pair[1], cond)
        if (step + 1) % self.student_every == 0:
            yield "student", self.student_loss

    def draw(self, x, z, cond):
        z = torch.cat([z, torch.randn_like(z) if self.spread is None else self.spread * z])
        both = {k: torch.cat([v, v]) for k, v in cond.items()}
        student_cond = self.student_conditions(both, len(z))
        x_t, t = self.simulate(z, student_cond)
        with torch.no_grad():
            a, b = self.student(x_t, t, **student_cond).chunk(2)
            a_wins = self.reward_of(a, x, cond) >= self.reward_of(b, x, cond)
        return rank(a, b, a_wins), cond, lambda: rank(*self.student(x_t, t, **student_cond).chunk(2), a_wins)

    def critic_loss(self, critic, x, cond):
        u = self.density(len(x), device=x.device, dtype=x.dtype)
        x_u = self.schedule.add_noise(x, u, torch.randn_like(x))
        return mse(critic.native(x_u, u, **cond), critic.from_x(x, x_u, u))

    def student_loss(self, _, cond, sample):
        x_w, x_l = sample()
        u, noise = self.density(len(x_w), device=x_w.device, dtype=x_w.dtype), torch.randn_like(x_w)
        return self.pull(x_w, self.winner, u, noise, cond, 1.0) + self.pull(x_l, self.loser, u, noise, cond, self.sign)

    def pull(self, x, critic, u, noise, cond, weight):
        """Matching with the gradient (weight (F - D) - p (W - L)) / mean|x - D|, F the sample's own critic."""
        with torch.no_grad():
            x_u = self.schedule.add_noise(x, u, noise)
            real = self.guided(x_u, u, **cond)
            fake = real + weight * (critic(x_u, u, **cond) - real)
            if self.prefer:
                fake = fake - self.prefer * (self.winner(x_u, u, **cond) - self.loser(x_u, u, **cond))
        return matching(x, fake, real)
