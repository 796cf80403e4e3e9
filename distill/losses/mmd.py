r"""Maximum mean discrepancy between two batches of features, differentiable in both.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

    cubic  k(a, b) = (<a, b>/d + 1)^3                     compares three moments; KID, https://arxiv.org/abs/1801.01401
    rbf    k(a, b) = mean_h exp(-|a - b|^2 / (2 h^2 d))   compares distributions; h^2 = 1/2: exp(-|a - b|^2 / d)

Computed in float64, because the unbiased estimate is a small difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from distill.errors import BadInput, suggest

KERNELS = ("cubic", "rbf")


def mmd(x: Tensor, y: Tensor, kernel: str = "cubic", bandwidths: Sequence[float] = (0.5**0.5,)) -> Tensor:
    r"""The unbiased estimate of MMD^2, a scalar; it can be negative. https://arxiv.org/abs/2301.07969

    Args:
        x, y: features (n, ...) and (m, ...), flattened to d numbers each; n, m at least 2.
        kernel: "cubic" or "rbf".
        bandwidths: the h of the averaged RBF kernels, in units of sqrt(d).

    Raises:
        BadInput: for an unknown kernel, different feature shapes, or fewer than two samples.
    """
    if kernel not in KERNELS:
        raise BadInput(f"kernel '{kernel}' must be one of {', '.join(KERNELS)}.{suggest(kernel, KERNELS)}")
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise BadInput(
            f"mmd needs two or more samples of one shape in both batches, got {_describe(x)} and {_describe(y)}."
        )
    x, y = x.flatten(1).double(), y.flatten(1).double()
    k = _cubic if kernel == "cubic" else partial(_rbf, bandwidths=bandwidths)
    return _off_diagonal(k(x, x)) + _off_diagonal(k(y, y)) - 2 * k(x, y).mean()


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _rbf(a: Tensor, b: Tensor, bandwidths: Sequence[float]) -> Tensor:
    # |a|^2 + |b|^2 - 2 <a, b> is differentiable at a = b; cdist is not.
    square = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0) / a.shape[1]
    return torch.stack([torch.exp(-square / (2 * h * h)) for h in bandwidths]).mean(0)


def _off_diagonal(k: Tensor) -> Tensor:
    """Mean of the off-diagonal entries: a sample is not paired with itself."""
    n = len(k)
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1))


def _describe(x: Tensor) -> str:
    return f"{len(x)} of {tuple(x.shape[1:])}"
