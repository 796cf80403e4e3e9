"""Validation of samples that have conditions for which no second sample exists: latents of text-conditioned models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import BadInput
from distill.eval import features, metrics, named, pictures, table
from distill.eval.ranks import ALONE, Ranks

FEATURES = 256  # of the block means that are compared: what a covariance of few samples can bear
SHOWN = 16


class Latents:
    """`fd` of block means against reference latents; where there are none, the samples' mean and standard deviation.

    Args:
        x: reference latents (n, C, ...), or None where the data is conditions alone.
        decode: latents (B, C, H, W) to pixels in [-1, 1], for pictures; without it the first channels are shown.
        held_out: latents of another split, for the floor.
        metrics: more to measure, by networks that look at decoded samples (`distill.eval.named`).
        captions: the first n captions that samples are made for, for metrics that read them.
        allow: packages that a metric's `_target_` may name.
    """

    def __init__(self, x: Tensor | None, decode: Callable[[Tensor], Tensor] | None = None, held_out: Tensor | None = None, *,
                 metrics: Any = None, captions: Callable[[int], list[str]] | None = None, allow: tuple[str, ...] = ()):
        asked = named.settings(metrics or [])
        for name in asked:
            if name in named.PLAIN and name != "fd" and "features" not in asked[name]:
                raise BadInput(f"eval.metrics: {name} of latents themselves is not measured; give it `features`.")
        real = None if x is None or not asked else features.Images(x, self.pixels)
        self.seen, self.captions = named.Measures(asked, real, allow), captions
        self.sides = () if x is None else sides(tuple(x.shape[1:]))
        self.x = None if x is None else blocks(x, self.sides)
        self.held_out = None if held_out is None else blocks(held_out, self.sides)
        self.decode, self.key = decode, getattr(decode, "key", None)
        self.headline = next((n for n in asked if not table.higher(n)), "std" if x is None else "fd")

    def score(self, x: Tensor, cond: dict[str, Any], quick: bool = False, ranks: Ranks = ALONE) -> dict[str, float]:
        """Metric -> value: `fd`, or `mean` and `std`, of which a network's own latents have about 0 and 1; then the named."""
        x = x.cpu().float()
        whole = ranks.gather(x if self.x is None else blocks(x, self.sides))
        found = ranks.tell(lambda: self._plain(whole))
        if not self.seen.all:
            return found
        if self.captions and "caption" not in cond:
            first = ranks.before(len(x))
            told = self.captions(first + len(x))
            cond = cond | {"caption": [told[i % len(told)] for i in range(first, first + len(x))]}
        return found | self.seen.score(lambda: features.batches(x, 8, self.pixels), cond, quick, ranks)

    def _plain(self, x: Tensor) -> dict[str, float]:
        if self.x is None:
            return {"mean": float(x.mean()), "std": float(x.std())}
        return {"fd": metrics.frechet(x, self.x)}

    def floor(self, ranks: Ranks = ALONE) -> dict[str, float]:
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


def sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks along each axis of space (and time), so few that all channels of all blocks are at most FEATURES numbers."""
    channels, *inner = shape
    if math.prod(shape) <= FEATURES or not 1 <= len(inner) <= 3:
        return tuple(inner)
    side = max(1, math.floor((FEATURES / channels) ** (1 / len(inner)) + 1e-9))
    return tuple(min(side, n) for n in inner)


def blocks(x: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Means over blocks of x (n, C, ...), (n, C * product of the sides); samples of another bucket have as many."""
    if tuple(x.shape[2:]) == tuple(sides):
        return x.flatten(1)
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[len(sides)]
    return pool(sides if len(sides) > 1 else sides[0])(x.float()).flatten(1)
