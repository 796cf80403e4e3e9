r"""DMD2, improved distribution matching distillation (Yin et al., 2024), https://arxiv.org/abs/2405.14867,
with the divergences of f-distill (Xu et al., 2025), https://arxiv.org/abs/2502.15681.

    x = G(x_t, t), x_t from the student's own rollout to a time t of its grid;  x_u = alpha_u x + sigma_u noise
    critic   min_F  |F(x_u) - sg x|^2 in the network's own output  (+ b times the head's loss, if the head reads the critic)
    head     min_h  softplus(-h(data_u)) + softplus(h(sg x_u)) (+ R1)
    student  d/dx   h_f(r) (F - D_w)(x_u) / mean|x - D_w(x_u)|,  r = exp h(x_u);   plus a d/dx softplus(-h(x_u))
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided, network_of
from distill.errors import BadInput
from distill.losses.adversarial import (
    check_balance,
    check_r1_step,
    extra_loss_weight,
    generator_loss,
    penalised_discriminator_loss,
)
from distill.losses.matching import divergence_weight, gap, matching
from distill.losses.regression import mse, native_mse
from distill.methods.base import Method
from distill.models.heads import FeatureExtractor, Head
from distill.solvers import DDIM, Renoise, solve
from distill.times import Grid, Uniform


class DMD2(Method):
    """Several critic turns to one of the student; data-free unless it has a head. A `flow_map` critic gets t as its s.

    Args:
        student_every: critic turns for one of the student; the critic has to be updated more often.
        divergence: name in `losses.matching.DIVERGENCES`; any but reverse_kl has a head estimate the density ratio.
        adversarial: weight a of the student's GAN loss; 0 leaves it out.
        critic_adversarial: weight b of the head's loss for the critic whose features it reads.
        features, layers: the head reads these layers (see `models.heads.FeatureExtractor`) of the `critic` or the `teacher`.
        r1, r1_step: weight of the head's gradient penalty, and its finite step (auto: by the precision); none: exact.
        balance: true: a is a ratio of the GAN and the matching loss's gradient norms at x; auto: that, 0.1 at most.
        regression: weight of |G(z) - y|^2 with y the teacher's ODE from the same z in `regression_steps` DDIM steps
            (DMD, https://arxiv.org/abs/2311.18828, with the plain distance); one-step students only.
        normalise, density, base: of `losses.matching.matching`; distribution of u; arguments of Method.
    """

    head: Head
    trainable: tuple[str, ...] = ("critic", "head", "student")
    frozen: tuple[str, ...] = ("teacher",)
    sampler, serving = Renoise(), "renoise"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        grid: Any = 4,
        student_every: int = 5,
        divergence: str = "reverse_kl",
        adversarial: float = 0.0,
        critic_adversarial: float = 0.01,
        features: str = "critic",
        layers: str | list[str] = "mid_block",
        r1: float = 0.0,
        r1_step: float | str | None = "auto",
        balance: bool | str = False,
        regression: float = 0.0,
        regression_steps: int = 16,
        normalise: str = "real",
        density: Any = None,
        **base,
    ):
        self.needs_data = self.judged = adversarial > 0 or divergence != "reverse_kl"
        self.trainable = tuple(role for role in self.trainable if self.judged or role != "head")
        self.features, self.layers = features, layers
        if features not in ("critic", "teacher"):
            raise BadInput(f"features: '{features}' must be critic or teacher.")
        if regression and Grid.of(grid).steps > 1:
            raise BadInput("regression pairs a noise with the teacher's sample: it needs grid: 1.")
        divergence_weight(divergence, torch.zeros(1))  # refuses an unknown name
        super().__init__(roles, grid=grid, **base)
        self.student_every, self.divergence, self.adversarial = student_every, divergence, adversarial
        self.critic_adversarial = critic_adversarial if features == "critic" and self.judged else 0.0
        self.r1, self.r1_step, self.balance = r1, check_r1_step(r1_step), check_balance(balance)
        self.regression, self.regression_steps, self.normalise = regression, regression_steps, normalise
        self.density, self.guided = density or Uniform(0.02, 0.98), Guided(self.teacher, self.guidance)
        self._ratios: tuple = (-1, 1.0, 1)  # step, sum and number of h(r)

    def start(self, role, roles):
        if role != "head":
            return super().start(role, roles)
        return Head.of(FeatureExtractor(read := getattr(self, self.features), self.layers), network_of(read).shape)

    def turns(self, step):
        yield "critic", self.critic_loss
        if self.judged:
            yield "head", self.head_loss
        if (step + 1) % self.student_every == 0:
            yield "student", self.student_loss

    def draw(self, x, z, cond):
        student_cond = self.student_conditions(cond, len(z))
        x_t, t = self.simulate(z, student_cond)
        with torch.no_grad():
            return (
                x,
                self.student(x_t, t, **student_cond),
                cond,
                lambda: self.student(x_t, t, **student_cond),
                x_t,
                self.critic_time_condition(t, t),
            )

    def noised(self, x):
        u = self.density(len(x), device=x.device, dtype=x.dtype)
        return self.teacher.schedule.add_noise(x, u, torch.randn_like(x)), u

    def logit(self, x_u, u, cond, step=None):
        step = {} if self.features == "teacher" else self.critic_time_condition(u) if step is None else step
        return self.head(FeatureExtractor(getattr(self, self.features), self.layers)(x_u, u, **cond, **step))

    def critic_loss(self, data, x, cond, sample, z, step):
        x_u, u = self.noised(x)
        loss = native_mse(self.critic, x, x_u, u, cond | step)
        return loss + (b * self.head_loss(data, x, cond, sample, z, step) if (b := self.critic_adversarial) else 0)

    def head_loss(self, data, x, cond, sample, z, step):
        x_u, u = self.noised(x)
        data_u, noise = self.teacher.schedule.add_noise(data, u, torch.randn_like(data)), torch.randn_like(data)
        return penalised_discriminator_loss(
            lambda y: self.logit(y, u, cond, step), data_u, x_u, noise, self.r1, self.r1_step
        )

    def ratio_weight(self, log_ratio):
        """h(r) (B,) over its mean over ranks, this step's micro-batches so far, and one sample of r = 1."""
        h, world = divergence_weight(self.divergence, log_ratio), self.placement.world
        total, count = self._ratios[1:] if self._ratios[0] == self.step else (1.0, 1)
        self._ratios = (self.step, total + self.placement.mean(h.sum()) * world, count + len(h) * world)
        return h * self._ratios[2] / self._ratios[1]

    def student_loss(self, data, _, cond, sample, z, step):
        x_u, u = self.noised(x := sample())
        with torch.no_grad():
            real, fake = self.guided(x_u, u, **cond), self.critic(x_u, u, **cond, **step)
        logit = self.logit(x_u, u, cond, step) if self.judged else None
        weight = self.ratio_weight(logit.mean(1)) if logit is not None and self.divergence != "reverse_kl" else None
        loss = matching(x, fake, real, weight=weight, normalise=self.normalise)
        self.log_value("student/gap", gap(x, fake, real))
        if logit is not None and self.adversarial:
            extra = generator_loss(logit)
            self.log_value(
                "student/adversarial_weight", a := extra_loss_weight(self.adversarial, self.balance, x, loss, extra)
            )
            loss = loss + a * extra
        if self.regression:
            with torch.no_grad():
                y = solve(self.guided, z, Grid.uniform(self.regression_steps), DDIM(), **cond)
            loss = loss + self.regression * mse(x, y)
        return loss
