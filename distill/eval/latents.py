"""Validation of samples that have conditions for which no second sample exists: latents of text-conditioned models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distill.eval import metrics, pictures

FEATURES = 256  # of the block means that are compared: what a covariance of few samples can bear
SHOWN = 16


class Latents:
    """`fd` of block means against reference latents, where there are some; mean and standard deviation always.

    Args:
        x: reference latents (n, C, ...), or None where the data is conditions alone.
        decode: latents (B, C, H, W) to pixels in [-1, 1], for pictures; without it the first channels are shown.
        held_out: latents of another split, for the floor.
    """

    def __init__(self, x: Tensor | None, decode: Callable[[Tensor], Tensor] | None = None, held_out: Tensor | None = None):
        self.x = None if x is None else blocks(x)
        self.held_out = None if held_out is None else blocks(held_out)
        self.decode, self.headline = decode, "std" if x is None else "fd"

    def score(self, x: Tensor, cond: dict[str, Tensor], quick: bool = False) -> dict[str, float]:
        """Metric -> value; `fd` (unless there is no reference), `mean`, `std`."""
        x = x.cpu().float()
        found = {} if self.x is None else {"fd": metrics.frechet(blocks(x), self.x)}
        return found | {"mean": float(x.mean()), "std": float(x.std())}

    def floor(self) -> dict[str, float]:
        """Distance between the two real splits."""
        return {} if self.x is None or self.held_out is None else {"fd": metrics.frechet(self.held_out, self.x)}

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 4) -> None:
        """Decoded, as far as they are images; of a video its middle frame, of sound its values as an image."""
        pictures.compare({k: self.pixels(v[:SHOWN].cpu().float()) for k, v in panels.items()}, path, columns=columns)

    @torch.no_grad()
    def pixels(self, x: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [-1, 1]."""
        if self.decode is not None and x.ndim in (4, 5):
            x = torch.cat([self.decode(one) for one in x.split(1)]).float()
            return _middle(x).clamp(-1, 1)
        x = _middle(x) if x.ndim != 3 else x[:, None]
        x = x[:, :3] if x.shape[1] >= 3 else x[:, :1]
        return (x / (2 * x.std().clamp_min(1e-6))).clamp(-1, 1)


def _middle(x: Tensor) -> Tensor:
    return x[:, :, x.shape[2] // 2] if x.ndim == 5 else x


def blocks(x: Tensor) -> Tensor:
    """Means over blocks of space (and time), so few that they are at most FEATURES numbers; x itself if it is small."""
    axes = x.ndim - 2
    if x[0].numel() <= FEATURES or not 1 <= axes <= 3:
        return x.flatten(1)
    side = max(1, math.floor((FEATURES / x.shape[1]) ** (1 / axes)))
    pool = (torch.nn.functional.adaptive_avg_pool1d, torch.nn.functional.adaptive_avg_pool2d,
            torch.nn.functional.adaptive_avg_pool3d)[axes - 1]
    return pool(x.float(), [min(side, n) for n in x.shape[2:]] if axes > 1 else min(side, x.shape[2])).flatten(1)
