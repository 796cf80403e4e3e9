r"""sCM: consistency in continuous time (Lu and Song 2024, https://arxiv.org/abs/2410.11081), under TrigFlow's schedule:

    x_theta = cos(theta) x + sin(theta) z,   f = cos(theta) x_theta - sin(theta) sd F,   theta in [0, pi/2]

    dx/dtheta = sd F_teacher (distillation)  or  cos(theta) z - sin(theta) x (training, without a teacher)
    g = -cos^2 (sd F - dx/dtheta) - r (cos sin x_theta + sd JVP_F(cos sin dx/dtheta, cos sin))
    L = e^-u(theta) / (sd tan theta) |F - sg F - g / (|g| + c)|^2 + u(theta)

with r the tangents' warm-up and u a learned weight. At the optimum, the exact flow map, g = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from distill.denoise import Guided
from distill.errors import BadInput
from distill.losses.continuous import normalised_tangent, tangent, tangent_loss, uncertainty_weighted
from distill.methods.base import Method
from distill.models.small import ScalarEmbedding
from distill.noise import TrigFlow, at_least_float32, bcast
from distill.solvers import Renoise
from distill.tangent import Derivative, ReplayRNG
from distill.times import LogNormalSigma


class SCM(Method):
    """Distillation with a teacher among the roles (sCD), training on data without one (sCT).

    The student may have any schedule and prediction. Its loss does not show progress; `tangent`, the norm of g, does.

    Args:
        sigma_data: sd, the data's standard deviation.
        mean, std: normal distribution of log(sd tan theta), that is of log(sigma / alpha).
        warm_up: steps in which r rises from 0, the teacher's velocity as optimum, to 1.
        c: constant of the tangent's normalisation; none leaves it as it is.
        jvp, jvp_step: `forward` mode, or `difference` over t - jvp_step to t + jvp_step with t = 2 theta / pi, see
            `tangent.Derivative`; none: `difference` over 0.04 for networks with integer timesteps, `forward` for others.
        base: arguments of Method.

    Raises:
        BadInput: a student that predicts x, which nothing makes the identity at t = 0; in the first step, a network
            without forward-mode derivative if jvp is "forward".
    """

    trainable: tuple[str, ...] = ("student", "balance")
    balance: nn.Module
    frozen: tuple[str, ...] = ("teacher",)
    sampler, serving = Renoise(), "renoise"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        sigma_data: float = 1.0,
        mean: float = -1.0,
        std: float = 1.4,
        warm_up: int = 10_000,
        c: float | None = 0.1,
        jvp: str | None = None,
        jvp_step: float | None = None,
        **base,
    ):
        if "teacher" not in roles:
            self.frozen = ()
        super().__init__(roles, **base)
        if self.student.prediction == "x":
            raise BadInput(
                "roles.student: SCM requires f(x, 0) = x, which prediction 'x' does not ensure; use v, flow or edm."
            )
        self.chart, self.c, self.warm_up = TrigFlow(sigma_data), c, warm_up
        self.derivative = Derivative.choose(jvp, jvp_step, self.student, smooth=0.04)
        self.jvp = self.derivative.method
        self.density = LogNormalSigma(self.chart, mean, std)
        self.guided = Guided(self.teacher, self.guidance) if self.frozen else None

    def start(self, role, roles):
        return Balance() if role == "balance" else super().start(role, roles)

    def turns(self, step):
        yield "student", self.loss
        yield "balance", lambda *shared: uncertainty_weighted(shared[-1]["value"], self.balance(shared[-1]["theta"]))

    def draw(self, x, z, cond):
        return x, z, cond, {}  # the last: what the student's turn leaves for the balance's

    def loss(self, x, z, cond, left=None):
        sd, student_cond = self.chart.sigma_data, self.student_conditions(cond, len(x))
        t = self.density(len(x), device=x.device, dtype=at_least_float32(x).dtype).clamp_max(1 - 1e-4)
        theta = t * (math.pi / 2)
        x_t = self.chart.add_noise(x, t, z)
        F = lambda x_t, t: self.output(self.student, x_t, t * (math.pi / 2), student_cond)
        dx, along = self.velocity(x, z, x_t, theta, cond), theta.cos() * theta.sin()
        rewind, out = ReplayRNG(x.device), F(x_t, t)
        with torch.no_grad(), rewind:
            slope = self.derivative(F, (x_t, t), (bcast(along, x) * dx, along / (math.pi / 2)), t / 2, 1 - 1e-4)
            r = min(1.0, self.schedule_step()[0] / self.warm_up) if self.warm_up else 1.0
            g = tangent(out, slope, x_t, dx, theta, sd, r)
            self.log_value("student/tangent", g.flatten(1).square().mean(1).sqrt().mean())
            g = g if self.c is None else normalised_tangent(g, self.c)
            u = self.balance(theta)
        value = tangent_loss(out, g, 1 / (sd * theta.tan()), per_sample=True)
        if left is not None:
            left |= {"theta": theta, "value": value.detach()}
        return uncertainty_weighted(value, u)

    def output(self, denoiser, x_t, theta, cond):
        """F = (cos x_theta - D) / (sd sin) of any Denoiser, evaluated in the TrigFlow parametrisation."""
        x = denoiser.with_schedule(self.chart)(x_t, theta / (math.pi / 2), **cond)
        return (bcast(theta.cos(), x_t) * x_t - x) / (self.chart.sigma_data * bcast(theta.sin(), x_t))

    @torch.no_grad()
    def velocity(self, x, z, x_t, theta, cond):
        """dx/dtheta: the guided teacher's, or the sample's own, whose mean given x_theta is the data's."""
        if self.guided is None:
            return bcast(theta.cos(), x) * self.chart.sigma_data * z - bcast(theta.sin(), x) * x
        return self.chart.sigma_data * self.output(self.guided, x_t, theta, cond)


class Balance(nn.Module):
    """u(theta) (B,), 0 at the start."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.features, self.out = ScalarEmbedding(width, zero=True), nn.Linear(width, 1, bias=False)

    def forward(self, theta):
        return self.out(self.features(theta / (math.pi / 2))).squeeze(1)
