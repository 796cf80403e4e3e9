r"""Distribution matching: gradients of divergences between student and teacher distributions at noise level u.

    grad_theta KL(p_G | p_D) = E[ w_u (score_F - score_D)(x_u) dx/dtheta ]
    score_F - score_D = (alpha_u/sigma_u^2) (F - D)

with F and D the E[x | x_u] of critic and teacher. DMD, https://arxiv.org/abs/2311.18828; DMD2,
https://arxiv.org/abs/2405.14867; TDM, https://arxiv.org/abs/2503.06674. For an f-divergence E_G f(r), r = p_D / p_G at
x_u, the gradient is weighted by h(r) = f''(r) r^2 (f-distill, https://arxiv.org/abs/2502.15681).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.errors import BadInput, suggest
from distill.losses.regression import huber
from distill.noise import bcast

NORMALISERS = ("real", "none")

# h(r) up to a constant factor, with r = p_D / p_G, D the teacher and G the student.
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,  # KL(p_G | p_D): mode-seeking; DMD
    "kl": lambda r: r,  # KL(p_D | p_G): mode-covering
    "js": lambda r: r / (1 + r),
    "hellinger": lambda r: r.sqrt(),  # squared Hellinger distance
    "jeffreys": lambda r: 1 + r,  # sum of both KL divergences
    "neyman": lambda r: 1 / r,  # chi^2, int p_G^2 / p_D
    "softened_reverse_kl": lambda r: 1 / (1 + r),
}


def normaliser(x: Tensor, real: Tensor, floor: float = 1e-6) -> Tensor:
    """1 / mean_i |x_i - D_i(x_u)| (B,), detached (DMD, equation 8); `real` is the guided D(x_u)."""
    return 1 / (x - real).detach().abs().flatten(1).mean(1).clamp_min(floor)


def matching(
    x: Tensor,
    fake: Tensor,
    real: Tensor,
    c: float | None = None,
    weight: Tensor | None = None,
    normalise: str = "real",
) -> Tensor:
    r"""A loss whose gradient with respect to x is `weight` (F - D) / mean|x - D| / (number of elements).

    The target is y = sg(x + D - F). Without `c` the loss is |x - y|^2 / 2 (DMD, DMD2). With `c` it is the pseudo-Huber
    loss sqrt((x - y)^2 + c^2) - c of TDM, whose gradient saturates at the sign of F - D.

    Args:
        x: the student's clean sample, with gradient (B, ...).
        fake, real: F(x_u) and D_w(x_u), E[x | x_u] of critic and guided teacher (B, ...).
        c: width of the pseudo-Huber loss; None for the squared loss.
        weight: an additional factor (B,), such as that of `divergence_weight`.
        normalise: "real" divides by mean|x - D| per sample (DMD, DMD2, TDM). "none" does not: with weight =
            (alpha_u / sigma_u)^2 the gradient is that of KL(p_G | p_D) at u (Diff-Instruct, https://arxiv.org/abs/2305.18455).

    Raises:
        BadInput: for another `normalise`.
    """
    if normalise not in NORMALISERS:
        raise BadInput(
            f"normalise '{normalise}' must be one of {', '.join(NORMALISERS)}.{suggest(normalise, NORMALISERS)}"
        )
    fake, real = fake.detach(), real.detach()
    scale = normaliser(x, real) if normalise == "real" else x.new_ones(len(x))
    scale = scale if weight is None else scale * weight
    y = (x + (real - fake)).detach()
    if c is not None:
        return huber(x, y, c, weight=scale)
    return 0.5 * ((x - y).square() * bcast(scale, x)).flatten(1).mean(1).mean()


def divergence_weight(name: str, log_ratio: Tensor, low: float = 0.1, high: float = 20.0) -> Tensor:
    r"""h(r) / h(1) (B,), detached, with r = exp(log_ratio) clipped to [low, high]. It is 1 where both distributions agree.

    Divided by its mean over a batch, the step size does not depend on the divergence.

    Args:
        name: an f-divergence, a key of DIVERGENCES.
        log_ratio: an estimate of log p_D - log p_G at x_u (B,), such as the logit of a discriminator.
        low, high: bounds of r.

    Raises:
        BadInput: for another name.
    """
    if name not in DIVERGENCES:
        raise BadInput(f"divergence '{name}' must be one of {', '.join(DIVERGENCES)}.{suggest(name, DIVERGENCES)}")
    h = DIVERGENCES[name]
    return h(log_ratio.detach().clamp(-10, 10).exp().clamp(low, high)) / h(log_ratio.new_ones(()))


def gap(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """mean|F - D| / mean|x - D|, detached: a diagnostic that decreases as the student approaches the teacher."""
    return ((fake - real).abs().mean() / (x - real).abs().mean()).detach()


def importance(eps: Tensor, noise: Tensor) -> Tensor:
    r"""The importance weight of TDM (B,): w = exp(-mean eps^2 / 2) / exp(-mean noise^2 / 2).

    Args:
        eps: (x_u - alpha_u x) / sigma_u (B, ...). It is not N(0, I) if x_u was obtained by adding noise to a point of
            the student's trajectory.
        noise: the noise that was added (B, ...).

    https://arxiv.org/abs/2503.06674
    """
    return torch.exp(0.5 * (noise.square().flatten(1).mean(1) - eps.square().flatten(1).mean(1)))
