from __future__ import annotations

import builtins
import errno
import gc
import os
import sys

import numpy as np
import pytest
from shard_makers import numbered

from distill.data import pack
from distill.data.info import Info
from distill.data.pack import Part, hold_out, shards, staged
from distill.errors import BadInput

INFO = Info((), 5, range=(0.0, 255.0), source="numbers")


def test_a_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    part = numbered(10)
    broken = Part(lambda i: part.x(i) if i != 7 else 1 / 0, 10, part.label)
    with pytest.raises(ZeroDivisionError):
        shards(tmp_path / "out", {"train": broken}, INFO)
    assert not list(tmp_path.iterdir())
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    gc.collect()
    assert not complaints


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    real = builtins.open

    def full(path, mode="r", *rest, **named):
        if str(path).endswith("000001.tar") and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *rest, **named)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(BadInput, match="out cannot be written .No space left on device.: make room"):
        shards(tmp_path / "out", {"train": numbered(10)}, INFO, per_shard=5)
    assert not list(tmp_path.iterdir())


def test_out_appears_only_when_whole(tmp_path):
    with staged(tmp_path / "a" / "out") as stage:
        assert stage.is_dir() and stage.parent == tmp_path / "a" and not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out").is_dir() and len(list((tmp_path / "a").iterdir())) == 1


def test_out_may_hold_any_character(tmp_path):
    out = tmp_path / "100%d {a,b} [x] pipe:"
    assert shards(out, {"train": numbered(3)}, INFO)["train"].count == 3
    from distill.data.shards import Shards

    assert len(Shards(out / "train", 2).all()["x"]) == 3


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(BadInput, match="numbers holds no samples"):
        shards(tmp_path / "out", {"train": Part(lambda i: None, 0)}, INFO)
    assert not list(tmp_path.iterdir())


def test_large_shards_are_split_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_SHARD_BYTES", 600)
    shards(tmp_path / "out", {"train": numbered(12)}, INFO)
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) > 2


def test_held_out_part_is_disjoint_stratified_and_depends_on_the_seed():
    part = numbered(100, classes=4)

    def rows(seed):
        return {k: [int(p.x(i).flat[0]) for i in range(p.count)] for k, p in hold_out(part, 0.2, seed).items()}

    split = rows(0)
    assert sorted(split["train"] + split["test"]) == list(range(100)) and len(split["test"]) == 20
    assert np.bincount([i % 4 for i in split["test"]]).tolist() == [5] * 4
    assert split == rows(0) and split != rows(1)
    assert hold_out(part, 0.2, 0)["test"].label.tolist() == [i % 4 for i in split["test"]]
