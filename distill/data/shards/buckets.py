"""Shards of several shapes (aspect-ratio buckets): one folder per (H, W), one shape per batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from distill.data.base import Batch, Dataset
from distill.data.shards import index, order
from distill.data.shards.dataset import CACHE_MB, WINDOW, Shards
from distill.errors import BadInput

_TURNS = 3  # key of the random draw


class Buckets(Dataset):
    """The buckets of a split, as `distill data encode --buckets` writes them.

    The bucket of a step is a function of `seed` and the step: the same on all ranks, whatever their number. In a pass each
    bucket comes as often as its samples fill a batch, at least once. `accumulate` consecutive batches are of one bucket.
    Batches of a bucket are those of its own `Shards`.

    Args:
        path: folder with one folder of shards for each bucket.
        batch_size, seed, workers, shuffle: as for `distill.data.shards.Shards`; `workers` for each bucket.
        window, cache_mb, budget, labels: the same; `cache_mb` is for all buckets together.

    Attributes:
        info: of all; `shape` is that of the bucket with the most samples.

    Raises:
        BadInput: as `Shards`; no buckets at `path`, or buckets that differ in more than their shape.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        shuffle: bool = True,
        *,
        window: int = WINDOW,
        cache_mb: float = CACHE_MB,
        budget: int | float = 10,
        labels: bool = True,
    ):
        folders = sorted(p.parent for p in Path(path).expanduser().glob(f"*/{index.NAME}"))
        if not folders:
            raise BadInput(
                f"{path} holds no buckets: give a split that `distill data encode --buckets` made, or read a plain "
                "split by distill.data.shards.Shards."
            )
        stored = sum(p.stat().st_size for folder in folders for p in folder.glob("*.tar"))
        options = {
            "window": window,
            "cache_mb": cache_mb if stored <= cache_mb * 2**20 else 0,
            "budget": budget,
            "labels": labels,
        }
        buckets = [Shards(folder, batch_size, seed, workers, shuffle, **options) for folder in folders]
        self.buckets = sorted(buckets, key=lambda bucket: -bucket.info.count)
        self._check_equal()
        first = self.buckets[0]
        self.shapes = [bucket.info.shape for bucket in self.buckets]
        self.batch_size, self.seed, self.workers, self.shuffle = batch_size, seed, workers, shuffle
        self.window, self.samples, self.null = first.window, first.samples, first.null
        self.cached = all(bucket.cached for bucket in self.buckets)
        count = sum(bucket.info.count for bucket in self.buckets)
        self.info = replace(first.info, count=count, path=str(path), mean=None, std=None)
        self.turns = [max(1, round(bucket.info.count / batch_size)) for bucket in self.buckets]

    def _check_equal(self) -> None:
        first, *others = (replace(b.info, shape=(), count=0, path="", mean=None, std=None) for b in self.buckets)
        for bucket, info in zip(self.buckets[1:], others):
            if info != first:
                raise BadInput(
                    f"{self.buckets[0].info.path} and {bucket.info.path} differ in more than their shape: "
                    "encode them together."
                )

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
        """Endless batches of `rank` out of `world`, from batch `start` on."""
        loaders: dict[int, Iterator[Batch]] = {}
        turn, within = divmod(start, self.accumulate)
        while True:
            bucket, before = self.bucket_of(turn)
            if bucket not in loaders:
                loaders[bucket] = self.buckets[bucket].loader(rank, world, before * self.accumulate + within)
            for _ in range(within, self.accumulate):
                yield next(loaders[bucket])
            turn, within = turn + 1, 0

    def bucket_of(self, turn: int) -> tuple[int, int]:
        """(bucket of a turn, number of turns it had before)."""
        buckets = np.repeat(np.arange(len(self.turns)), self.turns)
        passes, position = divmod(turn, len(buckets))
        if self.shuffle:
            buckets = buckets[order.permutation(len(buckets), self.seed, passes, _TURNS)]
        bucket = int(buckets[position])
        return bucket, passes * self.turns[bucket] + int((buckets[:position] == bucket).sum())

    def all(self, limit: int | None = None, conditions: bool = True) -> Batch:
        """The largest bucket as one batch in stored order, or its first `limit` samples."""
        return self.buckets[0].all(limit, conditions)
