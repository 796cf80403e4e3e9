from __future__ import annotations

import json

import numpy as np
import pytest
from shard_makers import members, numbered, numbers, tar

from distill.data.info import Info
from distill.data.shards.dataset import Shards
from distill.data.shards.write import Split, write_splits
from distill.data.sources import array, image
from distill.errors import BadInput


@pytest.fixture
def inside(uneven, monkeypatch):
    monkeypatch.chdir(uneven.parent)
    return uneven


@pytest.mark.parametrize(
    "path, count",
    {
        "uneven": 48,
        "uneven/": 48,
        "uneven/*.tar": 48,
        "uneven/{0,2}.tar": 41,
        "uneven/{0..1}.tar": 8,
        "uneven/[12].tar": 47,
        "uneven/1.tar": 7,
    }.items(),
)
def test_paths_and_patterns(inside, path, count):
    source = Shards(path, 4)
    assert source.info.count == count == len(set(numbers(source.all()))) and source.info.classes == min(5, count)
    assert source.info.path == path


def test_a_list_of_paths(inside):
    assert Shards(["uneven/0.tar", "uneven/2.tar"], 4).info.count == 41


def test_part_of_an_indexed_folder(split):
    source = Shards(f"{split}/00000{{0,3}}.tar", 4)
    assert source.info.count == 50 and source.info.classes == 5


def test_a_missing_shard_of_a_pattern_is_damage_and_none_at_all_is_refused(inside):
    source = Shards("uneven/{0..5}.tar", 4)
    assert source.info.count == 48 and len(source.errors.entries) == 3
    with pytest.raises(BadInput, match="does not exist"):
        Shards("uneven/{7..9}.tar", 4)


@pytest.mark.parametrize(
    "path, words",
    {
        "nowhere": "nowhere does not exist: write shards",
        "none/*.tar": "does not exist",
        "s3://bucket/a.tar": "is not a path: copy or mount",
        "pipe:touch hacked": "is not a path",
        "uneven/{0..1.tar": "unbalanced|does not exist",
        ".": "holds no shards",
    }.items(),
)
def test_bad_paths(inside, path, words):
    with pytest.raises(BadInput, match=words):
        Shards(path, 4)
    assert not (inside.parent / "hacked").exists()


def test_the_folder_above_the_splits_names_them(split):
    with pytest.raises(BadInput, match="give one of its splits: .*train"):
        Shards(split.parent, 4)


def test_shards_of_another_shape_are_refused(uneven):
    tar(uneven / "3.tar", {"a": members(1, side=6)})
    with pytest.raises(BadInput, match=r"0\.tar and .*3\.tar differ in shape: .*\(1, 4, 4\).*\(1, 6, 6\)"):
        Shards(uneven, 4)


def test_shards_without_labels_among_labelled_ones_are_refused(uneven):
    tar(uneven / "3.tar", {"a": {"npy": members(1)["npy"]}})
    with pytest.raises(BadInput, match="differ in number of classes"):
        Shards(uneven, 4)


def test_sets_of_another_class_count_are_refused(tmp_path, split):
    write_splits(tmp_path / "b", {"train": numbered(9, 3)}, Info((), 3, range=(0.0, 255.0), source="numbers"))
    with pytest.raises(BadInput, match="differ in number of classes: 5 classes.* against 3 classes"):
        Shards([str(split), str(tmp_path / "b" / "train")], 4)


def test_sets_of_another_range_are_refused(tmp_path, split):
    write_splits(tmp_path / "b", {"train": numbered(9)}, Info((), 5, range=(0.0, 16.0), source="numbers"))
    with pytest.raises(BadInput, match="differ in range"):
        Shards([str(split), str(tmp_path / "b" / "train")], 4)


def test_two_sets_read_as_one(tmp_path, split):
    write_splits(tmp_path / "b", {"train": numbered(9)}, Info((), 5, range=(0.0, 255.0), source="numbers"))
    source = Shards([str(split), str(tmp_path / "b" / "train")], 4)
    assert source.info.count == 109 == len(source.all()["x"]) and source.info.mean is None


def test_foreign_images_with_captions(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    samples = {str(i): {"png": image.encode(x), "txt": f"no {i}".encode()} for i, x in enumerate(pixels)}
    tar(tmp_path / "a.tar", samples)
    whole = Shards(tmp_path, 2).all()
    assert whole["caption"] == ["no 0", "no 1", "no 2", "no 3"] and "label" not in whole
    assert (((whole["x"] + 1) * 127.5).round().byte().numpy() == pixels).all()
    assert next(Shards(tmp_path, 2, size=3).loader())["x"].shape == (2, 3, 3, 3)


def test_size_is_for_images_only(tmp_path):
    tar(tmp_path / "a.tar", {"0": {"npy": array.encode(np.zeros((1, 4, 4), np.float32))}})
    with pytest.raises(BadInput, match="size=2 resizes images"):
        Shards(tmp_path, 2, size=2)


def edited(split, **changes):
    path = split / "index.json"
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not ...}))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"version": 3}, "version 3.* install a later one"),
        ({"format": "other"}, "'other'"),
        ({"shape": ...}, r"index\.json lacks 'shape'"),
        ({"shards": [{"name": "../x.tar", "count": 1, "bytes": 1}]}, "not in its folder"),
        ({"shards": 3}, r"index\.json cannot be read"),
    ],
)
def test_a_broken_index_is_named(split, changes, words):
    edited(split, **changes)
    with pytest.raises(BadInput, match=words):
        Shards(split, 4)


def test_an_index_that_is_not_json_is_named(split):
    (split / "index.json").write_text('{"format": ')
    with pytest.raises(BadInput, match=r"index\.json cannot be read.*write the shards again"):
        Shards(split, 4)


def test_vectors_and_half_floats(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float16)
    write_splits(tmp_path / "o", {"train": Split(x.__getitem__, 6)}, Info((), source="halves"))
    got = Shards(tmp_path / "o" / "train", 2).all()["x"].numpy()
    assert got.dtype == np.float32 and sorted(map(tuple, got)) == sorted(map(tuple, x.astype(np.float32)))
