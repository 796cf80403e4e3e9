r"""Distribution matching: the gradient of a divergence between the student's law and the teacher's, at noise level u.

    grad_theta KL(p_G | p_D) = E[ w_u (score_F - score_D)(x_u) dx/dtheta ]
    score_F - score_D = (alpha_u/sigma_u^2) (F - D)

with F the critic's and D the teacher's E[x | x_u]. https://arxiv.org/abs/2311.18828 (DMD),
https://arxiv.org/abs/2405.14867 (DMD2), https://arxiv.org/abs/2503.06674 (TDM). For any f-divergence E_G f(r),
r = p_D/p_G at x_u, the same gradient is weighted by h(r) = f''(r) r^2 (f-distill, https://arxiv.org/abs/2502.15681).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.errors import BadInput, suggest
from distill.losses.regression import huber
from distill.noise import bcast

NORMALISERS = ("real", "none")

# h(r) up to a constant, r = p_D / p_G; the name says which divergence of the teacher D from the student G.
DIVERGENCES = {
    "reverse_kl": torch.ones_like,  # KL(p_G | p_D): seeks modes; DMD
    "kl": lambda r: r,  # KL(p_D | p_G): covers modes
    "js": lambda r: r / (1 + r),
    "hellinger": lambda r: r.sqrt(),  # squared
    "jeffreys": lambda r: 1 + r,  # KL both ways
    "neyman": lambda r: 1 / r,  # chi^2, int p_G^2 / p_D
    "softened_reverse_kl": lambda r: 1 / (1 + r),
}


def normaliser(x: Tensor, real: Tensor, floor: float = 1e-6) -> Tensor:
    """(B,) 1 / mean_i |x_i - D_i(x_u)|, the literature's weight (DMD eq. 8), detached; `real` is the guided D."""
    return 1 / (x - real).detach().abs().flatten(1).mean(1).clamp_min(floor)


def matching(
    x: Tensor,
    fake: Tensor,
    real: Tensor,
    c: float | None = None,
    weight: Tensor | None = None,
    normalise: str = "real",
) -> Tensor:
    r"""A loss whose gradient in x is `weight` (F - D) / mean|x - D|, divided by the number of elements.

    The target is y = sg[x + D - F]. Without `c` the loss is |x - y|^2 / 2 (DMD, DMD2); with `c` it is the pseudo-Huber
    sqrt((x - y)^2 + c^2) - c of TDM, whose gradient saturates at the sign of F - D.

    Args:
        x: the student's clean sample, with gradient (B, ...).
        fake, real: F(x_u) and D_w(x_u), E[x | x_u] of critic and guided teacher (B, ...).
        weight: (B,) further factor, such as `divergence_weight`'s.
        normalise: "real" divides by mean|x - D| per sample (DMD, DMD2, TDM); "none" does not: with
            weight = alpha_u / sigma_u^2 that is the KL's own gradient (Diff-Instruct, https://arxiv.org/abs/2305.18455).
    """
    if normalise not in NORMALISERS:
        raise BadInput(f"normalise '{normalise}' is none of {', '.join(NORMALISERS)}.{suggest(normalise, NORMALISERS)}")
    fake, real = fake.detach(), real.detach()
    scale = normaliser(x, real) if normalise == "real" else x.new_ones(len(x))
    scale = scale if weight is None else scale * weight
    y = (x + (real - fake)).detach()
    if c is not None:
        return huber(x, y, c, weight=scale)
    return 0.5 * ((x - y).square() * bcast(scale, x)).flatten(1).mean(1).mean()


def divergence_weight(
    name: str, log_ratio: Tensor, low: float = 0.1, high: float = 20.0, normalise: bool = True
) -> Tensor:
    r"""h(r) (B,), detached, for the f-divergence `name` of DIVERGENCES and r = exp(log_ratio) clipped to [low, high].

    `log_ratio` (B,) estimates log p_D - log p_G at x_u: an optimal discriminator's logit. `normalise` divides by the
    batch's mean, so that the step size does not change with the divergence.
    """
    if name not in DIVERGENCES:
        raise BadInput(f"divergence '{name}' is none of {', '.join(DIVERGENCES)}.{suggest(name, DIVERGENCES)}")
    h = DIVERGENCES[name](log_ratio.detach().clamp(-10, 10).exp().clamp(low, high))
    return h / h.mean() if normalise else h


def gap(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """mean|F - D| / mean|x - D|, a number to watch: it falls to a floor as the student's law meets the teacher's."""
    return ((fake - real).abs().mean() / (x - real).abs().mean()).detach()


def importance(eps: Tensor, noise: Tensor) -> Tensor:
    r"""TDM's weight for samples that are not data plus Gaussian noise (B,).

    x_u = alpha_u x + sigma_u eps with eps = (x_u - alpha_u x)/sigma_u, which is not N(0, I) when x_u was renoised from
    a point of the student's trajectory with `noise`:  w = exp(-mean eps^2 / 2) / exp(-mean noise^2 / 2).
    """
    return torch.exp(0.5 * (noise.square().flatten(1).mean(1) - eps.square().flatten(1).mean(1)))
