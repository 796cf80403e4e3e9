"""The shard writer: samples to tar files with an index.json."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distill.data.info import Info, Member
from distill.data.shards import index, order
from distill.data.shards.sample import Sample
from distill.data.sources import array, image
from distill.errors import BadInput
from distill.files import atomic_folder, write_json

SHARD_SAMPLES = 1000  # small enough to share a small set among many readers
SHARD_BYTES = 256 * 2**20
_CODECS = {"npy": array.encode, "png": image.encode}


@dataclass(frozen=True)
class Skipped:
    """A sample that is not stored, with the reason."""

    key: str
    reason: str


@dataclass
class Split:
    """The samples of one split before they are written: `x(i)` is the i-th with its stored values."""

    x: Callable[[int], np.ndarray]
    count: int
    label: np.ndarray | None = None  # int64 (count,)
    caption: list[str] | None = None

    def sample(self, i: int) -> Sample:
        """Sample i, whose key is its number."""
        label = None if self.label is None else int(self.label[i])
        caption = None if self.caption is None else self.caption[i]
        return Sample(np.asarray(self.x(i)), label, caption, key=f"{i:09d}")

    def take(self, rows: np.ndarray) -> Split:
        """The samples at `rows`."""
        label = None if self.label is None else self.label[rows]
        caption = None if self.caption is None else [self.caption[i] for i in rows]
        return Split(lambda i: self.x(int(rows[i])), len(rows), label, caption)

    def hold_out(self, share: float, seed: int) -> dict[str, Split]:
        """{"train", "test"} with a share of the samples in the test split, see `order.hold_out`."""
        rows = order.hold_out(self.count, share, seed, self.label)
        return {name: self.take(part) for name, part in rows.items()}


# -- one shard -------------------------------------------------------------------------------------------------------


@dataclass
class ShardRecord:
    """Statistics of one shard.

    Attributes:
        count, bytes: number of samples, size of the file.
        x, members: shape and dtype of `x` (None without samples) and of the conditions.
        total, squares, size: sum, sum of squares and number of the values of `x`.
        skipped: "KEY: REASON" of samples that are not stored.
    """

    count: int = 0
    bytes: int = 0
    x: Member | None = None
    members: dict[str, Member] = field(default_factory=dict)
    total: float = 0.0
    squares: float = 0.0
    size: int = 0
    skipped: list[str] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Count a sample.

        Raises:
            BadInput: its shapes or dtypes differ from those before.
        """
        x = None if sample.x is None else Member(sample.x.shape, sample.x.dtype.name)
        members = {name: Member(value.shape, value.dtype.name) for name, value in sample.cond.items()}
        if self.count and (x, members) != (self.x, self.members):
            raise BadInput(
                f"sample {sample.key} holds {x} and {members}, those before {self.x} and {self.members}: "
                "give data of one shape."
            )
        self.x, self.members, self.count = x, members, self.count + 1
        if sample.x is not None:
            values = sample.x.astype(np.float64)
            self.total += float(values.sum())
            self.squares += float(np.square(values).sum())
            self.size += values.size

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        write_json(path, asdict(self), indent=None)

    @classmethod
    def load(cls, path: Path) -> ShardRecord:
        """Read a record that `save` wrote."""
        facts = json.loads(path.read_text())
        x, members = facts.pop("x"), facts.pop("members")
        return cls(
            x=x and Member(tuple(x["shape"]), x["dtype"]),
            members={name: Member(tuple(m["shape"]), m["dtype"]) for name, m in members.items()},
            **facts,
        )


def shard_name(number: int) -> str:
    """File name of a folder's shard."""
    return f"{number:06d}.tar"


def write_shard(
    file: BinaryIO,
    samples: Iterable[Sample | Skipped],
    codec: str = "npy",
    max_count: float = math.inf,
    max_bytes: float = math.inf,
) -> ShardRecord:
    """Write samples to an open tar file until they end or a limit is reached.

    Args:
        file: open for binary writing; stays open.
        samples: what to write; an iterator is read no further than what is written.
        codec: of `x`: "npy" for arrays, "png" for uint8 (C, H, W).
        max_count, max_bytes: number of samples, and bytes of their members, after which the shard is full.

    Raises:
        BadInput: samples differ in shape or dtype.
    """
    import webdataset

    record, size = ShardRecord(), 0
    with contextlib.closing(webdataset.TarWriter(file, encoder=False, mtime=0)) as writer:
        for sample in samples:
            if isinstance(sample, Skipped):
                record.skipped.append(f"{sample.key}: {sample.reason}")
                continue
            record.add(sample)
            size += writer.write(_members(sample, codec))
            if record.count >= max_count or size >= max_bytes:
                break
    file.flush()
    record.bytes = file.tell()
    return record


