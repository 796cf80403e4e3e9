from __future__ import annotations

import builtins
import errno
import gc
import os
import sys

import numpy as np
import pytest
from shard_makers import numbered

from distill.data.info import Info
from distill.data.shards import order
from distill.data.shards import write as writer
from distill.data.shards.write import Split, create_folder, write_splits
from distill.errors import BadInput

INFO = Info((), 5, range=(0.0, 255.0), source="numbers")


def test_a_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    part = numbered(10)
    broken = Split(lambda i: part.x(i) if i != 7 else 1 / 0, 10, part.label)
    with pytest.raises(ZeroDivisionError):
        write_splits(tmp_path / "out", {"train": broken}, INFO)
    assert not list(tmp_path.iterdir())
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    gc.collect()
    assert not complaints


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    real = builtins.open

    def full(path, mode="r", *rest, **named):
        if str(path).endswith("000001.tar") and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *rest, **named)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(BadInput, match="out cannot be written .No space left on device.: make room"):
        write_splits(tmp_path / "out", {"train": numbered(10)}, INFO, per_shard=5)
    assert not list(tmp_path.iterdir())


def test_out_appears_only_when_whole(tmp_path):
    with create_folder(tmp_path / "a" / "out") as stage:
        assert stage.is_dir() and stage.parent == tmp_path / "a" and not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out").is_dir() and len(list((tmp_path / "a").iterdir())) == 1


def test_out_may_hold_any_character(tmp_path):
    out = tmp_path / "100%d {a,b} [x] pipe:"
    assert write_splits(out, {"train": numbered(3)}, INFO)["train"].count == 3
    from distill.data.shards.dataset import Shards

    assert len(Shards(out / "train", 2).all()["x"]) == 3


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(BadInput, match="numbers holds no samples"):
        write_splits(tmp_path / "out", {"train": Split(lambda i: None, 0)}, INFO)
    assert not list(tmp_path.iterdir())


def test_large_shards_are_split_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 600)
    write_splits(tmp_path / "out", {"train": numbered(12)}, INFO)
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) > 2


def test_samples_of_another_shape_are_refused(tmp_path):
    x = [np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 3), np.uint8)]
    with pytest.raises(BadInput, match="give data of one shape"):
        write_splits(tmp_path / "out", {"train": Split(x.__getitem__, 2)}, INFO)
    assert not list(tmp_path.iterdir())


def test_held_out_part_is_disjoint_stratified_and_depends_on_the_seed():
    part = numbered(100, classes=4)

    def rows(seed):
        splits = part.hold_out(0.2, seed)
        return {name: [int(split.x(i).flat[0]) for i in range(split.count)] for name, split in splits.items()}

    split = rows(0)
    assert sorted(split["train"] + split["test"]) == list(range(100)) and len(split["test"]) == 20
    assert np.bincount([i % 4 for i in split["test"]]).tolist() == [5] * 4
    assert split == rows(0) and split != rows(1)
    assert part.hold_out(0.2, 0)["test"].label.tolist() == [i % 4 for i in split["test"]]


@pytest.mark.parametrize("counts, share, total", [([5, 5], 0.3, 3), ([1] * 50, 0.1, 5), ([7, 2, 1], 0.5, 5)])
def test_the_test_split_has_its_share_of_all_and_of_each_class(counts, share, total):
    label = np.repeat(np.arange(len(counts)), counts)
    splits = order.hold_out(len(label), share, 0, label)
    held = np.bincount(label[splits["test"]], minlength=len(counts))
    assert held.sum() == total and (np.abs(held - share * np.array(counts)) < 1).all()
    assert sorted([*splits["train"], *splits["test"]]) == list(range(len(label)))
