"""Streamed batches from shards that do not fit in memory, from any step on, with or without worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distill.data.base import Batch
from distill.data.info import Info
from distill.data.shards import order
from distill.data.shards import sample as samples
from distill.data.shards.errors import BadSample, ShardError
from distill.data.shards.index import Tar, read_tar
from distill.data.shards.sample import Sample
from distill.errors import BadInput

Raw = tuple[Tar, dict | None]  # a shard and the members of one of its samples; None if it could not be read
TIMEOUT = 1800  # seconds without a batch after which the workers count as lost
_SHARDS, _WINDOW = 1, 2  # keys of the random draws; the order of cached splits is drawn without such a key


@dataclass(frozen=True)
class Stream:
    """The shards and how to batch them; shared by all lanes."""

    tars: list[Tar]
    info: Info
    batch_size: int
    seed: int
    shuffle: bool
    window: int
    size: int | None


class Lane:
    """Lane g of G: all shards, pass after pass, from position g N / G of the first pass on, with N samples in a pass.

    The endless sequence of samples concatenates all passes, each with the shards in a random order. Position p of the
    lane is position g N / G + p of that sequence. A window is `window / batch_size` batches of consecutive positions,
    permuted. Both are computed, so starting at any batch costs no more than finding and reading its window.
    """

    def __init__(self, stream: Stream, lane: int, lanes: int):
        self.stream, self.lane = stream, lane
        self.count = sum(t.count for t in stream.tars)
        self.origin = lane * self.count // lanes
        self.window_batches = max(1, stream.window // stream.batch_size) if stream.shuffle else 1
        self.errors: list[ShardError] = []

    def batches(self, start: int) -> Iterator[tuple[Batch | BadInput, list[ShardError]]]:
        """Batches from `start` on, each with the new errors; a BadInput in place of a batch ends the stream."""
        window, first = divmod(start, self.window_batches)
        raw = self.raw_samples(self.position(window))
        while True:
            for batch in self.batches_of(list(islice(raw, self.window_samples)), window, first):
                errors, self.errors = self.errors, []
                yield batch, errors
            window, first = window + 1, 0

    @property
    def window_samples(self) -> int:
        """Samples of a window."""
        return self.window_batches * self.stream.batch_size

    def position(self, window: int) -> int:
        """Where a window starts in the endless sequence."""
        return self.origin + window * self.window_samples

    def raw_samples(self, position: int) -> Iterator[Raw]:
        """The endless sequence of undecoded samples from `position` on."""
        number, skip = divmod(position, self.count)
        while True:
            for shard in self.shards(number):
                if skip < shard.count:
                    yield from self.read(shard, skip)
                skip = max(skip - shard.count, 0)
            number += 1

    def shards(self, number: int) -> list[Tar]:
        """The order of the shards in pass `number`."""
        if not self.stream.shuffle:
            return self.stream.tars
        shuffled = order.rng(self.stream.seed, number, _SHARDS).permutation(len(self.stream.tars))
        return [self.stream.tars[i] for i in shuffled]

    def read(self, shard: Tar, skip: int) -> Iterator[Raw]:
        """The samples of a shard after the first `skip`; always `shard.count` of them, readable or not."""
        seen = 0
        for raw in read_tar(shard, self.errors):
            seen += 1
            if seen > skip:
                yield shard, raw
        for _ in range(max(seen, skip), shard.count):
            yield shard, None

    def batches_of(self, window: list[Raw], number: int, first: int) -> Iterator[Batch | BadInput]:
        """The batches of window `number` from `first` on."""
        if self.stream.shuffle:
            shuffled = order.rng(self.stream.seed, number, self.lane, _WINDOW).permutation(len(window))
            window = [window[i] for i in shuffled]
        size = self.stream.batch_size
        for b in range(first, self.window_batches):
            try:
                rows = [self.sample_at(window, i, number) for i in range(b * size, (b + 1) * size)]
            except BadInput as error:
                yield error
                return
            yield samples.collate(rows, self.stream.info)

    def sample_at(self, window: list[Raw], position: int, number: int) -> Sample:
        """The sample at a position of the window, or the next good one; the choice depends on the files only."""
        for i in range(position, position + len(window)):
            if sample := self.decoded(window[i % len(window)]):
                return sample
        for raw in islice(self.raw_samples(self.position(number + 1)), self.count):
            if sample := self.decoded(raw):
                return sample
        raise BadInput(f"no readable sample is left in {self.stream.info.path}: write the shards again.")

    def decoded(self, raw: Raw) -> Sample | None:
        """The decoded sample; None and an entry in `errors` if it is damaged."""
        shard, members = raw
        if members is None:
            return None
        try:
            return samples.decode(members, self.stream.info, self.stream.size)
        except BadSample as error:
            self.errors.append(ShardError(shard.path, members["__key__"], str(error)))
            return None


class Lanes(IterableDataset):
    """The lanes of one rank, one per worker. Worker 0 has the lane of step `start`."""

    def __init__(self, stream: Stream, rank: int, world: int, start: int):
        self.stream, self.rank, self.world, self.start = stream, rank, world, start

    def __iter__(self) -> Iterator[tuple[Batch | BadInput, list[ShardError]]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        lane, batch = order.lane(self.start + number, workers)
        return Lane(self.stream, self.rank * workers + lane, self.world * workers).batches(batch)


def loader(stream: Stream, rank: int, world: int, workers: int, start: int) -> Iterator:
    """(batch, errors) of a rank from step `start` on; workers alternate in a fixed order."""
    import torch

    lanes = Lanes(stream, rank, world, start)
    if not workers:
        return iter(lanes)
    # Without a generator, DataLoader would draw from the global one and change the run.
    generator = torch.Generator()
    return iter(
        DataLoader(lanes, None, num_workers=workers, collate_fn=_identity, generator=generator, timeout=TIMEOUT)
    )


def _identity(item: tuple) -> tuple:
    return item
