"""Small files that would fill the memory, and files that never end: refused before they are read."""

from __future__ import annotations

import io
import os
import resource
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from shard_makers import members, tar

from distill.data.shards import tar as reader
from distill.data.shards.errors import UnreadableShard
from distill.data.sources import image

BIG = 1_800_000_000


def sparse(path: Path) -> Path:
    """A shard of a few kilobytes with a sparse member of 1.8 GB, in the PAX format 1.0."""
    blocks = b"1\n1799999999\n1\n"  # one block of one byte, at the end
    stored = blocks.ljust(512, b"\0") + b"x"
    info = tarfile.TarInfo("GNUSparseFile.0/000.npy")
    info.size = len(stored)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "000.npy",
        "GNU.sparse.realsize": str(BIG),
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        out.addfile(info, io.BytesIO(stored))
    return path


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def compressed(path: Path) -> Path:
    """A .tar.gz of less than a megabyte whose member unpacks to 600 MB."""
    with tarfile.open(path, "w:gz", compresslevel=9) as out:
        info = tarfile.TarInfo("000.npy")
        info.size = 600_000_000
        out.addfile(info, Zeros())
    return path


def peak(again: bool = False) -> int:
    """Largest resident size in bytes, on Linux since the last call with `again`: else that of a whole suite."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if again:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


@pytest.mark.parametrize(
    "make, name, says", [(sparse, "a.tar", "is sparse"), (compressed, "a.tar.gz", "unpacks to far")]
)
def test_a_shard_that_grows_is_refused_before_it_grows(tmp_path, make, name, says):
    path = make(tmp_path / name)
    assert path.stat().st_size < 1 << 21
    before = peak(again=True)
    with pytest.raises(UnreadableShard, match=says):
        list(reader.samples(str(path)))
    assert peak() - before < 100e6


def test_a_compressed_shard_of_common_size_is_read(tmp_path):
    plain = tar(tmp_path / "a.tar", {f"{i:03d}": members(i) for i in range(40)})
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as out, tarfile.open(plain) as stored:
        for member in stored:
            out.addfile(member, stored.extractfile(member))
    without = lambda path: [{k: v for k, v in s.items() if k != "__url__"} for s in reader.samples(str(path))]
    assert without(tmp_path / "a.tar.gz") == without(plain) and len(without(plain)) == 40


def png(width: int, height: int) -> bytes:
    """A black grey image: a header and rows of zeros, which shrink a thousand times."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(width + 1)) for _ in range(height)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13_000, 20_000])  # of 169 megapixels Pillow warns, 400 it refuses
def test_an_image_of_very_many_pixels_is_refused_by_its_header(side, recwarn):
    data, before = png(side, side), peak(again=True)
    for read in (image.decode, image.probe):
        with pytest.raises(ValueError, match="more than 89 million pixels"):
            read(data)
    assert peak() - before < 100e6 and not recwarn
    assert image.decode(png(300, 200)).shape == (1, 200, 300)


def test_a_pipe_as_shard_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UnreadableShard, match="is not a regular file"):
        list(reader.samples(str(tmp_path / "a.tar")))