def _members(sample: Sample, codec: str) -> dict[str, str | bytes]:
    members: dict[str, str | bytes] = {"__key__": sample.key}
    if sample.x is not None:
        members[codec] = _CODECS[codec](sample.x)
    for name, value in sample.cond.items():
        members[f"{name}.npy"] = array.encode(value)
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    if sample.caption is not None:
        members["txt"] = sample.caption.encode()
    return members


# -- one folder of shards --------------------------------------------------------------------------------------------


def write_index(folder: Path, info: Info, records: dict[str, ShardRecord]) -> Info:
    """Write the index.json of a folder's shards.

    Args:
        folder: of the shards.
        info: what is not measured: classes, names, range, captions, source, encoder, path; for conditions alone also shape.
        records: what each shard holds, by file name; none is empty.

    Returns:
        `info` with shape, dtype, conditions, count, mean and standard deviation of what was written.

    Raises:
        BadInput: shards differ in shape or dtype.
    """
    (_, first), *others = records.items()
    for name, record in others:
        if (record.x, record.members) != (first.x, first.members):
            raise BadInput(
                f"shard {name} of {folder} holds {record.x} and {record.members}, but others {first.x} and "
                f"{first.members}: give data of one shape, or sort it by --buckets."
            )
    count = sum(record.count for record in records.values())
    info = replace(info, members=first.members, samples=first.x is not None, count=count)
    if first.x is not None:
        size = sum(record.size for record in records.values())
        mean = sum(record.total for record in records.values()) / size
        square = sum(record.squares for record in records.values()) / size
        mean, std = _moments(mean, square, info.range)
        info = replace(info, shape=first.x.shape, dtype=first.x.dtype, mean=mean, std=std)
    index.write(folder, info, [(name, record.count, record.bytes) for name, record in records.items()])
    return info


def _moments(mean: float, square: float, low_high: tuple[float, float]) -> tuple[float, float]:
    """Mean and standard deviation on the scale of x, from mean and mean square of the stored values."""
    low, high = low_high
    scale = 2 / (high - low)
    std = math.sqrt(max(square - mean**2, 0.0))
    return float((mean - low) * scale - 1), float(std * scale)


def write_splits(
    out: str | os.PathLike,
    splits: dict[str, Split],
    info: Info,
    *,
    codec: str = "npy",
    seed: int = 0,
    per_shard: int = SHARD_SAMPLES,
) -> dict[str, Info]:
    """Write every split to OUT/SPLIT, in a random order that depends on `seed`; atomically.

    Args:
        out: the folder to create.
        splits: by name; empty ones are left out.
        info: classes, names, range, captions and source; the rest is measured.
        codec: "npy" for arrays, "png" for uint8 (C, H, W).
        seed: of the stored order.
        per_shard: largest number of samples in a shard.

    Raises:
        BadInput: OUT exists or cannot be written, or there is nothing to write.
    """
    out = Path(out).expanduser()
    if per_shard < 1:
        raise BadInput(f"per_shard={per_shard} must be at least 1.")
    splits = {name: split for name, split in splits.items() if split.count}
    if not splits:
        raise BadInput(f"{info.source} holds no samples: nothing was written to {out}.")
    written = {}
    with create_folder(out) as folder:
        for number, (name, split) in enumerate(splits.items()):
            rows = order.permutation(split.count, seed, number)
            records = _write_split(folder / name, (split.sample(int(i)) for i in rows), codec, per_shard)
            written[name] = replace(write_index(folder / name, info, records), path=str(out / name))
    return written


def _write_split(folder: Path, samples: Iterator[Sample], codec: str, per_shard: int) -> dict[str, ShardRecord]:
    folder.mkdir()
    records: dict[str, ShardRecord] = {}
    for first in samples:
        name = shard_name(len(records))
        with open(folder / name, "wb") as file:
            records[name] = write_shard(file, chain([first], samples), codec, per_shard, SHARD_BYTES)
    return records


@contextlib.contextmanager
def create_folder(out: Path) -> Iterator[Path]:
    """A folder beside OUT that becomes OUT on success and is removed on an error.

    Raises:
        BadInput: OUT exists or cannot be written.
    """
    refuse_existing(out)
    with write_errors(out, missing=True), atomic_folder(out) as folder:
        yield folder


def refuse_existing(out: Path) -> None:
    """Raise BadInput if OUT exists."""
    if os.path.lexists(out):
        raise BadInput(f"{out} exists already and is never overwritten: give another folder, or remove it first.")


@contextlib.contextmanager
def write_errors(out: Path, missing: bool = False) -> Iterator[None]:
    """Turn an OSError into a BadInput; a FileNotFoundError only if `missing`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not missing:
            raise
        reason = error.strerror or str(error)
        raise BadInput(f"{out} cannot be written ({reason}): make room or give another folder.") from error
