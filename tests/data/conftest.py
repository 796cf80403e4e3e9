from __future__ import annotations

import pytest
from shard_makers import members, numbered, tar

from distill.data.info import Info
from distill.data.shards.write import write_splits


@pytest.fixture
def split(tmp_path):
    """100 samples, 4 shards of 25, 5 classes."""
    write_splits(
        tmp_path / "set", {"train": numbered(100)}, Info((), 5, range=(0.0, 255.0), source="numbers"), per_shard=25
    )
    return tmp_path / "set" / "train"


@pytest.fixture
def uneven(tmp_path):
    """48 samples without index in shards of 1, 7 and 40."""
    sizes, first = (1, 7, 40), 0
    for n, size in enumerate(sizes):
        tar(tmp_path / "uneven" / f"{n}.tar", {f"{i:03d}": members(i) for i in range(first, first + size)})
        first += size
    return tmp_path / "uneven"
