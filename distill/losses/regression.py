"""Distances between predictions and targets: the mean over the batch, or one value per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.denoise import Denoiser


def reduce(value: Tensor, weight: Tensor | None = None, per_sample: bool = False, mask: Tensor | None = None) -> Tensor:
    """The mean over each sample's elements, times `weight`, then the mean over the batch.

    Args:
        value: (B, ...).
        weight: (B,).
        per_sample: return (B,) instead of the mean over the batch.
        mask: 1 or 0, broadcastable to `value`; each sample's mean is over the elements where it is 1 (to skip padding).
    """
    if mask is None:
        value = value.flatten(1).mean(1)
    else:
        mask = mask.to(value).expand_as(value)
        value = (value * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
    value = value if weight is None else value * weight
    return value if per_sample else value.mean()


def mse(
    a: Tensor, b: Tensor, weight: Tensor | None = None, per_sample: bool = False, mask: Tensor | None = None
) -> Tensor:
    r"""weight * mean_i (a_i - b_i)^2. a, b: (B, ...), weight: (B,), mask: see `reduce`."""
    return reduce((a - b).square(), weight, per_sample, mask)


def native_mse(
    denoiser: Denoiser, x: Tensor, x_t: Tensor, t: Tensor, cond: Mapping[str, Any], weight: Tensor | None = None
) -> Tensor:
    r"""Denoising loss in the network's own prediction type: weight * mean_i |F(x_t, t, cond) - F*(x; x_t, t)|^2.

    F is the native output of `denoiser` and F* the output for which its E[x | x_t] is x. x, x_t: (B, ...), t, weight: (B,).
    """
    return mse(denoiser.native(x_t, t, **cond), denoiser.from_x(x, x_t, t), weight)


def mae(
    a: Tensor, b: Tensor, weight: Tensor | None = None, per_sample: bool = False, mask: Tensor | None = None
) -> Tensor:
    r"""weight * mean_i |a_i - b_i|. a, b: (B, ...), weight: (B,), mask: see `reduce`."""
    return reduce((a - b).abs(), weight, per_sample, mask)


def huber(a: Tensor, b: Tensor, c: float = 1e-3, weight: Tensor | None = None, per_sample: bool = False) -> Tensor:
    r"""Per-element pseudo-Huber: weight * mean_i (sqrt((a_i - b_i)^2 + c^2) - c), the form of LCM and TDM.

    For a difference d it is d^2 / 2c if |d| << c, and |d| - c if |d| >> c. iCT and ECT use the norm of a sample instead:
    see `huber_norm`. https://arxiv.org/abs/2310.04378
    """
    return reduce(((a - b).square() + c * c).sqrt() - c, weight, per_sample)


def huber_norm(a: Tensor, b: Tensor, c: float = 0.0, weight: Tensor | None = None, per_sample: bool = False) -> Tensor:
    r"""Per-sample pseudo-Huber: weight * (sqrt(|a - b|^2 + c^2) - c) with the norm over a sample's elements (iCT, ECT).

    The gradient at a = b is zero for c = 0 too. https://arxiv.org/abs/2310.14189
    """
    square = (a - b).square().flatten(1).sum(1)
    safe = torch.where(square > 0, square, torch.ones_like(square))
    value = torch.where(square > 0, (safe + c * c).sqrt() - c, square)
    value = value if weight is None else value * weight
    return value if per_sample else value.mean()
