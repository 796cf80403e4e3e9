r"""LADD, latent adversarial diffusion distillation (Sauer et al., 2024), https://arxiv.org/abs/2403.12015.

x = G(x_t, t), x_t = data noised to a time t of the grid, or the student's rollout;  x_u = alpha_u x + sigma_u noise
head     min_h  softplus(-h(data_u)) + softplus(h(sg x_u)) (+ R1),  h on features of a frozen denoiser
student  softplus(-h(x_u))  (+ c alpha_u |x - sg D_w(sg x_u)|^2, the distillation loss of ADD)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.denoise import Guided, network_of
from distill.losses.adversarial import (
    check_balance,
    check_r1_step,
    extra_loss_weight,
    generator_loss,
    penalised_discriminator_loss,
)
from distill.losses.regression import mse
from distill.methods.base import Method
from distill.models.heads import FeatureExtractor, Head
from distill.solvers import Renoise
from distill.times import LogitNormal


class LADD(Method):
    """Head and student take turns on data, best on the teacher's own samples.

    Args:
        head_turns: the student has a turn every `head_turns`-th step, the head every step.
        layers: names of layers to read, see `models.heads.FeatureExtractor`; of `roles.features` if given, else of the teacher.
        form: `softplus` or `hinge`.
        r1, r1_step: weight of the head's gradient penalty, and its finite step (auto: by the precision); none: exact.
        simulate: start from the student's own rollout instead of noised data.
        distillation: c; the paper of ADD (https://arxiv.org/abs/2311.17042) has 2.5, LADD none.
        balance: true: c is a ratio of the distillation and the GAN loss's gradient norms at x; auto: that, 0.1 at most.
        density: distribution of u.
        base: arguments of Method.
    """

    trainable: tuple[str, ...] = ("head", "student")
    frozen: tuple[str, ...] = ("teacher", "features")
    judged = True
    head: Head
    sampler, serving = Renoise(), "renoise"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        head_turns: int = 1,
        layers: str | list[str] = "mid_block",
        form: str = "softplus",
        r1: float = 0.0,
        r1_step: float | str | None = "auto",
        simulate: bool = False,
        distillation: float = 0.0,
        balance: bool | str = False,
        density: Any = None,
        **base,
    ):
        self.layers = layers
        if "features" not in roles:
            self.frozen = ("teacher",)
        generator_loss(torch.zeros(1), form)  # refuses an unknown name
        super().__init__(roles, **base)
        self.head_turns, self.form, self.r1, self.r1_step = head_turns, form, r1, check_r1_step(r1_step)
        self.from_rollout, self.distillation = simulate, distillation
        self.balance = check_balance(balance)
        self.density, self.schedule = density or LogitNormal(1.0, 1.0), self.teacher.schedule
        self.guided = Guided(self.teacher, self.guidance)

    def start(self, role, roles):
        if role != "head":
            return super().start(role, roles)
        return Head.of(self.read(), network_of(self.reader).shape)

    @property
    def reader(self):
        return self.features if "features" in self.frozen else self.teacher

    def read(self) -> FeatureExtractor:
        return FeatureExtractor(self.reader, self.layers)

    def turns(self, step):
        yield "head", self.head_loss
        if (step + 1) % self.head_turns == 0:
            yield "student", self.student_loss

    def draw(self, x, z, cond):
        student_cond = self.student_conditions(cond, len(z))
        x_t, t = self.simulate(z, student_cond) if self.from_rollout else self.from_data(x, z)
        with torch.no_grad():
            return x, self.student(x_t, t, **student_cond), cond, lambda: self.student(x_t, t, **student_cond)

    def from_data(self, x, z):
        """Data noised to t_k, k ~ U{1..K} per sample; at t_K = 1 as the sampler starts, from z alone."""
        t, _ = self.grid.segment(self.grid.draw(len(z), device=z.device), z.dtype)
        noise = (t == 1).view(-1, *[1] * (z.ndim - 1))
        return torch.where(noise, self.schedule.start(z), self.schedule.add_noise(x, t, z)), t

    def logit(self, x_u: Tensor, u: Tensor, cond: dict) -> Tensor:
        return self.head(self.read()(x_u, u, **cond))

    def head_loss(self, data, x, cond, *_):
        u, noise = self.density(len(x), device=x.device, dtype=x.dtype), torch.randn_like(x)
        x_u = self.schedule.add_noise(x, u, noise)
        data_u = self.schedule.add_noise(data, u, torch.randn_like(noise)).to(x_u)
        step = torch.randn_like(noise)
        return penalised_discriminator_loss(
            lambda y: self.logit(y, u, cond), data_u, x_u, step, self.r1, self.r1_step, self.form
        )

    def student_loss(self, data, _, cond, sample):
        x = sample()
        u = self.density(len(x), device=x.device, dtype=x.dtype)
        x_u = self.schedule.add_noise(x, u, torch.randn_like(x))
        loss = generator_loss(self.logit(x_u, u, cond), self.form)
        if self.distillation:
            with torch.no_grad():
                target = self.guided(x_u, u, **cond)
            extra = mse(x, target, self.schedule.alpha(u).to(x))
            loss = loss + extra_loss_weight(self.distillation, self.balance, x, loss, extra) * extra
        return loss
