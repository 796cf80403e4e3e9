r"""Diversity of samples with the same condition, https://arxiv.org/abs/2410.06084."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import BadInput


def diversity(a: Tensor, b: Tensor) -> Tensor:
    r"""1 - cos(a, b) (B,), in [0, 2], for features a, b (B, ...); 0 for identical samples. Differentiable."""
    return 1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def interpolate(a: dict[str, Tensor], b: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    r"""(1 - share) a + share b, for the weights of two students that were distilled from the same teacher.

    Exactly `a` at share = 0 and `b` at share = 1; integer tensors are those of `a`. Interpolate full weights or products
    of LoRA factors: interpolating the two factors separately does not interpolate their product.

    Args:
        a, b: tensors by name.
        share: in [0, 1].

    Raises:
        BadInput: if names or shapes differ, or share is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise BadInput(f"share is {share}; give a number from 0 (the first model) to 1 (the second).")
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        raise BadInput("the two models differ in their weights' names or shapes; interpolate students of one teacher.")
    if share in (0, 1):
        return dict(b if share else a)
    return {k: torch.lerp(v, b[k], share) if v.is_floating_point() else v for k, v in a.items()}
