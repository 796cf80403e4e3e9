"""Files of MNIST's idx format, plain or gzipped: http://yann.lecun.com/exdb/mnist/."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from distill.errors import BadInput

_UBYTE = 8


def find(folder: Path, prefix: str, kind: str) -> Path | None:
    """The file of a split's images or labels; None if there is none.

    Args:
        folder: where to look.
        prefix: "train" or "t10k".
        kind: "images" or "labels".

    Raises:
        BadInput: several.
    """
    files = sorted(p for p in folder.glob(f"{prefix}*{kind}*idx*ubyte*") if p.is_file())
    if len(files) > 1:
        raise BadInput(f"{files[0]} and {files[1].name} both claim to be the {prefix} {kind}: keep one of them.")
    return files[0] if files else None


def read(path: Path, axes: int) -> np.ndarray:
    """uint8 array with `axes` axes.

    The file holds the bytes 0, 0, type, axes, then a big-endian uint32 for each axis, then the values.

    Raises:
        BadInput: the file cannot be read, or its magic number or length is wrong.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read ({error}): fetch it again.") from None
    magic = bytes([0, 0, _UBYTE, axes])
    if data[:4] != magic:
        raise BadInput(f"{path} starts with {data[:4].hex()} where idx files have {magic.hex()}: give the right file.")
    start = 4 + 4 * axes
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    size = start + math.prod(shape)
    if len(data) != size:
        raise BadInput(f"{path} holds {len(data)} bytes where its header says {size}: fetch it again.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
