"""Raw samples of a shard, read with webdataset's tar iterators."""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from distill.data.shards.errors import UnreadableShard

_BUFFER = 1 << 20
_END = 1024  # bytes of zeros that end a tar archive
_META = re.compile(r"^__[^/]*__($|/)")  # names that webdataset keeps for itself
EXPANSION, ROOM = 100, 1 << 28  # a compressed shard may unpack to so many times its size, and to so many bytes anyway


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
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for its writer
            raise UnreadableShard("is not a regular file")
        file = open(path, "rb", buffering=_BUFFER)
    except OSError as error:
        raise UnreadableShard(f"cannot be opened: {error.strerror}") from None
    with file:
        files = _members(file, path, handler)
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


def _members(file: BinaryIO, path: str, handler: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """Name and bytes of each member, as `webdataset.tariterators.group_by_keys` takes them.

    A member that would take far more memory than its shard takes on the disk is an error, before it is read.
    """
    unpacked, most = 0, ROOM + EXPANSION * os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                if not member.isreg() or _META.search(member.name):
                    continue
                unpacked += member.size
                if member.issparse() or unpacked > most:
                    kind = "is sparse" if member.issparse() else "unpacks to far more than the shard's size"
                    raise ValueError(f"{member.name} {kind} ({member.size:,} bytes); leave it out")
                stored = archive.extractfile(member)
                assert stored is not None
                yield {"fname": member.name, "data": stored.read(), "__url__": path}
                archive.members = []
    except Exception as error:  # tarfile, the decompressors and the disk each have their own
        handler(error)


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
