"""Small sets whose samples tell numbers they are: every value of sample i is i."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from distill.data.shards.write import Split
from distill.data.sources import array

SIDE = 4


def numbered(count: int, classes: int = 5) -> Split:
    x = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(SIDE, 2).repeat(SIDE, 3)
    return Split(x.__getitem__, count, np.arange(count) % classes)


def numbers(batch: dict) -> list[int]:
    """Numbers of the samples of `numbered` in a batch."""
    return ((batch["x"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def members(i: int, classes: int = 5, side: int = SIDE) -> dict[str, bytes]:
    return {"npy": array.encode(np.full((1, side, side), i, np.uint8)), "cls": str(i % classes).encode()}


def tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A shard made without the package's writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for key, parts in samples.items():
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return path


def change(path: Path, at: int, data: bytes) -> None:
    """Overwrite bytes in place: damage that leaves the size as it was."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def tar_member(path: Path, sample: int, suffix: str) -> tarfile.TarInfo:
    """The member of the n-th sample of a shard; has `.name`, `.offset` and `.offset_data`."""
    with tarfile.open(path) as file:
        return [m for m in file.getmembers() if m.name.endswith("." + suffix)][sample]
