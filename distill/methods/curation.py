r"""Rounds of finetuning on one's own chosen samples: RAFT (Dong et al., 2023), https://arxiv.org/abs/2304.06767, and
softmax curation (Ferbach et al., 2024), https://arxiv.org/abs/2407.09499.

At the start of a round the averaged student becomes the source; until the next one:

    x_1, ..., x_K ~ source(c) by the sampler that will serve;   x = x_k,  k ~ softmax(r(x_1..K) / temperature)
    L = |N(x_t, t) - n(x, x_t, t)|^2     on such x, and on data for the rest of the batch

temperature 0 keeps the best of K (RAFT). Exact rounds turn the density p into K p F_r^{K-1}, or into p H_K.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.losses.preference import sample_choice
from distill.losses.regression import native_mse
from distill.methods.base import Method
from distill.solvers import DDIM, solve
from distill.times import Uniform


class Curation(Method):
    """For students that are diffusion models; a denoising loss would destroy a one-step map.

    Args:
        metric: called `metric(x, data=, **cond) -> (B,)`, higher is better; not differentiated.
        group: K, samples per condition of which one is kept.
        temperature: of the choice; 0 keeps the best.
        round: steps that share a source.
        synthetic: share of a batch that is curated, the rest is data; 1 needs no data and in the end collapses.
        density, base: distribution of t; arguments of Method. The teacher is where the student starts, and is never evaluated.
    """

    source: Denoiser
    sampler, serving = DDIM(), "ode"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        metric: Any,
        group: int = 4,
        temperature: float = 0.0,
        round: int = 500,
        synthetic: float = 1.0,
        density: Any = None,
        grid: Any = 50,
        **base,
    ):
        if group < 1 or round < 1 or not 0 <= synthetic <= 1:
            raise BadInput(f"group={group} and round={round} must be at least 1, synthetic={synthetic} within [0, 1].")
        super().__init__(roles, grid=grid, averages={"source": ("student", None)}, **base)
        self.metric, self.group, self.temperature = metric, group, temperature
        self.round, self.synthetic, self.needs_data = round, synthetic, synthetic < 1
        self.density = density or Uniform(1e-3, 1.0)

    def turns(self, step):
        yield "student", self.loss

    @torch.no_grad()
    def draw(self, x, z, cond):
        if (self.step - self.warm_start) % self.round == 0:
            self.copy_weights("source", "ema")
        curated = self.curated(x, z, cond)
        if self.synthetic == 1:
            return curated, cond
        own = torch.arange(len(z), device=z.device) < round(self.synthetic * len(z))
        return torch.where(own.view(-1, *[1] * (z.ndim - 1)), curated, x), cond

    def curated(self, data, z, cond):
        """One of K samples per condition (B, ...)."""
        k, n = self.group, len(z)
        wide = {name: v.repeat_interleave(k, 0) for name, v in cond.items()}
        noise = torch.randn(n * k, *z.shape[1:], dtype=z.dtype, device=z.device)
        start = self.student.schedule.start(noise)
        x = solve(self.source, start, self.grid, self.sampler, **self.student_conditions(wide, n * k))
        scores = self.reward_of(x, None if data is None else data.repeat_interleave(k, 0), wide).view(n, k)
        kept = sample_choice(scores, torch.rand(n, device=z.device), self.temperature)
        self.log_value("student/score", scores.mean())
        self.log_value("student/spread", x.std(0).mean())
        return x.view(n, k, *z.shape[1:])[torch.arange(n, device=z.device), kept]

    def loss(self, x, cond):
        t = self.density(len(x), device=x.device, dtype=x.dtype)
        x_t = self.student.schedule.add_noise(x, t, torch.randn_like(x))
        return native_mse(self.student, x, x_t, t, cond)
