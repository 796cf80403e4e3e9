r"""Distribution matching: the gradient of a divergence between the student's law and the teacher's, at noise level u.

    grad_theta KL(p_G | p_D) = E[ w_u (score_F - score_D)(x_u) dx/dtheta ],  score_F - score_D = (alpha_u/sigma_u^2) (F - D)

with F the critic's and D the teacher's E[x | x_u]. https://arxiv.org/abs/2311.18828 (DMD), 2405.14867 (DMD2), 2503.06674 (TDM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.regression import huber
from distill.noise import bcast


def normaliser(x: Tensor, real: Tensor, floor: float = 1e-6) -> Tensor:
    """(B,) 1 / mean_i |x_i - D_i(x_u)|, the literature's weight (DMD eq. 8), detached; `real` is the guided D."""
    return 1 / (x - real).detach().abs().flatten(1).mean(1).clamp_min(floor)


def matching(x: Tensor, fake: Tensor, real: Tensor, c: float | None = None, weight: Tensor | None = None) -> Tensor:
    r"""A loss whose gradient in x is `weight` (F - D) / mean|x - D|, divided by the number of elements.

    The target is y = sg[x + D - F]. Without `c` the loss is |x - y|^2 / 2 (DMD, DMD2); with `c` it is the pseudo-Huber
    sqrt((x - y)^2 + c^2) - c of TDM, whose gradient saturates at the sign of F - D.

    Args:
        x: the student's clean sample, with gradient (B, ...).
        fake, real: F(x_u) and D_w(x_u), E[x | x_u] of critic and guided teacher (B, ...).
        weight: (B,) factor in place of nothing, for example an f-divergence's.
    """
    fake, real = fake.detach(), real.detach()
    scale = normaliser(x, real) if weight is None else normaliser(x, real) * weight
    y = (x + real - fake).detach()
    if c is not None:
        return huber(x, y, c, weight=scale)
    return 0.5 * ((x - y).square() * bcast(scale, x)).flatten(1).mean(1).mean()


def importance(eps: Tensor, noise: Tensor) -> Tensor:
    r"""TDM's weight for samples that are not data plus Gaussian noise (B,).

    x_u = alpha_u x + sigma_u eps with eps = (x_u - alpha_u x)/sigma_u, which is not N(0, I) when x_u was renoised from a
    point of the student's trajectory with `noise`:  w = exp(-mean eps^2 / 2) / exp(-mean noise^2 / 2).
    """
    return torch.exp(0.5 * (noise.square().flatten(1).mean(1) - eps.square().flatten(1).mean(1)))
