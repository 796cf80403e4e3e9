"""Shards in: endless batches whose order is known for every step, equal for every rank, whatever is broken."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data import index, order
from distill.data import sample as samples
from distill.data.damage import Bad, Damage, Ledger
from distill.data.info import Info, check
from distill.data.stream import Stream, loader
from distill.errors import BadInput

__all__ = ["Shards", "check"]
Batch = dict[str, Tensor | list[str]]
NULL = "null.safetensors"
_WINDOW_BYTES = 2**30


@dataclass
class Cache:
    """A decoded split in memory: stored values (N, ...), labels (N,), captions, conditions as far as the set has them."""

    count: int
    x: np.ndarray | None
    label: np.ndarray | None
    caption: list[str] | None
    cond: dict[str, np.ndarray]

    def batch(self, rows: np.ndarray, info: Info, conditions: bool = True) -> Batch:
        """The samples at `rows` (B,)."""
        batch: Batch = {}
        if self.x is not None:
            batch["x"] = info.to_x(torch.from_numpy(self.x[rows]))
        for name, values in self.cond.items() if conditions else ():
            batch[name] = samples.wide(torch.from_numpy(values[rows]))
        if self.label is not None:
            batch["label"] = torch.from_numpy(self.label[rows])
        if self.caption is not None:
            batch["caption"] = [self.caption[i] for i in rows]
        return batch


class Shards:
    """A split of webdataset shards.

    Samples hold `.npy` or an image, and as far as the set has them `.cls` (class number), `.txt` (caption) and further
    tensors NAME.npy, such as text embeddings: `batch[NAME]`, float32 (B, ...) where they are floats. A split of
    conditions alone has no x.

    Batch n of a rank depends on `seed`, `batch_size`, rank, world and n, and, where the split is streamed, on `workers`
    and `window`. Batches come without end and are always full, so ranks cannot run apart and no number of shards is too
    small.

    - A split that fits into `cache_mb` is decoded once and drawn by random permutations: a pass of all ranks together
      gives each sample once. Workers are not needed and not started.
    - A larger one is streamed. Every worker of every rank is a lane. Each lane reads all shards, in an order drawn anew
      for every pass and from its own place on, so that the lanes together read the split once before it comes again,
      but for a window at the seams. Samples are shuffled within `window` of them. Resuming reads at most one shard and
      one window.

    Args:
        path: split folder as `distill.data.write` makes it, a folder of tar files, a brace or glob pattern, or a list.
        batch_size: samples a rank and step.
        seed: of the order.
        workers: processes that read a streamed split.
        shuffle: False gives stored order.
        window: samples a lane holds undecoded and shuffles; of samples with conditions, at most a GiB.
        cache_mb: MiB of decoded values up to which a split is kept in memory, on every rank; 0 never keeps it.
        budget: damaged shards and samples to skip, or the share of the samples to lose (below 1), before it is refused.
        size: resize images to this many pixels a side.
        labels: False leaves labels out.

    Attributes:
        info: shape, classes, count and the rest, see `Info`.
        samples: whether there is an x.
        null: the null condition, one row by name, that `distill data encode` keeps beside the index; or None.
        ledger: the damage met so far.

    Raises:
        BadInput: nothing to read at `path`, shards that do not fit together, damage beyond `budget`, or a bad argument.
    """

    def __init__(
        self,
        path: str | os.PathLike | list,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        shuffle: bool = True,
        *,
        window: int = 1024,
        cache_mb: float = 256,
        budget: int | float = 10,
        size: int | None = None,
        labels: bool = True,
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("workers", workers, 0)):
            if value < least:
                raise BadInput(f"{name}={value} must be at least {least}.")
        self.batch_size, self.seed, self.workers, self.shuffle = batch_size, seed, workers, shuffle
        self.size = size
        self.tars, info, damage, stated = index.find(path, size)
        self.info = info if labels else replace(info, classes=0, names=())
        self.samples = info.samples
        self.window = min(window, max(1, _WINDOW_BYTES // info.bytes)) if info.members else window
        self.ledger = Ledger(budget, info.path)
        self.ledger.total = stated
        self.ledger.take(damage)
        self.cached = info.count * info.bytes <= cache_mb * 2**20

    @functools.cached_property
    def null(self) -> dict[str, Tensor] | None:
        found = [f for folder in {os.path.dirname(t.path) for t in self.tars} if (f := Path(folder) / NULL).is_file()]
        if not found:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return {k: samples.wide(v) for k, v in load_file(found[0]).items()}
        except SafetensorError as error:
            raise BadInput(f"{found[0]} cannot be read ({error}): copy it again from where it was written.") from None

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
        """Endless batches of `rank` out of `world`, from batch `start` on; the same as skipping `start` batches.

        Raises:
            BadInput: damage beyond the budget, when it is met.
        """
        if not 0 <= rank < world or start < 0:
            raise BadInput(f"rank={rank}, world={world}, start={start}: rank must be below world, start 0 or more.")
        return self._drawn(rank, world, start) if self.cached else self._streamed(rank, world, start)

    def once(self, batch_size: int | None = None) -> Iterator[Batch]:
        """One pass in stored order; the last batch may be short."""
        rows: list[samples.Sample] = []
        for row in self._samples():
            rows.append(row)
            if len(rows) == (batch_size or self.batch_size):
                yield samples.collate(rows, self.info)
                rows = []
        if rows:
            yield samples.collate(rows, self.info)

    def all(self, limit: int | None = None, conditions: bool = True) -> Batch:
        """The split as one batch in stored order, or its first `limit` samples; without its conditions if asked."""
        if self.cached:
            count = self._cache.count
            rows = np.arange(count if limit is None else min(limit, count))
            return self._cache.batch(rows, self.info, conditions)
        parts, count = [], 0
        for batch in self.once():
            parts.append({k: v for k, v in batch.items() if conditions or k not in self.info.members})
            count += len(next(iter(batch.values())))
            if limit is not None and count >= limit:
                break
        whole = {k: _joined([p[k] for p in parts]) for k in parts[0]}
        return {k: v[:limit] for k, v in whole.items()}

    def _drawn(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        cache, step = self._cache, start
        while True:
            rows = order.batch(step, rank, world, self.batch_size, cache.count, self.seed, self.shuffle)
            yield cache.batch(rows, self.info)
            step += 1

    def _streamed(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        stream = Stream(self.tars, self.info, self.batch_size, self.seed, self.shuffle, self.window, self.size)
        for batch, damage in loader(stream, rank, world, self.workers, start):
            self.ledger.take(damage)
            if isinstance(batch, BadInput):
                raise batch
            yield batch

    def _samples(self) -> Iterator[samples.Sample]:
        damage: list[Damage] = []
        for shard in self.tars:
            for raw in index.read_tar(shard, damage):
                try:
                    row = samples.decode(raw, self.info, self.size)
                except Bad as bad:
                    self.ledger.take([Damage(shard.path, raw["__key__"], str(bad))])
                else:
                    yield row
            self.ledger.take(damage)

    @functools.cached_property
    def _cache(self) -> Cache:
        info = self.info
        x, label, caption, count = np.empty((info.count, *info.shape) if info.samples else 0, info.dtype), [], [], 0
        cond = {name: np.empty((info.count, *m.shape), m.dtype) for name, m in info.members.items()}
        for row in self._samples():
            if info.samples:
                x[count] = row.x
            for name, values in row.cond.items():
                cond[name][count] = values
            label.append(row.label)
            caption.append(row.caption)
            count += 1
        if not count:
            raise BadInput(f"no readable sample in {info.path}: {self.ledger.names()}. Write the shards again.")
        return Cache(
            count, x[:count] if info.samples else None, np.array(label, np.int64) if info.classes else None,
            caption if info.captions else None, {k: v[:count] for k, v in cond.items()},
        )  # fmt: skip


def _joined(parts: list) -> Tensor | list[str]:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [c for p in parts for c in p]
