from __future__ import annotations

import gzip
import json
import os
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from distill.cli import main
from distill.data import prepare
from distill.data.shards.dataset import Shards
from distill.errors import BadInput

FASHION = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "fashion_mnist"


def stored(split: Path) -> dict[int, tuple[np.ndarray, int | None]]:
    """Key -> (x, label) by the plainest of readers."""
    import webdataset

    urls = [str(p) for p in sorted(split.glob("*.tar"))]
    samples = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
        x = sample.get("npy")
        if x is None:
            x = np.asarray(sample["png"])
        samples[int(sample["__key__"])] = (x, sample.get("cls"))
    return samples


def picture(path: Path, colour: tuple[int, int, int] | int, size: tuple[int, int] = (6, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)
    return path


# -- digits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "out"
    return out, prepare.digits(out, per_shard=400)


def test_digits_are_all_there_unchanged_and_split_by_class(digits):
    from sklearn.datasets import load_digits

    out, infos = digits
    source = load_digits()
    parts = {s: Shards(out / s, 8).all() for s in ("train", "test")}
    assert len(parts["train"]["x"]) + len(parts["test"]["x"]) == 1797
    pairs = [(((x + 1) * 8).round(), y) for p in parts.values() for x, y in zip(p["x"], p["label"])]
    ours = sorted((x.int().flatten().tolist(), y.item()) for x, y in pairs)
    theirs = sorted((x.astype(int).flatten().tolist(), int(y)) for x, y in zip(source.images, source.target))
    assert ours == theirs
    share = torch.bincount(parts["test"]["label"]) / torch.bincount(torch.cat([p["label"] for p in parts.values()]))
    assert (share - 0.2).abs().max() < 0.01
    assert infos["train"].shape == (1, 8, 8) and infos["train"].classes == 10


def test_index_states_the_facts(digits):
    out, infos = digits
    facts = json.loads((out / "train" / "index.json").read_text())
    assert [s["count"] for s in facts["shards"]] == [400, 400, 400, infos["train"].count - 1200]
    assert all(s["bytes"] == (out / "train" / s["name"]).stat().st_size for s in facts["shards"])
    assert facts["shape"] == [1, 8, 8] and facts["range"] == [0, 16] and facts["class_names"] == list("0123456789")
    assert facts["version"] == 1 and facts["dtype"] == "uint8" and facts["source"] and facts["std"] > 0
    assert Shards(out / "train", 8).info == infos["train"]


def test_the_same_seed_gives_the_same_bytes(digits, tmp_path):
    out, _ = digits
    prepare.digits(tmp_path / "again", per_shard=400)
    files = [p.relative_to(out) for p in out.rglob("*") if p.is_file()]
    assert files and all((out / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_each_shard_is_a_fair_sample(digits):
    out, _ = digits
    labels = Shards(out / "train", 8).all()["label"][:400]
    assert torch.bincount(labels, minlength=10).min() > 20


def test_an_existing_out_is_never_touched(digits, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(BadInput, match="exists already"):
        prepare.digits(tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="exists already"):
        prepare.digits(tmp_path / "dangling")


# -- images ----------------------------------------------------------------------------------------------------------


def test_images_keep_their_pixels_classes_and_captions(tmp_path):
    rng = np.random.default_rng(0)
    pixels = {}
    for i in range(12):
        path = picture(tmp_path / "src" / ("cat", "dog")[i % 2] / f"{i}.png", 0)
        pixels[i] = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels[i]).save(path)
        path.with_suffix(".txt").write_text(f"number {i}, ünïcode")
    info = prepare.images(tmp_path / "src", tmp_path / "out", test=0)["train"]
    assert info.names == ("cat", "dog") and info.shape == (3, 5, 7) and info.captions and info.classes == 2
    whole = Shards(tmp_path / "out" / "train", 4).all()
    assert len(whole["x"]) == 12
    for x, label, caption in zip(whole["x"], whole["label"], whole["caption"]):
        i = int(caption.split()[1].strip(","))
        assert label == i % 2 and caption == f"number {i}, ünïcode"
        assert torch.equal(((x + 1) * 127.5).round().byte(), torch.from_numpy(pixels[i].transpose(2, 0, 1)))
    batch = next(Shards(tmp_path / "out" / "train", 4, cache_mb=0, workers=1).loader())
    assert len(batch["caption"]) == 4


def test_images_are_brought_to_one_size(tmp_path):
    picture(tmp_path / "src" / "a.png", (255, 0, 0), (8, 16))
    picture(tmp_path / "src" / "b.jpg", (255, 0, 0), (20, 10))
    with pytest.raises(BadInput, match=r"a\.png is 8x16 and .*b\.jpg is 20x10: give --size"):
        prepare.images(tmp_path / "src", tmp_path / "out")
    info = prepare.images(tmp_path / "src", tmp_path / "out", size=4)["train"]
    assert info.shape == (3, 4, 4) and info.classes == 0
    batch = Shards(tmp_path / "out" / "train", 1).all()
    assert set(batch) == {"x"} and (batch["x"][:, 0] > 0.9).all() and (batch["x"][:, 1:] < -0.9).all()


def test_a_tenth_of_the_images_is_held_out_unless_the_folder_has_splits(tmp_path):
    for i in range(20):
        picture(tmp_path / "flat" / f"{i}.png", i)
    written = prepare.images(tmp_path / "flat", tmp_path / "out")
    assert {s: i.count for s, i in written.items()} == {"train": 18, "test": 2} and written["train"].shape == (1, 6, 6)
    picture(tmp_path / "two" / "train" / "b" / "1.png", 1)
    picture(tmp_path / "two" / "train" / "a" / "1.png", 2)
    picture(tmp_path / "two" / "test" / "b" / "1.png", 3)
    written = prepare.images(tmp_path / "two", tmp_path / "two_out")
    assert {s: (i.count, i.classes) for s, i in written.items()} == {"train": (2, 2), "test": (1, 2)}
    assert Shards(tmp_path / "two_out" / "test", 1).all()["label"].tolist() == [1]
    picture(tmp_path / "two" / "test-new" / "b" / "1.png", 3)
    assert {s: i.count for s, i in prepare.images(tmp_path / "two", tmp_path / "three_out").items()} == {
        "train": 2,
        "test": 1,
        "test-new": 1,
    }


def write_damaged(src: Path, damage: str) -> None:
    if damage == "missing":
        return
    src.mkdir()
    if damage == "empty":
        (src / "notes.txt").write_text("no image")
        return
    picture(src / "1.png", 1)
    picture(src / "2.png", 1)
    if damage == "garbage":
        (src / "2.png").write_bytes(b"not an image")
    elif damage == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(src / "1.png")
        (src / "2.png").write_bytes((src / "1.png").read_bytes()[:900])
    elif damage == "caption":
        (src / "1.txt").write_text("only one")
    elif damage == "half sorted":
        picture(src / "class" / "3.png", 1)
    elif damage == "deep":
        Image.fromarray(np.zeros((6, 6), np.uint16)).save(src / "2.png")


@pytest.mark.parametrize(
    "damage, words",
    {
        "missing": "is not a folder",
        "empty": "holds no images",
        "garbage": r"2\.png cannot be read as an image",
        "truncated": r"2\.png cannot be read as an image",
        "caption": r"2\.png has no caption",
        "half sorted": "class folders",
        "deep": r"2\.png .*8 bits",
    }.items(),
)
def test_bad_image_folders_are_refused_and_leave_nothing(tmp_path, damage, words):
    write_damaged(tmp_path / "src", damage)
    with pytest.raises(BadInput, match=words):
        prepare.images(tmp_path / "src", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} <= {"src"}


def test_hidden_folders_are_ignored(tmp_path):
    for name in ("a", "b"):
        for i in range(3):
            picture(tmp_path / "src" / name / f"{i}.png", i)
    picture(tmp_path / "src" / ".ipynb_checkpoints" / "0-checkpoint.png", 9)
    picture(tmp_path / "src" / "a" / ".ipynb_checkpoints" / "1-checkpoint.png", 9)
    picture(tmp_path / "src" / "a" / "._2.png", 9)
    info = prepare.images(tmp_path / "src", tmp_path / "out", test=0)["train"]
    assert info.names == ("a", "b") and info.count == 6


def test_the_byte_order_mark_of_a_caption_is_no_text(tmp_path):
    for i, encoding in enumerate(("utf-8", "utf-8-sig")):
        picture(tmp_path / "src" / f"{i}.png", i).with_suffix(".txt").write_text("the dog’s day", encoding=encoding)
    prepare.images(tmp_path / "src", tmp_path / "out", test=0)
    assert Shards(tmp_path / "out" / "train", 2).all()["caption"] == ["the dog’s day"] * 2


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_captions_in_other_encodings_are_refused_by_name(tmp_path, encoding):
    picture(tmp_path / "src" / "0.png", 0).with_suffix(".txt").write_text("the dog’s day", encoding=encoding)
    with pytest.raises(BadInput, match=r"0\.txt cannot be read .*save it as UTF-8"):
        prepare.images(tmp_path / "src", tmp_path / "out", test=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["0", "-4"])
def test_a_size_below_one_is_one_sentence(tmp_path, size):
    picture(tmp_path / "src" / "0.png", 0)
    result = CliRunner().invoke(main, ["data", "images", str(tmp_path / "src"), str(tmp_path / "out"), "--size", size])
    assert result.exit_code == 2 and result.output == f"distill: size={size} must be at least 1.\n"
    assert not (tmp_path / "out").exists()


# -- npz -------------------------------------------------------------------------------------------------------------


def test_npz_round_trip_in_every_layout(tmp_path):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (30, 3, 5, 6), dtype=np.uint8)
    y = np.arange(30) % 3
    last, grey = np.moveaxis(first, 1, -1), first[:, 0]
    for name, x, stated in (("first", first, None), ("last", last, None), ("grey", grey, "none")):
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
        info = prepare.npz(tmp_path / f"{name}.npz", tmp_path / name, channels=stated, test=0, per_shard=7)["train"]
        want = first if name != "grey" else first[:, :1]
        assert info.shape == want.shape[1:] and info.classes == 3 and info.count == 30
        samples = stored(tmp_path / name / "train")
        assert all(np.array_equal(samples[i][0], want[i]) and samples[i][1] == y[i] for i in range(30))


def test_npz_keeps_floats_and_vectors(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 2)) * 3
    np.savez(tmp_path / "v.npz", x=x)
    with pytest.raises(BadInput, match=r"pass the range that maps to \[-1, 1\]"):
        prepare.npz(tmp_path / "v.npz", tmp_path / "out")
    info = prepare.npz(tmp_path / "v.npz", tmp_path / "out", range=(-1, 1), test=0.25)
    assert info["train"].shape == (2,) and info["train"].classes == 0 and info["test"].count == 10
    both = torch.cat([Shards(tmp_path / "out" / s, 1).all()["x"] for s in info])
    assert torch.equal(both.sort(0).values, torch.from_numpy(x.astype(np.float32)).sort(0).values)
    scaled = prepare.npz(tmp_path / "v.npz", tmp_path / "scaled", range=(-10, 10), test=0)["train"]
    got = Shards(tmp_path / "scaled" / "train", 1).all()["x"].sort(0).values
    assert torch.allclose(got, torch.from_numpy(x.astype(np.float32) / 10).sort(0).values, atol=1e-6)
    assert scaled.std == pytest.approx((x / 10).std(), rel=1e-6)
    assert scaled.mean == pytest.approx((x / 10).mean(), rel=1e-4)


def test_npz_takes_splits_of_its_own(tmp_path):
    x = np.zeros((5, 4, 4), np.uint8)
    np.savez(tmp_path / "m.npz", x_train=x, y_train=np.arange(5), x_test=x[:2], y_test=np.arange(2))
    written = prepare.npz(tmp_path / "m.npz", tmp_path / "out")
    assert {s: (i.count, i.classes) for s, i in written.items()} == {"train": (5, 5), "test": (2, 5)}


@pytest.mark.parametrize(
    "arrays, options, words",
    [
        ({"z": np.zeros((3, 4))}, {}, "holds z, but no array x"),
        ({"x": np.zeros((3, 3, 4, 3), np.uint8)}, {}, "channel order is unclear: pass --channels"),
        ({"x": np.zeros((3, 5, 4, 6), np.uint8)}, {}, "channel order is unclear: pass --channels"),
        ({"x": np.zeros((3, 4), np.uint8)}, {"channels": "middle"}, "pass --channels first"),
        ({"x": np.zeros((3, 4), np.uint8), "y": np.zeros(2, int)}, {}, "one whole number from 0 up for each of 3"),
        ({"x": np.zeros((3, 4), np.uint8), "y": np.full(3, -1)}, {}, "one whole number from 0 up"),
        ({"x": np.full((3, 4), np.nan)}, {}, "NaN"),
        ({"x": np.array([{}, {}], object)}, {}, "cannot be read as .npz"),
        ({"x": np.zeros((3, 4), np.int64)}, {}, "pass the range that maps to"),
        ({"x": np.zeros((3, 4), np.uint8)}, {"range": (1, 1)}, "the lower first"),
        ({"x": np.zeros((3, 4), np.uint8), "y": np.arange(3)}, {"names": ["a"]}, "names lists 1 classes"),
        ({"x": np.zeros((3, 4), np.uint8)}, {"test": 1.0}, "test=1.0"),
        ({"x": np.zeros((3, 4), np.uint8)}, {"per_shard": 0}, "per_shard=0"),
    ],
)
def test_bad_npz_is_refused(tmp_path, arrays, options, words):
    np.savez(tmp_path / "src.npz", **arrays)
    with pytest.raises(BadInput, match=words):
        prepare.npz(tmp_path / "src.npz", tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["src.npz"]


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 broken")
    for name in ("a.npz", "absent.npz"):
        with pytest.raises(BadInput, match="cannot be read as .npz"):
            prepare.npz(tmp_path / name, tmp_path / "out")
    np.save(tmp_path / "plain.npy", np.zeros((3, 3)))
    with pytest.raises(BadInput, match="cannot be read as .npz"):
        prepare.npz(tmp_path / "plain.npy", tmp_path / "out")


# -- idx -------------------------------------------------------------------------------------------------------------


def idx_folder(folder: Path, counts: dict[str, int]) -> dict[str, np.ndarray]:
    folder.mkdir()
    rng, pixels = np.random.default_rng(0), {}
    for prefix, n in counts.items():
        x = pixels[prefix] = rng.integers(0, 256, (n, 5, 4), dtype=np.uint8)
        images = struct.pack(">4B3I", 0, 0, 8, 3, *x.shape) + x.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = struct.pack(">4BI", 0, 0, 8, 1, n) + bytes(i % 3 for i in range(n))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return pixels


def test_idx_round_trip(tmp_path):
    pixels = idx_folder(tmp_path / "src", {"train": 11, "t10k": 6})
    infos = prepare.idx(tmp_path / "src", tmp_path / "out", names=["a", "b", "c"], per_shard=4)
    assert infos["train"].names == ("a", "b", "c") and infos["test"].shape == (1, 5, 4) and infos["test"].classes == 3
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        samples = stored(tmp_path / "out" / split)
        assert len(samples) == len(pixels[prefix])
        assert all(np.array_equal(samples[i][0][0], pixels[prefix][i]) and samples[i][1] == i % 3 for i in samples)


@pytest.mark.parametrize("damage", ["absent", "magic", "short", "labels", "count", "twice"])
def test_bad_idx_is_refused(tmp_path, damage):
    idx_folder(tmp_path / "src", {"train": 6, "t10k": 3})
    labels, pictures = tmp_path / "src" / "train-labels-idx1-ubyte", tmp_path / "src" / "train-images-idx3-ubyte.gz"
    words = {
        "absent": "lacks train-images-idx3-ubyte",
        "magic": "starts with 00000d01 where idx files have 00000801",
        "short": "cannot be read|holds .* bytes",
        "labels": "lacks t10k-labels-idx1-ubyte",
        "count": "6 images, train-labels-idx1-ubyte 5 labels",
        "twice": "both claim to be the train labels",
    }[damage]
    if damage == "absent":
        pictures.unlink()
    elif damage == "magic":
        labels.write_bytes(b"\0\0\x0d\x01" + labels.read_bytes()[4:])
    elif damage == "short":
        pictures.write_bytes(pictures.read_bytes()[:-20])
    elif damage == "labels":
        (tmp_path / "src" / "t10k-labels-idx1-ubyte").unlink()
    elif damage == "count":
        labels.write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 5) + bytes(5))
    else:
        labels.with_suffix(".gz").write_bytes(gzip.compress(labels.read_bytes()))
    with pytest.raises(BadInput, match=words):
        prepare.idx(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason=f"needs Fashion-MNIST's idx files in {FASHION} (set DISTILL_DATA)")
