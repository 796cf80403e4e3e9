"""Codec of .npy members: numeric arrays of any shape, without pickle."""

from __future__ import annotations

import functools
import io
import math

import numpy as np


def encode(x: np.ndarray) -> bytes:
    """`x` as the bytes of a .npy file, https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(x, order="C"), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def decode(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file; read-only.

    Raises:
        ValueError: not a .npy file, an array of objects, or fewer or more bytes than its header says.
    """
    if data[6:8] != b"\x01\x00":  # format 1.0 is what `encode` writes; the others are rare
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, fortran, dtype = _header(data[:start])
    size = dtype.itemsize * math.prod(shape)
    if len(data) != start + size:
        raise ValueError(f"{len(data) - start} bytes of values where its header says {size}")
    flat = np.frombuffer(data, dtype, offset=start)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


@functools.lru_cache(maxsize=64)  # samples of a set share one header, and parsing it costs most of the decoding
def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = io.BytesIO(head)
    np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which is not unpickled")
    return shape, fortran, dtype
