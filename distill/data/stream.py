"""Batches from shards that do not fit into memory, from any step on, with and without worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distill.data import order
from distill.data import sample as samples
from distill.data.damage import Bad, Damage
from distill.data.index import Tar, read_tar
from distill.data.info import Info
from distill.errors import BadInput

Raw = tuple[Tar, dict | None]  # a shard and the members of one of its samples, None where it could not be read
_SHARDS, _WINDOW = 1, 2  # random streams of one seed; the cached order is the one without such a number


@dataclass(frozen=True)
class Stream:
    """What all lanes share: the shards and how to batch them."""

    tars: list[Tar]
    info: Info
    batch_size: int
    seed: int
    shuffle: bool
    window: int
    size: int | None


class Lane:
    """Lane g of `lanes`: all shards, pass after pass, from place g N / lanes of the first pass on.

    Position p of the lane is position g N / lanes + p of one endless walk over the N samples, pass after pass, in each
    the shards in a random order. A window is `window / batch_size` batches of consecutive positions, permuted. Both are
    computed, so starting at any batch costs no more than finding and reading its window.
    """

    def __init__(self, stream: Stream, lane: int, lanes: int):
        self.stream, self.lane = stream, lane
        self.count = sum(t.count for t in stream.tars)
        self.origin = lane * self.count // lanes
        self.batches_a_window = max(1, stream.window // stream.batch_size) if stream.shuffle else 1
        self.damage: list[Damage] = []

    def batches(self, start: int) -> Iterator[tuple[dict | BadInput, list[Damage]]]:
        """Batches from `start` on, each with the damage met on the way; a BadInput in place of a batch is the end."""
        window, first = divmod(start, self.batches_a_window)
        walk = self.walk(self.position(window))
        while True:
            for batch in self.served(list(islice(walk, self.length)), window, first):
                found, self.damage = self.damage, []
                yield batch, found
            window, first = window + 1, 0

    @property
    def length(self) -> int:
        """Samples of a window."""
        return self.batches_a_window * self.stream.batch_size

    def position(self, window: int) -> int:
        """Where a window starts in the endless walk."""
        return self.origin + window * self.length

    def walk(self, position: int) -> Iterator[Raw]:
        """The endless walk over undecoded samples from `position` on."""
        turn, skip = divmod(position, self.count)
        while True:
            for shard in self.shards(turn):
                if skip < shard.count:
                    yield from self.read(shard, skip)
                skip = max(skip - shard.count, 0)
            turn += 1

    def shards(self, turn: int) -> list[Tar]:
        """The order of the shards in one pass."""
        if not self.stream.shuffle:
            return self.stream.tars
        shuffled = order.rng(self.stream.seed, turn, _SHARDS).permutation(len(self.stream.tars))
        return [self.stream.tars[i] for i in shuffled]

    def read(self, shard: Tar, skip: int) -> Iterator[Raw]:
        """The samples of a shard after the first `skip`; as many as counted, whether or not they can be read."""
        seen = 0
        for raw in read_tar(shard, self.damage):
            seen += 1
            if seen > skip:
                yield shard, raw
        for _ in range(max(seen, skip), shard.count):
            yield shard, None

    def served(self, window: list[Raw], number: int, first: int) -> Iterator[dict | BadInput]:
        """The batches of a window from `first` on."""
        if self.stream.shuffle:
            shuffled = order.rng(self.stream.seed, number, self.lane, _WINDOW).permutation(len(window))
            window = [window[i] for i in shuffled]
        size = self.stream.batch_size
        for b in range(first, self.batches_a_window):
            try:
                rows = [self.good(window, i, number) for i in range(b * size, (b + 1) * size)]
            except BadInput as error:
                yield error
                return
            yield samples.collate(rows, self.stream.info)

    def good(self, window: list[Raw], place: int, number: int) -> samples.Sample:
        """The sample at a place, or in its stead the next good one: a choice that depends on the files only."""
        for at in range(place, place + len(window)):
            if row := self.decoded(window[at % len(window)]):
                return row
        for raw in islice(self.walk(self.position(number + 1)), self.count):
            if row := self.decoded(raw):
                return row
        raise BadInput(f"no readable sample is left in {self.stream.info.path}: write the shards again.")

    def decoded(self, raw: Raw) -> samples.Sample | None:
        """The sample, or None and an entry in `damage`."""
        shard, members = raw
        if members is None:
            return None
        try:
            return samples.decode(members, self.stream.info, self.stream.size)
        except Bad as bad:
            self.damage.append(Damage(shard.path, members["__key__"], str(bad)))
            return None


class Lanes(IterableDataset):
    """The lanes of one rank, one a worker; the worker that starts is the one whose turn it is at step `start`."""

    def __init__(self, stream: Stream, rank: int, world: int, start: int):
        self.stream, self.rank, self.world, self.start = stream, rank, world, start

    def __iter__(self) -> Iterator[tuple[dict | BadInput, list[Damage]]]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        turn, batch = order.lane(self.start + mine, workers)
        return Lane(self.stream, self.rank * workers + turn, self.world * workers).batches(batch)


def loader(stream: Stream, rank: int, world: int, workers: int, start: int) -> Iterator:
    """(batch, damage) of a rank from step `start` on; workers take turns in a fixed order."""
    import torch

    lanes = Lanes(stream, rank, world, start)
    if not workers:
        return iter(lanes)
    # A generator of its own, for DataLoader would otherwise draw from the global one and change the run.
    return iter(DataLoader(lanes, None, num_workers=workers, collate_fn=_same, generator=torch.Generator()))


def _same(item: tuple) -> tuple:
    return item
