"""Samples to shards on disk: what every writer ends in."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distill.data import array, image, index, order
from distill.data.info import Info
from distill.errors import BadInput

SHARD = 1000  # samples; small enough to share a small set among many readers
_SHARD_BYTES = 256 * 2**20
_CODECS = {"npy": array.encode, "png": image.encode}
_HOLD_OUT = 1  # sets the draw of the held-out part apart from that of the stored order


@dataclass
class Part:
    """The samples of one split before they are written: x(i) is the i-th as it will be stored."""

    x: Callable[[int], np.ndarray]
    count: int
    label: np.ndarray | None = None  # int64 (count,)
    caption: list[str] | None = None


def shards(
    out: str | os.PathLike,
    parts: dict[str, Part],
    info: Info,
    *,
    member: str = "npy",
    seed: int = 0,
    per_shard: int = SHARD,
) -> dict[str, Info]:
    """Write every split to OUT/split.

    Args:
        out: the folder to make; it must not exist.
        parts: the splits by name; empty ones are left out.
        info: classes, names, range, captions and source; the rest is measured.
        member: "npy" for arrays, "png" for uint8 (C, H, W).
        seed: of the stored order.
        per_shard: largest number of samples in a shard.

    Raises:
        BadInput: OUT exists or cannot be written, or there is nothing to write.
    """
    out = Path(out).expanduser()
    if per_shard < 1:
        raise BadInput(f"per_shard={per_shard} must be at least 1.")
    full = {name: part for name, part in parts.items() if part.count}
    if not full:
        raise BadInput(f"{info.source} holds no samples: nothing was written to {out}.")
    done = {}
    with staged(out) as stage:
        for number, (name, part) in enumerate(full.items()):
            rows = order.permutation(part.count, seed, number)
            done[name] = replace(_write(stage / name, part, rows, info, member, per_shard), path=str(out / name))
    return done


def hold_out(part: Part, share: float, seed: int) -> dict[str, Part]:
    """{"train", "test"} with a share of every class, rounded, in the test part; the same for the same seed.

    Raises:
        BadInput: the share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise BadInput(f"test={share} must be a share from 0 to below 1.")
    label = part.label if part.label is not None else np.zeros(part.count, np.int64)
    held = np.zeros(part.count, bool)
    for c in np.unique(label):
        rows = np.flatnonzero(label == c)
        held[rows[order.permutation(len(rows), seed, int(c), _HOLD_OUT)[: round(share * len(rows))]]] = True
    return {"train": _rows(part, np.flatnonzero(~held)), "test": _rows(part, np.flatnonzero(held))}


def _rows(part: Part, rows: np.ndarray) -> Part:
    label = None if part.label is None else part.label[rows]
    caption = None if part.caption is None else [part.caption[i] for i in rows]
    return Part(lambda i: part.x(int(rows[i])), len(rows), label, caption)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside OUT that becomes OUT if all goes well and disappears if not.

    Raises:
        BadInput: OUT exists, or the disk refuses.
    """
    if os.path.lexists(out):
        raise BadInput(f"{out} exists already and is never overwritten: give another folder, or remove it first.")
    stage = out.parent / f".{out.name}.part-{os.getpid()}"
    try:
        stage.mkdir(parents=True)
        yield stage
        stage.rename(out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadInput(f"{out} cannot be written ({reason}): make room or give another folder.") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


class _Files:
    """Opens and closes the shards of a folder: webdataset would read a path's characters as a pattern or a command."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file: BinaryIO | None = None

    def open(self, name: str) -> BinaryIO:
        self.file = open(self.folder / name, "wb")
        return self.file

    def close(self) -> None:
        if self.file:
            self.file.close()


def _write(folder: Path, part: Part, rows: np.ndarray, info: Info, member: str, per_shard: int) -> Info:
    import webdataset

    folder.mkdir()
    files, written = _Files(folder), []

    def closed(name: str) -> None:
        files.close()
        written.append((name, writer.count, os.path.getsize(folder / name)))

    writer = webdataset.ShardWriter(
        "%06d.tar", maxcount=per_shard, maxsize=_SHARD_BYTES, verbose=0, opener=files.open, post=closed,
        encoder=False, mtime=0,
    )  # fmt: skip
    total, squares, size = 0.0, 0.0, 0
    try:
        for i in map(int, rows):
            x = np.asarray(part.x(i))
            wide = x.astype(np.float64)
            total, squares, size = total + wide.sum(), squares + np.square(wide).sum(), size + x.size
            writer.write(_members(i, x, part, member))
        writer.finish()
    except BaseException:
        with contextlib.suppress(Exception):  # else tarfile would write to the closed file when it is collected
            writer.tarstream.close()
        raise
    finally:
        files.close()
    info = replace(info, shape=x.shape, dtype=x.dtype.name, count=part.count)
    info = measured(info, total / size, squares / size)
    index.write(folder, info, written)
    return info


def _members(i: int, x: np.ndarray, part: Part, member: str) -> dict[str, str | bytes]:
    members: dict[str, str | bytes] = {"__key__": f"{i:09d}", member: _CODECS[member](x)}
    if part.label is not None:
        members["cls"] = str(int(part.label[i])).encode()
    if part.caption is not None:
        members["txt"] = part.caption[i].encode()
    return members


def measured(info: Info, mean: float, square: float) -> Info:
    """Mean and standard deviation in the scale of x from those of the stored values."""
    low, high = info.range
    scale = 2 / (high - low)
    std = math.sqrt(max(square - mean**2, 0.0))
    return replace(info, mean=float((mean - low) * scale - 1), std=float(std * scale))
