"""A split of webdataset shards as a dataset, in memory or streamed."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data.base import Batch, Dataset, concatenate, without
from distill.data.info import Info
from distill.data.shards import index, order
from distill.data.shards import sample as samples
from distill.data.shards.errors import BadSample, ShardError, ShardErrors
from distill.data.shards.sample import Sample
from distill.data.shards.stream import Stream, loader
from distill.errors import BadInput

NULL = "null.safetensors"
WINDOW, CACHE_MB = 1024, 256.0  # defaults: samples that a stream shuffles among, MiB up to which a split is cached
_WINDOW_BYTES = 2**30


@dataclass
class Cache:
    """A decoded split in memory: stored values (N, ...), labels (N,), captions and conditions that the set has."""

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
        if conditions:
            for name, values in self.cond.items():
                batch[name] = samples.widened(torch.from_numpy(values[rows]))
        if self.label is not None:
            batch["label"] = torch.from_numpy(self.label[rows])
        if self.caption is not None:
            batch["caption"] = [self.caption[i] for i in rows]
        return batch


class Shards(Dataset):
    """A split of webdataset shards.

    A sample has a `.npy` or an image, and optionally `.cls` (class number), `.txt` (caption) and further tensors NAME.npy,
    such as text embeddings: `batch[NAME]`, float32 (B, ...) where they are floats. A split of conditions alone has no x.

    Batch n of a rank is a function of `seed`, `batch_size`, rank, world and n, and, for a stream, of `workers` and
    `window`. Batches are endless and always full, whatever the number of shards and ranks.

    - A split of up to `cache_mb` is decoded once and drawn by random permutations: in one pass of all ranks together each
      sample comes once. No workers are started.
    - A larger split is streamed. Each worker of each rank is a lane. A lane reads all shards, in a new random order in
      every pass and from its own starting position, so that the lanes together read the split once before any sample
      comes again, except within one window. Samples are shuffled within `window`. Resuming reads at most one shard and one
      window.

    Args:
        path: split folder written by `distill data`, a folder of tar files, a brace or glob pattern, or a list.
        batch_size: samples of a batch (one rank, one micro-batch).
        seed: of the order.
        workers: processes that read a stream.
        shuffle: False gives stored order.
        window: samples that a lane holds undecoded and shuffles; of samples with conditions, at most a GiB.
        cache_mb: size in MiB of the decoded values up to which a split is kept in memory, on every rank; 0 always streams.
        budget: damaged shards and samples to skip (int), or the share of the samples that may be lost (float below 1).
        size: resize images to this many pixels a side.
        labels: False leaves out labels.

    Attributes:
        errors: damage found so far.

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
        window: int = WINDOW,
        cache_mb: float = CACHE_MB,
        budget: int | float = 10,
        size: int | None = None,
        labels: bool = True,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("workers", workers, 0),
            ("size", 1 if size is None else size, 1),
        ):
            if value < least:
                raise BadInput(f"{name}={value} must be at least {least}.")
        self.batch_size, self.seed, self.workers, self.shuffle = batch_size, seed, workers, shuffle
        self.size = size
        shard_set = index.find(path, size)
        info = shard_set.info
        self.tars = shard_set.tars
        self.info = info if labels else replace(info, classes=0, names=())
        self.samples = info.samples
        self.window = min(window, max(1, _WINDOW_BYTES // info.bytes)) if info.members else window
        self.errors = ShardErrors(budget, info.path)
        self.errors.total = shard_set.stated
        self.errors.count(shard_set.errors)
        self.cached = info.count * info.bytes <= cache_mb * 2**20

    @functools.cached_property
    def null(self) -> dict[str, Tensor] | None:
        """The null condition that `distill data encode` stores beside the index."""
        files = [Path(folder) / NULL for folder in {os.path.dirname(t.path) for t in self.tars}]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return {name: samples.widened(value) for name, value in load_file(file).items()}
        except SafetensorError as error:
            raise BadInput(f"{file} cannot be read ({error}): copy it again from where it was written.") from None

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
        """Endless batches of `rank` out of `world`, from batch `start` on; equal to skipping `start` batches.

        Raises:
            BadInput: damage beyond the budget, at the batch where it is found.
        """
        if not 0 <= rank < world or start < 0:
            raise BadInput(f"rank={rank}, world={world}, start={start}: rank must be below world, start 0 or more.")
        return self._from_cache(rank, world, start) if self.cached else self._from_stream(rank, world, start)

    def once(self, batch_size: int | None = None) -> Iterator[Batch]:
        """One pass in stored order; the last batch may be short."""
        rows: list[Sample] = []
        for sample in self._samples():
            rows.append(sample)
            if len(rows) == (batch_size or self.batch_size):
                yield samples.collate(rows, self.info)
                rows = []
        if rows:
            yield samples.collate(rows, self.info)

    def all(self, limit: int | None = None, conditions: bool = True) -> Batch:
        """The split as one batch in stored order, or its first `limit` samples."""
        if self.cached:
            count = self._cache.count
            rows = np.arange(count if limit is None else min(limit, count))
            return self._cache.batch(rows, self.info, conditions)
        batches, count = [], 0
        for batch in self.once():
            batches.append(batch if conditions else without(batch, self.info.members))
            count += len(next(iter(batch.values())))
            if limit is not None and count >= limit:
                break
        return {key: value[:limit] for key, value in concatenate(batches).items()}

    def _from_cache(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        cache, step = self._cache, start
        while True:
            rows = order.batch(step, rank, world, self.batch_size, cache.count, self.seed, self.shuffle)
            yield cache.batch(rows, self.info)
            step += 1

    def _from_stream(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        stream = Stream(self.tars, self.info, self.batch_size, self.seed, self.shuffle, self.window, self.size)
        for batch, errors in loader(stream, rank, world, self.workers, start):
            self.errors.count(errors)
            if isinstance(batch, BadInput):
                raise batch
            yield batch

    def _samples(self) -> Iterator[Sample]:
        """All readable samples in stored order."""
        errors: list[ShardError] = []
        for shard in self.tars:
            for raw in index.read_tar(shard, errors):
                try:
                    sample = samples.decode(raw, self.info, self.size)
                except BadSample as error:
                    self.errors.count([ShardError(shard.path, raw["__key__"], str(error))])
                else:
                    yield sample
            self.errors.count(errors)

    @functools.cached_property
    def _cache(self) -> Cache:
        info, label, caption, count = self.info, [], [], 0
        x = np.empty((info.count, *info.shape), info.dtype) if info.samples else None
        cond = {name: np.empty((info.count, *m.shape), m.dtype) for name, m in info.members.items()}
        for sample in self._samples():
            if x is not None:
                x[count] = sample.x
            for name, values in sample.cond.items():
                cond[name][count] = values
            label.append(sample.label)
            caption.append(sample.caption)
            count += 1
        if not count:
            raise BadInput(f"no readable sample in {info.path}: {self.errors.summary()}. Write the shards again.")
        return Cache(
            count,
            None if x is None else x[:count],
            np.array(label, np.int64) if info.classes else None,
            caption if info.captions else None,
            {name: values[:count] for name, values in cond.items()},
        )
