"""Scores of samples, higher is better: `metric(x, data=None, **cond) -> (B,)`. They need not be differentiable.

Any callable object of this form may stand in a config; these are the ones for toys and tests. One that is `paired` asks
for the data sample of the same condition, so it ranks in training and scores nothing in an evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Near:
    """Minus the distance to one point, rounded down to multiples of `grain`: a staircase without gradient.

    Args:
        point: of the shape of a sample, or a number.
        grain: height of a stair; 0 does not round.
    """

    def __init__(self, point: list[float] | float, grain: float = 0.05):
        self.point, self.grain = torch.as_tensor(point, dtype=torch.float64), grain

    def __call__(self, x: Tensor, data: Tensor | None = None, **cond) -> Tensor:
        away = (x.double() - self.point.to(x.device)).flatten(1).norm(dim=1)
        return -(away / self.grain).ceil() * self.grain if self.grain else -away


class Truth:
    """Minus the distance to the data sample of the same condition: for completion and restoration."""

    paired = True

    def __call__(self, x: Tensor, data: Tensor | None = None, **cond) -> Tensor:
        return -(x.double() - data.double()).flatten(1).norm(dim=1)


class Ink:
    """Mean of a sample's values, rounded down to multiples of `grain`: how bold an image is, without gradient."""

    def __init__(self, grain: float = 0.02):
        self.grain = grain

    def __call__(self, x: Tensor, data: Tensor | None = None, **cond) -> Tensor:
        mean = x.double().flatten(1).mean(1)
        return (mean / self.grain).floor() * self.grain if self.grain else mean
