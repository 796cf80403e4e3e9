r"""MMD-DDM: finetune a diffusion model for a fixed number of steps (Aiello et al., 2023), https://arxiv.org/abs/2301.07969.

x = z -> x_{t_{K-1}} -> ... -> x_0 by K DDIM steps of the student, the graph kept through all of them
L = MMD^2_u( features(x), features(data) ),  the unbiased estimate
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.denoise import Denoiser
from distill.losses.mmd import mmd
from distill.methods.base import Method
from distill.solvers import DDIM, solve


class MMD(Method):
    """One network and one turn; the teacher is where the student starts and the baseline, and is never evaluated.

    Args:
        kernel: `cubic` or `rbf`.
        bandwidths: of the RBF kernels, in units of sqrt(features).
        recompute: keep no activations of the K steps, but compute them again in the backward pass.
        base: arguments of Method. `roles.features`, a module x (B, ...) -> (B, d), is optional: none compares samples.
    """

    features: nn.Module
    trainable, frozen = ("student",), ("teacher", "features")
    sampler, serving = DDIM(), "ode"

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        kernel: str = "cubic",
        bandwidths: list[float] | tuple[float, ...] = (0.5**0.5,),
        recompute: bool = True,
        **base,
    ):
        super().__init__({"features": nn.Flatten()} | roles, **base)
        mmd(torch.zeros(2, 1), torch.zeros(2, 1), kernel)  # refuses an unknown name
        self.kernel, self.bandwidths, self.recompute = kernel, tuple(bandwidths), recompute

    def turns(self, step):
        yield "student", self.loss

    def loss(self, data, z, cond):
        denoiser = Recomputed(self.student) if self.recompute else self.student
        x = solve(
            denoiser, self.student.schedule.start(z), self.grid, self.sampler, **self.student_conditions(cond, len(z))
        )
        with torch.no_grad():
            real = self.features(data)
        return mmd(self.features(x), real, self.kernel, self.bandwidths)


class Recomputed(Denoiser):
    """A denoiser whose activations are computed again in the backward pass: memory of one step instead of K."""

    def __init__(self, denoiser: Denoiser):
        super().__init__(None, denoiser.schedule, "x")
        self.denoiser = denoiser

    def native(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return checkpoint(self.denoiser, x_t, t, use_reentrant=False, **cond)
