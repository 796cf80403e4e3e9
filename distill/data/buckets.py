"""Shards of several shapes: a folder with one split a (H, W), each batch of one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.data import index, order
from distill.data.shards import Batch, Shards
from distill.errors import BadInput

_TURNS = 3  # a random stream of its own


class Buckets:
    """The buckets of a split, as `distill data encode --buckets` makes them.

    Which bucket comes at a step depends on `seed` and the step alone: the same on all ranks, whatever their number. In a
    pass each comes as often as its batches fill it, at least once. Batches of a bucket are those of its own `Shards`.

    Args:
        path: folder with a folder of shards for each bucket.
        batch_size, seed, workers, shuffle: as for `distill.data.shards.Shards`; `workers` are for each bucket.
        window, cache_mb, budget, labels: the same; `cache_mb` is of all buckets together.

    Attributes:
        info: of all; `shape` is that of the largest bucket.
        shapes: of all buckets, the one with the most samples first.
        together: consecutive batches of one bucket; a run sets it to its micro-batches a step.

    Raises:
        BadInput: what `Shards` refuses, no buckets at `path`, or buckets that differ in more than their shape.
    """

    def __init__(self, path: str | os.PathLike, batch_size: int, seed: int = 0, workers: int = 0, shuffle: bool = True, *,
                 window: int = 1024, cache_mb: float = 256, budget: int | float = 10, labels: bool = True):
        folders = sorted(p.parent for p in Path(path).expanduser().glob(f"*/{index.NAME}"))
        if not folders:
            raise BadInput(f"{path} holds no buckets: give a split that `distill data encode --buckets` made, or read a plain "
                           "split by distill.data.shards.Shards.")
        sizes = {f: sum(p.stat().st_size for p in f.glob("*.tar")) for f in folders}
        share = {f: cache_mb if sum(sizes.values()) <= cache_mb * 2**20 else 0 for f in folders}
        made = [Shards(f, batch_size, seed, workers, shuffle, window=window, cache_mb=share[f], budget=budget, labels=labels)
                for f in folders]
        self.parts = sorted(made, key=lambda s: -s.info.count)
        first = self.parts[0]
        for other in self.parts[1:]:
            same = replace(other.info, shape=(), count=0, path="", mean=None, std=None)
            if same != replace(first.info, shape=(), count=0, path="", mean=None, std=None):
                raise BadInput(f"{first.info.path} and {other.info.path} differ in more than their shape: encode them together.")
        self.shapes = [s.info.shape for s in self.parts]
        self.batch_size, self.seed, self.workers, self.shuffle, self.window = batch_size, seed, workers, shuffle, first.window
        self.samples, self.null, self.together = first.samples, first.null, 1
        self.cached = all(s.cached for s in self.parts)
        self.info = replace(first.info, count=sum(s.info.count for s in self.parts), path=str(path), mean=None, std=None)
        self.turns = [max(1, round(s.info.count / batch_size)) for s in self.parts]

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
        """Endless batches of `rank` out of `world`, from batch `start` on."""
        loaders: dict[int, Iterator[Batch]] = {}
        turn, within = divmod(start, self.together)
        while True:
            bucket, before = self.place(turn)
            if bucket not in loaders:
                loaders[bucket] = self.parts[bucket].loader(rank, world, before * self.together + within)
            for _ in range(within, self.together):
                yield next(loaders[bucket])
            turn, within = turn + 1, 0

    def place(self, turn: int) -> tuple[int, int]:
        """(bucket of a turn, how many turns it has had before)."""
        each = np.repeat(np.arange(len(self.turns)), self.turns)
        turned, at = divmod(turn, len(each))
        if self.shuffle:
            each = each[order.permutation(len(each), self.seed, turned, _TURNS)]
        bucket = int(each[at])
        return bucket, turned * self.turns[bucket] + int((each[:at] == bucket).sum())

    def all(self, limit: int | None = None, conditions: bool = True) -> dict[str, Any]:
        """The largest bucket as one batch in stored order, or its first `limit` samples."""
        found: dict[str, Tensor | list[str]] = self.parts[0].all(limit, conditions)
        return found
