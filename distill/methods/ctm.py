r"""Consistency trajectory models (Kim et al. 2023, https://arxiv.org/abs/2310.02279), without their GAN term.

The student g(x_t, t, s) takes the end time s as an input; its jump is the DDIM step G(x_t, t, s) = ddim(g, x_t: t -> s), which is
sigma_s/sigma_t x_t + (1 - sigma_s/sigma_t) g in EDM's parametrisation. On a grid of N intervals, for one n for all and t = t_j,
u = t_{j-n}, s = t_i <= u per sample:

    x_u = n steps of the guided teacher's ODE from x_t
    e   = G_target( G(x_t, t, s), s, 0 ),   e_ = sg G_target( G(x_u, u, s), s, 0 )
    L   = |e - e_|^2 + lambda |g(x_t, t, t) - x|^2,   lambda = |d L_1 / d last| / |d L_2 / d last|

The target's weights are fixed, but e's gradient passes through it to the student's jump. Optimum: the solver's map.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Guided, network_of
from distill.errors import BadInput
from distill.losses.regression import mse, native_mse
from distill.methods.base import Method
from distill.noise import at_least_float32, bcast
from distill.solvers import ddim
from distill.solvers import solver as solver_of
from distill.solvers.flowmap import GammaSampler
from distill.tangent import ReplayRNG
from distill.times import Uniform


class CTM(Method):
    """A student that jumps from any time to any smaller one.

    Args:
        intervals: N, for t_j = j/N; 17 for the 18 times of the paper.
        longest: the most teacher steps n in one jump from t to u; N by default.
        weighted: draw n with P(n) proportional to n, as the released code does; false: uniformly.
        solver: the teacher's ODE step, by name.
        target_ema: decay of the target network.
        gamma: of the sampler: 0 is deterministic, 1 noises the predicted data afresh at every step.
        denoise: factor on lambda; the denoising term's target is the guided teacher where `guidance` is not 1.
        density: distribution of t of the denoising term.
        base: arguments of Method.

    Raises:
        BadInput: if the student's network has no input s.
    """

    unsharded = "its balance differentiates by the student's last weight matrix"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        intervals: int = 17,
        longest: int | None = None,
        weighted: bool = False,
        solver: str = "heun",
        target_ema: float = 0.999,
        gamma: float = 0.0,
        denoise: float = 1.0,
        density: Any = None,
        **base,
    ):
        super().__init__(roles, averages={"target": ("student", target_ema)}, **base)
        if not network_of(self.student).flow_map:
            raise BadInput("roles.student: CTM needs a network with an input s; set flow_map: true.")
        self.intervals, self.longest, self.weighted = intervals, min(longest or intervals, intervals), weighted
        self.solver, self.sampler = solver_of(solver), GammaSampler(gamma)
        self.denoise, self.density = denoise, density or Uniform(1e-3, 1.0)
        self.guided, self.schedule = Guided(self.teacher, self.guidance), self.student.schedule

    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z, cond):
        jump, denoise = self.jump_loss(x, z, cond), self.denoise_loss(x, z, cond)
        self.log_value("student/jump", jump)
        return jump + self.denoise * self.balance(jump, denoise) * denoise

    def jump_loss(self, x, z, cond):
        n = self.draw_steps()
        j = torch.randint(n, self.intervals + 1, (len(x),), device=x.device)
        i = (torch.rand(len(x), device=x.device) * (j - n + 1)).long()
        t, s = self.time(j, x), self.time(i, x)
        student_cond, x_t = self.student_conditions(cond, len(x)), self.schedule.add_noise(x, t, z)
        with torch.no_grad():
            x_u = x_t
            for k in range(n):
                x_u = self.solver(self.guided, x_u, self.time(j - k, x), self.time(j - k - 1, x), **cond)
        rewind = ReplayRNG(x.device)
        e = self.landed(x_t, t, s, student_cond)
        with torch.no_grad(), rewind:
            target = self.landed(x_u, self.time(j - n, x), s, student_cond)
        return mse(e, target)

    def draw_steps(self) -> int:
        """n in 1..longest, the same on all ranks."""
        steps = torch.arange(1.0, self.longest + 1)
        chances = steps if self.weighted else torch.ones_like(steps)
        return 1 + int(torch.multinomial(chances, 1, generator=self.shared))

    def landed(self, x_t, t, s, student_cond):
        """The student's jump from t to s, carried on to the data by the target."""
        x_s = jump(self.student, x_t, t, s, student_cond)
        return jump(self.target, x_s, s, torch.zeros_like(s), student_cond)

    def denoise_loss(self, x, z, cond):
        t = self.density(len(x), device=x.device, dtype=at_least_float32(x).dtype)
        x_t = self.schedule.add_noise(x, t, z)
        if self.guidance != 1:
            with torch.no_grad():
                x = self.guided(x_t, t, **cond)
        return native_mse(self.student, x, x_t, t, self.student_conditions(cond, len(x)) | {"s": t})

    def balance(self, jump, denoise):
        """lambda: the ratio of the two gradients' norms at the network's last weight matrix, at most 1e4."""
        last = [p for p in self.student.parameters() if p.requires_grad and p.ndim > 1][-1]
        above, below = (torch.autograd.grad(a, last, retain_graph=True)[0].norm() for a in (jump, denoise))
        return (above / (below + 1e-4)).clamp_max(1e4).detach()

    def time(self, j, x):
        return j.to(at_least_float32(x).dtype) / self.intervals


def jump(student, x_t, t, s, student_cond):
    """G(x_t, t, s); x_t itself where s = t. Rows of t = 0 evaluate the network elsewhere: log sigma_0 is infinite."""
    at_data = t == 0
    x_s = ddim(student.schedule, student(x_t, torch.where(at_data, 0.5, t), s=s, **student_cond), x_t, t, s)
    return torch.where(bcast(at_data, x_t), x_t, x_s)
