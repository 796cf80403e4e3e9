"""Shards to raw samples, by webdataset's tar iterators."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

from distill.data.damage import Cut

_BUFFER = 1 << 20
_END = 1024  # bytes of zeros that end a tar archive


def samples(path: str) -> Iterator[dict]:
    """Raw samples of a shard in their order: {"__key__": name, suffix: bytes, ...}.

    A sample that the damage cuts in two is left out.

    Raises:
        Cut: at the point where a missing, garbled or truncated shard cannot be read on, with the reason.
    """
    from webdataset import tariterators

    faults: list[str] = []

    def note(error: Exception) -> bool:
        faults.append(_words(error))
        return False

    try:
        file = open(path, "rb", buffering=_BUFFER)
    except OSError as error:
        raise Cut(f"cannot be opened: {error.strerror}") from None
    with file:
        files = tariterators.tar_file_expander([{"url": path, "stream": file}], handler=note)
        whole = None
        for sample in tariterators.group_by_keys(files, handler=note):
            if faults and sample.keys() != whole:
                break
            whole = sample.keys()
            yield sample
        if not faults and path.endswith(".tar"):
            faults += _tail(file)
    if faults:
        raise Cut(faults[0])


def _tail(file: BinaryIO) -> list[str]:
    """What Python's tar reader passes over in silence: a damaged header in the middle, a cut between two members."""
    while rest := file.read(_BUFFER):
        if rest.strip(b"\0"):
            return ["a damaged header hides the rest of the shard"]
    file.seek(-min(_END, os.fstat(file.fileno()).st_size), os.SEEK_END)
    return ["truncated: no end-of-archive mark"] if file.read().strip(b"\0") else []


def _words(error: Exception) -> str:
    """The first line of the reader's message, without the file object that webdataset appends."""
    text = str(error.args[0] if error.args else error).split(" @ ")[0].strip()
    return text.splitlines()[0] if text else type(error).__name__
