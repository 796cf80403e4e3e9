r"""Score identity distillation (SiD): the Fisher divergence between student and teacher.

Let F* be the exact E[x | x_u] of the student's distribution and F a learned approximation, the critic. E|D - F*|^2 has
two estimators: |D - F|^2, and <D - F, D - x>, because E[x | x_u] = F*. SiD combines them so that the error of F partly
cancels.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.matching import normaliser
from distill.losses.regression import reduce


def identity(
    x: Tensor,
    fake: Tensor,
    real: Tensor,
    alpha: float = 1.2,
    weight: Tensor | None = None,
    normalise: bool = True,
) -> Tensor:
    r"""mean_i w <D - F, (D - x) - alpha (D - F)>, w = 1 / mean|x - D| detached. https://arxiv.org/abs/2404.04057

    Only w is detached: the gradient flows through F(x_u) and D(x_u) into x_u. For exact F the expectation is
    (1 - alpha) E w |D - F|^2, so for alpha >= 1 the value does not measure quality.

    Args:
        x: the student's clean sample (B, ...).
        fake, real: F(x_u) and D(x_u) (B, ...), computed with gradient to x_u.
        alpha: 1.2 in most experiments of the paper; 1.0 is more stable.
        weight: an additional factor (B,).
        normalise: whether to multiply by w.
    """
    difference = real - fake
    scale = normaliser(x, real) if normalise else None
    if weight is not None:
        scale = weight if scale is None else scale * weight
    return reduce(difference * (real - x - alpha * difference), scale)
