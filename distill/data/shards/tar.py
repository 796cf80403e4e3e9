"""Raw samples of a shard, read with webdataset's tar iterators."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

from distill.data.shards.errors import UnreadableShard

_BUFFER = 1 << 20
_END = 1024  # bytes of zeros that end a tar archive


def samples(path: str) -> Iterator[dict]:
    """Raw samples of a shard in stored order: {"__key__": name, suffix: bytes, ...}.

    A sample that is cut in two by damage is left out.

    Raises:
        UnreadableShard: where a missing, garbled or truncated shard cannot be read on, with the reason.
    """
    from webdataset import tariterators

    reasons: list[str] = []

    def handler(error: Exception) -> bool:
        reasons.append(_reason(error))
        return False

    try:
        file = open(path, "rb", buffering=_BUFFER)
    except OSError as error:
        raise UnreadableShard(f"cannot be opened: {error.strerror}") from None
    with file:
        files = tariterators.tar_file_expander([{"url": path, "stream": file}], handler=handler)
        members = None
        for sample in tariterators.group_by_keys(files, handler=handler):
            if reasons and sample.keys() != members:
                break
            members = sample.keys()
            yield sample
        if not reasons and path.endswith(".tar"):
            reasons += _check_end(file)
    if reasons:
        raise UnreadableShard(reasons[0])


def _check_end(file: BinaryIO) -> list[str]:
    """Raise for damage that Python's tar reader ignores: a damaged header in the middle, a cut between two members."""
    while rest := file.read(_BUFFER):
        if rest.strip(b"\0"):
            return ["a damaged header hides the rest of the shard"]
    file.seek(-min(_END, os.fstat(file.fileno()).st_size), os.SEEK_END)
    return ["truncated: no end-of-archive mark"] if file.read().strip(b"\0") else []


def _reason(error: Exception) -> str:
    """The first line of the reader's message, without the file object that webdataset appends."""
    text = str(error.args[0] if error.args else error).split(" @ ")[0].strip()
    return text.splitlines()[0] if text else type(error).__name__
