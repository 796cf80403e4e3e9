r"""Score identity distillation: the Fisher divergence between student and teacher, with gradient through both scores.

E|D - F*|^2 with F* the student law's exact E[x | x_u] has two estimators from a learned copy F: |D - F|^2, and
<D - F, D - x>, because E[x | x_u] = F*. SiD combines them so that the error of F cancels in part.
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

    Nothing else is detached: the gradient is meant to run through F(x_u) and D(x_u) into x_u. With the exact F the
    expectation is (1 - alpha) E w |D - F|^2, so the value says nothing about quality for alpha >= 1.

    Args:
        x: the student's clean sample (B, ...).
        fake, real: F(x_u) and D(x_u) (B, ...), computed with gradient to x_u.
        alpha: 1.2 in most of the paper, 1.0 the safer choice.
        weight: (B,) further factor.
        normalise: false leaves w out.
    """
    away = real - fake
    scale = normaliser(x, real) if normalise else None
    if weight is not None:
        scale = weight if scale is None else scale * weight
    return reduce(away * (real - x - alpha * away), scale)
