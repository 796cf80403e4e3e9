r"""Align Your Flow (Sabour, Fidler and Kreis, 2025), https://arxiv.org/abs/2506.14603, its Eulerian map distillation.

The student's jump f(x_t, t, s) must not change while (x_t, t) moves along the teacher's flow. With F its average
velocity in the coordinates y, r of straight paths (for rectified flow y = x and r = t), f = y_t - (r_t - r_s) F:

    d ~ p,  s ~ U[0, 1 - d],  t = s + d
    v = the teacher's velocity at x_t, guided by w ~ U[low, high], or by a weaker model: v_weak + w (v - v_weak)
    g = (v - F) - rho (r_t - r_s) dF/dr,     dF/dr along (v, dt/dr, ds/dr = 0)
    L = |F - sg(F + g / (|g| + c))|^2

rho increases from 0 to rho_max < 1, so that a share 1 - rho_max of the regression of F on v remains. s = 0 is a continuous-time
consistency model, s = t flow matching.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Denoiser, Guided, network_of
from distill.errors import BadInput
from distill.losses.flowmap import average_velocity, normalised_direction_loss
from distill.methods.base import Method
from distill.noise import at_least_float32, bcast
from distill.solvers.flowmap import FlowMap, path_tangent, predicted_flow, straight_time
from distill.tangent import Derivative, ReplayRNG
from distill.times import LogitNormal, Uniform


class AYF(Method):
    """A flow map from a teacher.

    Args:
        distance: distribution of t - s.
        share_max, share_steps: rho_max and the steps in which it is reached.
        guidance_range: draw w per sample from [low, high], for a student with an input w, instead of `guidance`.
        gamma: noise of the sampler, see `FlowMap`.
        c: where the step's length saturates.
        jvp, jvp_step: `forward` mode, or `difference` over t - jvp_step to t + jvp_step, see `tangent.Derivative`; none:
            `difference` over 0.02 for networks with integer timesteps, `forward` for others.
        base: arguments of Method. With `roles.weak`, an under-trained teacher, w is the strength of autoguidance.

    Raises:
        BadInput: if the student's network takes no s, or w is drawn for a student without it.
    """

    trainable: tuple[str, ...] = ("student",)
    weak: Denoiser
    frozen: tuple[str, ...] = ("teacher", "weak")

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        distance: Any = None,
        share_max: float = 0.99,
        share_steps: int = 1000,
        guidance_range: list[float] | None = None,
        gamma: float = 0.0,
        c: float = 0.1,
        jvp: str | None = None,
        jvp_step: float | None = None,
        **base,
    ):
        if "weak" not in roles:
            self.frozen = ("teacher",)
        super().__init__(roles, **base)
        net = network_of(self.student)
        self.takes_w = net.guided
        if not net.flow_map:
            raise BadInput("roles.student: a flow map needs a network with an input s; set flow_map: true.")
        if guidance_range is not None and not self.takes_w:
            raise BadInput("method.guidance_range: the student has no guidance input; set guided: true.")
        self.distance, self.share_max, self.share_steps = distance or LogitNormal(-0.6, 1.6), share_max, share_steps
        self.strength = None if guidance_range is None else Uniform(*guidance_range)
        self.share, self.c = 0.0, c
        self.derivative = Derivative.choose(jvp, jvp_step, self.student, smooth=0.02)
        self.jvp = self.derivative.method
        self.sampler, self.serving = FlowMap(gamma), "overshoot" if gamma else "ode"
        self.guided = Guided(self.teacher, self.guidance)

    def turns(self, step):
        self.share = self.share_max * min(1.0, step / max(self.share_steps, 1))
        yield "student", self.loss

    def loss(self, x, z, cond):
        schedule, n = self.teacher.schedule, len(x)
        d = self.distance(n, device=x.device, dtype=at_least_float32(x).dtype)
        s = (1 - d) * torch.rand_like(d)
        t = s + d
        w = self.guidance if self.strength is None else self.strength.draw(n, device=x.device, dtype=t.dtype)
        student_cond = cond | ({"w": torch.as_tensor(w).to(t).expand(n)} if self.takes_w else {})
        x_t = schedule.add_noise(x, t, z)
        rewind = ReplayRNG(x.device)
        u_of = lambda x_t, t, s: predicted_flow(self.student, x_t, t, s=s, **student_cond)
        u = u_of(x_t, t, s)
        with torch.no_grad():
            v = self.velocity(x_t, t, w, cond)
            dx, dt = path_tangent(schedule, v, x_t, t)
            with rewind:
                low = torch.maximum(s, t / 2)
                du_dr = self.derivative(u_of, (x_t, t, s), (dx, dt, torch.zeros_like(s)), low)
        gap = straight_time(schedule, t) - straight_time(schedule, s)
        return normalised_direction_loss(u, average_velocity(v, du_dr, gap, self.share), self.c)

    def velocity(self, x_t, t, w, cond):
        """The teacher's velocity at x_t, with guidance or autoguidance of strength w."""
        if "weak" not in self.frozen:
            return predicted_flow(self.guided, x_t, t, w=w, **cond)
        weak, strong = (predicted_flow(model, x_t, t, **cond) for model in (self.weak, self.teacher))
        return weak + (bcast(w, weak) if torch.is_tensor(w) else w) * (strong - weak)
