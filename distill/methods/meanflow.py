r"""MeanFlow (Geng et al., 2025), https://arxiv.org/abs/2505.13447: training from data, or distillation of a teacher.

The student learns the average velocity between any two times, in the coordinates y, r of straight paths (for rectified flow,
y = x and r = t):

    t, s ~ two draws of p, the larger is t;  s = t for a share of the batch
    v = z - x   or the guided teacher's velocity at x_t
    L = |u(x_t, t, s) - sg(v - (r_t - r_s) du/dr)|^2 / sg(|.|^2 + c)^p

with du/dr the derivative along (dx_t/dr = v's path, dt/dr, ds/dr = 0) by one Jacobian-vector product.
Sampling: y_s = y_t - (r_t - r_s) u(x_t, t, s).
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided, network_of
from distill.errors import BadInput
from distill.losses.flowmap import adaptive_loss, average_velocity, guided_velocity
from distill.methods.base import Method
from distill.noise import at_least_float32, bcast
from distill.solvers.flowmap import FlowMap, path_tangent, predicted_flow, straight_time
from distill.tangent import Derivative, ReplayRNG
from distill.times import LogitNormal


class MeanFlow(Method):
    """A flow map; with `roles.teacher` it is distilled, without one it is trained from data.

    Args:
        density: distribution of both times.
        same: share of the batch with s = t, where the loss is flow matching; none: 0 with a teacher, which a student with
            its weights already equals there, and 0.75 from data.
        kappa: without a teacher, the current network's share in the guided target, in [0, 1).
        guide_until: without a teacher, guidance is in the target for t up to here.
        drop_label: without a teacher, the share of samples that lose their label; they have s = t and no guidance.
        power, c: of the adaptive weight.
        jvp, jvp_step: `forward` mode, or `difference` over t - jvp_step to t + jvp_step, see `tangent.Derivative`; none:
            `difference` over 0.02 for networks with integer timesteps, `forward` for others.
        base: arguments of Method; `guidance` is w in the target, so samples cost one evaluation a step.

    Raises:
        BadInput: if the student's network takes no s.
    """

    trainable: tuple[str, ...] = ("student",)
    frozen: tuple[str, ...] = ("teacher",)
    sampler = FlowMap()

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        density: Any = None,
        same: float | None = None,
        kappa: float = 0.0,
        guide_until: float = 1.0,
        drop_label: float = 0.1,
        power: float = 1.0,
        c: float = 0.01,
        jvp: str | None = None,
        jvp_step: float | None = None,
        **base,
    ):
        if "teacher" not in roles:
            self.frozen = ()
        super().__init__(roles, **base)
        if not network_of(self.student).flow_map:
            raise BadInput("roles.student: a flow map needs a network with an input s; set flow_map: true.")
        self.density, self.kappa = density or LogitNormal(-0.4, 1.0), kappa
        self.same = (0.0 if self.frozen else 0.75) if same is None else same
        self.guide_until, self.drop_label = guide_until, drop_label if not self.frozen else 0.0
        self.power, self.c = power, c
        self.derivative = Derivative.choose(jvp, jvp_step, self.student, smooth=0.02)
        self.jvp = self.derivative.method
        self.guided = Guided(self.teacher, self.guidance) if self.frozen else None

    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z, cond):
        t, s = self.times(x)
        dropped = torch.arange(len(x), device=x.device) < (torch.rand_like(t) < self.drop_label).sum()
        cond = self.student.drop(cond, dropped) if self.drop_label else cond
        schedule, student_cond = self.student.schedule, self.student_conditions(cond, len(x))
        x_t = schedule.add_noise(x, t, z)
        with torch.no_grad():
            v = self.velocity(z - x, x_t, t, cond, dropped)
            dx, dt = path_tangent(schedule, v, x_t, t)
        u_of = lambda x_t, t, s: predicted_flow(self.student, x_t, t, s=s, **student_cond)
        rewind = ReplayRNG(x.device)
        u = u_of(x_t, t, s)
        with rewind:
            low = torch.maximum(s, t / 2)
            du_dr = self.derivative(u_of, (x_t, t, s), (dx, dt, torch.zeros_like(s)), low)
        gap = straight_time(schedule, t) - straight_time(schedule, s)
        return adaptive_loss(u, average_velocity(v, du_dr, gap), self.power, self.c)

    def times(self, x):
        """t >= s, each (B,); equal in the first share of the batch."""
        n = len(x)
        a, b = (self.density(n, device=x.device, dtype=at_least_float32(x).dtype) for _ in range(2))
        t = torch.maximum(a, b)
        return t, torch.where(torch.arange(n, device=x.device) < self.same * n, t, torch.minimum(a, b))

    def velocity(self, v, x_t, t, cond, dropped):
        """The teacher's guided velocity at x_t, or that of the pair, z - x, with guidance by the student itself."""
        if self.guided is not None:
            return predicted_flow(self.guided, x_t, t, **cond)
        if not cond or (self.guidance == 1 and self.kappa == 0):
            return v
        training, null = self.student.training, self.student.null(cond)
        self.student.eval()
        u_null, u_cond = (
            predicted_flow(self.student, x_t, t, s=t, **self.student_conditions(c, len(t))) for c in (null, cond)
        )
        self.student.train(training)
        plain = dropped | (t > self.guide_until)
        return torch.where(bcast(plain, v), v, guided_velocity(v, u_null, u_cond, self.guidance, self.kappa))