def test_fashion_mnist(tmp_path):
    infos = prepare.idx(FASHION, tmp_path / "out")
    assert {s: (i.count, i.classes, i.shape) for s, i in infos.items()} == {
        "train": (60_000, 10, (1, 28, 28)),
        "test": (10_000, 10, (1, 28, 28)),
    }
    assert (infos["train"].mean + 1) / 2 == pytest.approx(0.2860, abs=1e-4)
    assert infos["train"].std / 2 == pytest.approx(0.3530, abs=1e-4)
    whole = Shards(tmp_path / "out" / "test", 100).all()
    assert torch.bincount(whole["label"]).tolist() == [1000] * 10
    streamed = Shards(tmp_path / "out" / "train", 100, cache_mb=0)
    seen = sum(torch.bincount(b["label"], minlength=10) for b in islice(streamed.loader(), 100))
    assert seen.min() > 800


# -- shards from elsewhere -------------------------------------------------------------------------------------------


def test_index_of_foreign_shards_states_what_reading_them_finds(uneven):
    foreign = Shards(uneven, 4)
    prepare.index_of(uneven)
    indexed = Shards(uneven, 4)
    assert indexed.info == foreign.info and [t.count for t in indexed.tars] == [1, 7, 40]
    assert torch.equal(indexed.all()["x"], foreign.all()["x"])
    with pytest.raises(BadInput, match="exists already"):
        prepare.index_of(uneven)


def test_index_of_damaged_shards_is_refused(uneven):
    (uneven / "0.tar").write_bytes(b"")
    with pytest.raises(BadInput, match=r"0\.tar .*damaged"):
        prepare.index_of(uneven)
    assert not (uneven / "index.json").exists()
