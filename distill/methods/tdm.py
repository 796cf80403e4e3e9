r"""Trajectory distribution matching (Luo et al., 2025), https://arxiv.org/abs/2503.06674.

The student's K-step ODE trajectory is matched in distribution to the teacher's at every boundary of the grid. In segment
t = t_k > u >= s = t_{k-1}:

    x = G(x_t, t);   x_s = alpha_s x + sigma_s eps(x, x_t);   x_u ~ q(x_u | x_s)
    critic   min_F  w(u) |F(x_u) - sg x|^2 in the network's own output (v, flow), or w(u) min(SNR_u, 5) |F(x_u) - sg x|^2
    student  d/dx   (F - D_w)(x_u) / mean|x - D_w(x_u)|       through x only
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from distill.denoise import Guided
from distill.errors import BadInput, suggest
from distill.losses.matching import importance, matching
from distill.losses.regression import mse, native_mse
from distill.methods.base import Method
from distill.noise import at_least_float32

WEIGHTS = ("auto", "native", "snr")


class TDM(Method):
    """Student and critic take turns, data-free.

    Args:
        student_every: critic turns for one of the student.
        huber: constant of the per-element pseudo-Huber; none for the squared loss.
        weigh: use the importance weight w(u), which corrects for x_u's noise not being Gaussian.
        separate: u stays below the segment's t, so that each segment has its own noise levels; false: below 1, the
            authors' other choice, where the critic is shared by all segments.
        normalise: of `losses.matching.matching`; "real" divides by mean|x - D| per sample, "none" does not.
        critic_weight: "native" compares the critic's own outputs; "snr" weighs |F - x|^2 by min(SNR, snr_max), as the
            authors do for an eps-prediction, and gives a flow model's noisiest segment less than 1 % of the loss; "auto"
            is "snr" for eps- and x-predictions.
        snr_max: clip of "snr".
        margin: u lies between max(s, `margin`) and t - `margin`.
        base: arguments of Method.
    """

    trainable, frozen = ("critic", "student"), ("teacher",)
    needs_data = False

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        student_every: int = 1,
        huber: float | None = 1e-3,
        separate: bool = True,
        normalise: str = "real",
        weigh: bool = True,
        critic_weight: str = "auto",
        snr_max: float = 5.0,
        margin: float = 0.02,
        **base,
    ):
        if critic_weight not in WEIGHTS:
            hint = suggest(critic_weight, WEIGHTS)
            raise BadInput(f"critic_weight '{critic_weight}' must be one of {', '.join(WEIGHTS)}.{hint}")
        super().__init__(roles, **base)
        if critic_weight == "auto":
            critic_weight = "snr" if self.critic.prediction in ("eps", "x") else "native"
        self.critic_weight = critic_weight
        self.student_every, self.huber, self.normalise, self.weigh = student_every, huber, normalise, weigh
        self.separate, self.snr_max, self.margin = separate, snr_max, margin
        self.schedule = self.teacher.schedule
        self.guided = Guided(self.teacher, self.guidance)

    def turns(self, step):
        yield "critic", self.critic_loss
        if step % self.student_every == 0:
            yield "student", self.student_loss

    @torch.no_grad()
    def draw(self, x, z, cond):
        """The student's trajectory x_{t_K} = z, ..., x_{t_1}, shared by both turns: (K, B, ...)."""
        student_cond, path = self.student_conditions(cond, len(z)), [self.schedule.start(at_least_float32(z))]
        for t, s in pairwise(
            self.grid.tensor(z.device, at_least_float32(z).dtype)[:-1].unsqueeze(1).expand(-1, len(z))
        ):
            x = self.student(path[-1], t, **student_cond)
            path.append(self.sampler.step(self.schedule, x, path[-1], t, s))
        return torch.stack(path[::-1]), cond, student_cond

    def segment(self, path, student_cond):
        """x = G(x_t, t), x_u ~ q(x_u | x_s), u and the noise that made x_u, in a segment drawn per sample."""
        n = path.shape[1]
        k = self.grid.draw(n).to(path.device)
        t, s = self.grid.segment(k, path.dtype)
        x_t = path[k - 1, torch.arange(n, device=path.device)]
        x = self.student(x_t, t, **student_cond)
        low = s.clamp_min(self.margin)
        high = t if self.separate else torch.ones_like(t)
        u = low + (high - self.margin - low).clamp_min(0) * torch.rand_like(t)
        noise = torch.randn_like(x)
        with torch.no_grad():
            x_s = self.sampler.step(self.schedule, x, x_t, t, s)
            x_u = self.schedule.transition(x_s, s, u, noise)
        return x, x_u, u, noise

    def critic_loss(self, path, cond, student_cond):
        with torch.no_grad():
            x, x_u, u, noise = self.segment(path, student_cond)
        weight = importance(self.schedule.eps(x, x_u, u), noise) if self.weigh else torch.ones_like(u)
        if self.critic_weight == "native":
            return native_mse(self.critic, x, x_u, u, cond, weight.to(x))
        weight = weight * self.schedule.log_snr(u).exp().clamp_max(self.snr_max)
        return mse(self.critic(x_u, u, **cond), x, weight.to(x))

    def student_loss(self, path, cond, student_cond):
        x, x_u, u, _ = self.segment(path, student_cond)
        with torch.no_grad():
            real, fake = self.guided(x_u, u, **cond), self.critic(x_u, u, **cond)
        return matching(x, fake, real, self.huber, normalise=self.normalise)
