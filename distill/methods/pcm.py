r"""Phased consistency (Wang et al. 2024, https://arxiv.org/abs/2405.18407), without its adversarial term.

The segments of the student's grid are the phases; each is cut into n equal intervals. In the phase that ends at the
edge e, for t > s >= e, neighbours of the fine grid, with f(x_t, t) = ddim(G(x_t, t), x_t: t -> e):

    x_s = one step of the guided teacher's ODE from (x_t, t) to s
    L   = d( f(x_t, t), sg f_target(x_s, s) ),   f_target = x_s where s = e

t chooses the edge, for the target too. The optimum of a phase is the n-step solver's map to its edge, so the sampler,
DDIM from edge to edge, is deterministic and has the same samples at every number of phases, up to the solver's error.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided
from distill.errors import BadInput
from distill.losses.regression import huber as huber_of
from distill.losses.regression import mse
from distill.methods.base import Method
from distill.noise import at_least_float32, bcast
from distill.solvers import ddim
from distill.solvers import solver as solver_of
from distill.tangent import ReplayRNG


class PCM(Method):
    """Consistency within the phases of the student's own grid.

    Args:
        intervals: n, the teacher's steps in a phase.
        solver: the teacher's ODE step, by name.
        target_ema: decay of the target network; 0 is the student itself without gradient.
        huber: constant of the per-element pseudo-Huber; none for the squared distance.
        guidance_range: draw w per sample from [low, high] instead of the fixed `guidance`; a student whose network
            has a guidance input gets w. With guidance 1 and no range the student can be guided when it samples.
        base: arguments of Method; `grid` gives the phases.

    Raises:
        BadInput: if intervals is below 1.
    """

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        intervals: int = 12,
        solver: str = "ddim",
        target_ema: float = 0.0,
        huber: float | None = 1e-3,
        guidance_range: list[float] | None = None,
        **base,
    ):
        super().__init__(roles, averages={"target": ("student", target_ema)}, **base)
        if intervals < 1:
            raise BadInput(f"method.intervals: {intervals} teacher steps in a phase; give 1 or more.")
        self.intervals, self.huber, self.guidance_range = intervals, huber, guidance_range
        self.solver, self.schedule = solver_of(solver), self.student.schedule
        self.guided = Guided(self.teacher, self.guidance)

    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z, cond):
        t, s, edge, last = self.times(x)
        w, student_cond = self.draw_guidance(x, cond, self.guidance_range)
        x_t = self.schedule.add_noise(x, t, z)
        rewind = ReplayRNG(x.device)
        f = to_edge(self.student, x_t, t, edge, student_cond)
        with torch.no_grad():
            x_s = self.solver(self.guided, x_t, t, s, w=w, **cond)
            with rewind:
                ahead = to_edge(self.target, x_s, s, edge, student_cond)
            target = torch.where(bcast(last, x_s), x_s, ahead)
        return mse(f, target) if self.huber is None else huber_of(f, target, self.huber)

    def times(self, x):
        """t, s and the edge of t's phase, each (B,), and whether s is that edge."""
        top, edge = self.grid.segment(self.grid.draw(len(x)).to(x.device), dtype=at_least_float32(x).dtype)
        i = torch.randint(1, self.intervals + 1, (len(x),), device=x.device)
        t, s = (edge + j / self.intervals * (top - edge) for j in (i, i - 1))
        return t, s, edge, i == 1


def to_edge(student, x_t, t, edge, student_cond):
    """f(x_t, t), the student's one jump to the edge of its phase."""
    return ddim(student.schedule, student(x_t, t, **student_cond), x_t, t, edge)
