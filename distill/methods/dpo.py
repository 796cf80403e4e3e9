r"""Distillation-DPO (Zhao et al., 2025), https://arxiv.org/abs/2504.11447. Two samples per condition, ranked by a metric:

    critics  min_F |F(x_u) - sg x|^2 in the network's own output: F on all samples, W on winners, L on losers
    derived  d/dx    ((F - D) - p (W - F)) / mean|x - D|          on all samples
    paper    d/dx_w  (W - D) / mean|x_w - D|,    d/dx_l  -(L - D) / mean|x_l - D|

W - F climbs log p_w / p = log 2 C(r), with C the distribution function of the metric r of the student's samples. At p = 0
the derived form is distribution matching: a student equal to its teacher has no gradient. In the paper's form it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.denoise import Guided, network_of
from distill.errors import BadInput, suggest
from distill.losses.matching import matching
from distill.losses.preference import rank
from distill.losses.regression import native_mse
from distill.methods.base import Method
from distill.solvers import Renoise
from distill.times import Uniform

CRITICS = {"derived": ("critic", "winner"), "paper": ("winner", "loser")}


class RankedPairs(NamedTuple):
    """What the turns of a step share: B pairs of samples, all first ones before all second ones."""

    x: Tensor  # (2B, ...)
    a_wins: Tensor  # (B,), whether the first of a pair wins
    t: Tensor  # (2B,), the student's timestep
    cond: dict[str, Any]  # conditions of the 2B samples
    sample: Callable[[], Tensor]  # x again, with gradient


class DistillationDPO(Method):
    """Two critics and the student. A `flow_map` critic is conditioned on the student's timestep.

    Args:
        metric: called `metric(x, data=, **cond) -> (B,)`, higher is better; only ranks.
        form: `derived`, or the published `paper`, which lowers the metric of a student equal to its teacher.
        prefer: p of the derived form, 0.3 if none; 0 ignores the metric.
        spread: of the paper's form: the second sample starts from `spread` times the first one's noise (1.1 in the
            paper); none: from noise of its own.
        student_every: critics' turns for one of the student.
        normalise: of `losses.matching.matching`; "real" divides by mean|x - D| per sample, "none" does not.
        density, base: distribution of u; arguments of Method.

    Raises:
        BadInput: an unknown form, or an option of the other form.
    """

    trainable: tuple[str, ...] = ("critic", "winner", "student")
    sampler, serving = Renoise(), "renoise"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        metric: Any,
        form: str = "derived",
        prefer: float | None = None,
        spread: float | None = None,
        student_every: int = 1,
        normalise: str = "real",
        density: Any = None,
        grid: Any = 1,
        **base,
    ):
        if form not in CRITICS:
            raise BadInput(f"form '{form}' must be derived or paper.{suggest(form, CRITICS)}")
        for name, value, own in (("prefer", prefer, "derived"), ("spread", spread, "paper")):
            if value is not None and form != own:
                raise BadInput(f"{name} is an option of form: {own}; remove it, or set form: {own}.")
        self.trainable = (*CRITICS[form], "student")
        super().__init__(roles, grid=grid, **base)
        self.metric, self.form, self.spread = metric, form, spread
        self.prefer = 0.3 if prefer is None else prefer
        self.student_every, self.normalise, self.density = student_every, normalise, density or Uniform(0.02, 0.98)
        self.schedule, self.guided = self.teacher.schedule, Guided(self.teacher, self.guidance)

    def turns(self, step):
        for role in CRITICS[self.form]:
            yield role, lambda *pairs, role=role: self.critic_loss(role, RankedPairs(*pairs))
        if (step + 1) % self.student_every == 0:
            loss = self.student_loss if self.form == "derived" else self.paper_loss
            yield "student", lambda *pairs: loss(RankedPairs(*pairs))

    def draw(self, x, z, cond):
        z = torch.cat([z, torch.randn_like(z) if self.spread is None else self.spread * z])
        both = {k: torch.cat([v, v]) for k, v in cond.items()}
        student_cond = self.student_conditions(both, len(z))
        x_t, t = self.simulate(z, student_cond)
        with torch.no_grad():
            samples = self.student(x_t, t, **student_cond)
            score_a, score_b = (self.reward_of(half, x, cond) for half in samples.chunk(2))
        self.log_value("student/score", torch.cat([score_a, score_b]).mean())
        return RankedPairs(samples, score_a >= score_b, t, both, lambda: self.student(x_t, t, **student_cond))

    def predict(self, role, x_u, u, pairs):
        """E[x | x_u] (n, ...) of a critic, n = 2B or B, in the order of `pairs`; both samples of a pair share a condition."""
        return getattr(self, role)(x_u, u, **self.critic_conditions(role, pairs, len(u)))

    def critic_conditions(self, role, pairs, n):
        step = {"s": pairs.t[:n]} if network_of(getattr(self, role)).flow_map else {}
        return {k: v[:n] for k, v in pairs.cond.items()} | step

    def noised(self, x):
        u, noise = self.density(len(x), device=x.device, dtype=x.dtype), torch.randn_like(x)
        return self.schedule.add_noise(x, u, noise), u, noise

    def critic_loss(self, role, pairs):
        a, b = pairs.x.chunk(2)
        winners, losers = rank(a, b, pairs.a_wins)
        x = {"critic": pairs.x, "winner": winners, "loser": losers}[role]
        (x_u, u, _), critic = self.noised(x), getattr(self, role)
        return native_mse(critic, x, x_u, u, self.critic_conditions(role, pairs, len(x)))

    def student_loss(self, pairs):
        x = pairs.sample()
        x_u, u, _ = self.noised(x)
        with torch.no_grad():
            real, fake = self.guided(x_u, u, **pairs.cond), self.predict("critic", x_u, u, pairs)
            if self.prefer:
                fake = fake - self.prefer * (self.predict("winner", x_u, u, pairs) - fake)
        return matching(x, fake, real, normalise=self.normalise)

    def paper_loss(self, pairs):
        """Winners towards the teacher, losers away from it, at one u and one noise."""
        a, b = pairs.sample().chunk(2)
        x_w, x_l = rank(a, b, pairs.a_wins)
        _, u, noise = self.noised(x_w)
        loss, cond = x_w.new_zeros(()), {k: v[: len(u)] for k, v in pairs.cond.items()}
        for x, role, sign in ((x_w, "winner", 1.0), (x_l, "loser", -1.0)):
            with torch.no_grad():
                x_u = self.schedule.add_noise(x, u, noise)
                real = self.guided(x_u, u, **cond)
                fake = real + sign * (self.predict(role, x_u, u, pairs) - real)
            loss = loss + matching(x, fake, real, normalise=self.normalise)
        return loss
