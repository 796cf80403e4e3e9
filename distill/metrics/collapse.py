r"""Collapse indicators computed from samples alone (contrast, diversity, coverage, ...), to compare with the teacher's.

x are samples (n, ...) made under `cond`, y reference samples (m, ...). A collapse changes these values, but often not
the losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from distill.errors import BadInput
from distill.metrics.distances import distance_matrix, pair, row_blocks

MOST = 500  # samples of the measures that take all pairs


def diversity(x: Tensor, cond: Mapping[str, Tensor] | None = None) -> float:
    r"""Standard deviation between seeds under one condition: the root of tr Cov(x | c), averaged over the conditions c.

    0 if the samples do not depend on the noise (collapse). Conditions with fewer than two samples are left out.

    Raises:
        BadInput: no condition has two samples.
    """
    flat, group = x.detach().cpu().flatten(1).double(), _groups(cond or {}, len(x))
    spread = [flat[group == g].var(0).sum() for g in group.unique() if int((group == g).sum()) > 1]
    if not spread:
        raise BadInput("diversity compares seeds under one condition: give at least two samples of one.")
    return math.sqrt(float(torch.stack(spread).mean()))


def _groups(cond: Mapping[str, Tensor], n: int) -> Tensor:
    """Index (n,) of each sample's condition among the distinct ones."""
    group = torch.zeros(n, dtype=torch.long)
    for value in cond.values():
        kind = torch.unique(value.cpu(), dim=0, return_inverse=True)[1]
        group = torch.unique(torch.stack([group, kind], 1), dim=0, return_inverse=True)[1]
    return group


def limits(y: Tensor, margin: float = 0.1) -> tuple[float, float]:
    """The range of y's values, wider by `margin` of its width on both sides."""
    low, high = float(y.min()), float(y.max())
    return low - margin * (high - low), high + margin * (high - low)


def beyond(x: Tensor, low: float, high: float) -> float:
    """Share of x's values outside [low, high]."""
    return float(((x < low) | (x > high)).double().mean())


def contrast(x: Tensor) -> float:
    """Standard deviation of all values about their sample's mean: high with over-saturation, low for washed-out images."""
    flat = x.detach().flatten(1).double()
    if flat.shape[1] < 3:  # a toy's coordinates are no pixels: about the mean over samples
        return float(flat.std(0).square().mean().sqrt())
    return float(flat.var(1).mean().sqrt())


def high_frequency(x: Tensor, cut: float = 0.5) -> float | None:
    r"""Energy above `cut` times the Nyquist frequency per value: mean of |FFT x|^2 / N over those radial frequencies.

    Over all axes but sample and channel (B, C, ...); white noise of variance s^2 has s^2, a blurred image nearly none.
    None for samples without such axes.
    """
    axes = tuple(range(2, x.ndim))
    if not axes:
        return None
    x = x.detach().float()
    radius = torch.zeros(())
    for axis in axes:
        shape = [-1 if a == axis else 1 for a in axes]
        radius = radius + (2 * torch.fft.fftfreq(x.shape[axis])).square().view(shape)
    high = radius.sqrt().to(x.device) > cut
    power = torch.fft.fftn(x, dim=axes).abs().square() / math.prod(x.shape[a] for a in axes)
    return float(power.mean((0, 1))[high].double().mean()) if bool(high.any()) else None


def coverage(x: Tensor, y: Tensor, k: int = 5) -> float:
    r"""Share of y that has a sample of x nearer than its k-th neighbour in y: decreases when modes are missing.

    1 - prod_{i<k} (m - 1 - i) / (2 m - 1 - i) ~ 1 - 2^{-k} if x are as many samples of y's distribution. Of more than
    `MOST` samples a fixed random subset is used. Source: Naeem et al. 2020, https://arxiv.org/abs/2002.09797.
    """
    x, y = pair(subset(x), subset(y), least=k + 1)
    radius = torch.cat(
        [distance_matrix(rows, y).topk(k + 1, largest=False).values[:, -1] for _, rows in row_blocks(y, y)]
    )
    nearest = torch.cat([distance_matrix(rows, x).min(1).values for _, rows in row_blocks(y, x)])
    return float((nearest < radius).double().mean())


def subset(x: Tensor, most: int = MOST) -> Tensor:
    """At most `most` samples of x, a fixed random subset, since stored data may be sorted."""
    return x if len(x) <= most else x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most]]


def collapse_indicators(x: Tensor, cond: Mapping[str, Tensor], y: Tensor) -> dict[str, float]:
    """All indicators of samples x with reference y, by name; those that do not apply to this kind of sample are absent.

    There is no coverage if samples are too few or differ in shape from y, and no diversity if all conditions differ.
    """
    x, y = x.detach().cpu().float(), y.detach().cpu().float()
    indicators = {"beyond": beyond(x, *limits(y)), "contrast": contrast(x)}
    if len(_groups(cond, len(x)).unique()) < len(x):
        indicators = {"diversity": diversity(x, cond)} | indicators
    high = high_frequency(x)
    if high is not None:
        indicators["high_frequency"] = high
    if x.shape[1:] == y.shape[1:] and min(len(x), len(y)) >= 50:
        indicators["coverage"] = coverage(x, y)
    return indicators
