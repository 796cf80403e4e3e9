r"""Progressive distillation (Salimans and Ho, 2022), https://arxiv.org/abs/2202.00512.

Rounds with N = M/2, M/4, ..., K steps: in each, one DDIM step of the student is trained to equal two of
its teacher. The averaged student is the teacher of the next round, which restarts averages, moments and learning rate:

    t = i/N,  m = (i - 1/2)/N,  s = (i - 1)/N,  i ~ U{1..N},  x_t = alpha_t x + sigma_t z
    x_m = ddim(D; x_t, t -> m),  x_s = ddim(D; x_m, m -> s)
    y   = (x_s - (sigma_s/sigma_t) x_t) / (alpha_s - alpha_t sigma_s/sigma_t)      the x that lands on x_s in one step
    L   = max(SNR_t, 1) |G(x_t, t) - y|^2       or (SNR_t + 1), the error in v

Distance `mae`, weight `x`: ProDiff (Huang et al., 2022), https://arxiv.org/abs/2207.06389. With a student that takes w:
stage two of guidance distillation (Meng et al., 2022), https://arxiv.org/abs/2210.03142.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Denoiser, Guided, network_of
from distill.errors import BadInput
from distill.losses import snr
from distill.losses.regression import mae, mse
from distill.methods.base import Method
from distill.noise import at_least_float32
from distill.solvers import DDIM, Overshoot
from distill.times import Uniform, halving_steps

DISTANCES = {"mse": mse, "mae": mae}


class Progressive(Method):
    """All rounds in one run.

    Args:
        teacher_steps: M, the teacher's steps; M/K is a power of two.
        rung_steps: training steps per round, the last keeps what is left; none divides train.steps equally.
        weight: see `distill.losses.snr`.
        distance: `mse` or `mae`, over where the batch's `mask` is 1, if it has one.
        guidance_range: draw w per sample from [low, high]; a student whose network has an input w gets it.
        stochastic: jumps of twice the length, for the sampler `Overshoot` (derived; the paper leaves the details out).
        base: arguments of Method; `grid` is K, uniform.

    Raises:
        BadInput: if the grid is not uniform, M is not K times 2, 4, 8, ..., or w is drawn for a student without it.
    """

    promoted: Denoiser

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        teacher_steps: int = 64,
        rung_steps: int | None = None,
        weight: str = "snr",
        distance: str = "mse",
        guidance_range: list[float] | None = None,
        stochastic: bool = False,
        **base,
    ):
        super().__init__(roles, averages={"promoted": ("student", None)}, **base)
        self.ladder = halving_steps(teacher_steps, self.grid)
        self.takes_w = network_of(self.student).guided
        if guidance_range is not None and not self.takes_w:
            raise BadInput("method.guidance_range: the student has no guidance input; set guided: true.")
        if distance not in DISTANCES:
            raise BadInput(f"method.distance: '{distance}' is none of {', '.join(DISTANCES)}.")
        self.rung_steps, self.weight, self.distance = rung_steps, weight, DISTANCES[distance]
        self.needs_total_steps = rung_steps is None
        self.strength = None if guidance_range is None else Uniform(*guidance_range)
        self.stride = 2 if stochastic else 1
        self.sampler, self.serving = (Overshoot(), "overshoot") if stochastic else (DDIM(), "ode")
        self.guided = Guided(self.teacher, self.guidance)
        self.rung, self.begun = 0, self.warm_start

    def turns(self, step):
        while self.rung < min(step // self.length, len(self.ladder) - 1):
            self.promote()
        yield "student", self.loss

    @property
    def length(self) -> int:  # of a round, in training steps
        return self.rung_steps or max(1, (self.total_steps - self.warm_start) // len(self.ladder))

    def schedule_step(self):
        return super().schedule_step() if self.step < self.warm_start else (self.step - self.begun, self.length)

    def promote(self) -> None:
        """The averaged student becomes the teacher, and the start, of the next round."""
        for copied in ("promoted", "student"):
            self.copy_weights(copied, "ema")
        self.reset_optimizer("student")
        self.rung, self.begun = self.rung + 1, self.step

    def loss(self, x, z, cond):
        schedule, n, steps = self.teacher.schedule, len(x), self.ladder[self.rung]
        i = torch.randint(1, steps + 1, (n,), device=x.device).to(at_least_float32(x).dtype)
        t, m, s = (((i - c * self.stride).clamp(min=0)) / steps for c in (0, 0.5, 1))
        w = self.guidance if self.strength is None else self.strength.draw(n, device=x.device, dtype=t.dtype)
        student_cond = cond | ({"w": torch.as_tensor(w).to(t).expand(n)} if self.takes_w else {})
        x_t = schedule.add_noise(x, t, z)
        with torch.no_grad():
            teacher, conditions = (self.promoted, student_cond) if self.rung else (self.guided, cond | {"w": w})
            x_m = DDIM()(teacher, x_t, t, m, **conditions)
            x_s = DDIM()(teacher, x_m, m, s, **conditions)
            target = DDIM().invert(schedule, x_s, x_t, t, s)
        weight = snr.weight(self.weight, schedule.log_snr(t))
        return self.distance(self.student(x_t, t, **student_cond), target, weight, mask=cond.get("mask"))

    def snapshot(self):
        return super().snapshot() | {"ladder": [self.rung, self.begun]}

    def restore(self, state, weights_only=False):
        super().restore(state, weights_only)
        self.rung, self.begun = state["ladder"]
