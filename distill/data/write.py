"""Shards out: digits, image folders, .npz and idx files to `OUT/train/*.tar` and `OUT/test/*.tar`, with an index.json.

Everything is written beside OUT and renamed at the end: OUT is whole or absent, and an existing OUT is never touched.
The same source and seed give the same bytes. Samples are stored in a random order, so a shard is a fair sample of its
split; a sample's key is its place in its split of the source. Values are kept as they are, arrays as .npy, images as
.png.

All writers return what they wrote, by split, and share these arguments:

    test: share held out, the same of every class; for sources without splits of their own
    seed: of the held-out share and of the stored order
    per_shard: largest number of samples in a shard
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from distill.data import folder, index
from distill.data import idx as idx_files
from distill.data import npz as npz_files
from distill.data.info import Info
from distill.data.pack import SHARD, Part, hold_out, shards
from distill.errors import BadInput

__all__ = ["Part", "digits", "hold_out", "idx", "images", "index_of", "npz", "shards"]


def digits(out: str | os.PathLike, *, test: float = 0.2, seed: int = 0, per_shard: int = SHARD) -> dict[str, Info]:
    """scikit-learn's 1,797 handwritten digits, uint8 (1, 8, 8) in 0..16, ten classes; nothing is downloaded.

    https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html

    Raises:
        BadInput: OUT exists or cannot be written.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    x = found.images.astype(np.uint8)[:, None]
    part = Part(x.__getitem__, len(x), found.target.astype(np.int64))
    info = Info((), 10, names=tuple(map(str, range(10))), range=(0.0, 16.0), source="scikit-learn digits")
    return shards(out, hold_out(part, test, seed), info, seed=seed, per_shard=per_shard)


def images(
    src: str | os.PathLike,
    out: str | os.PathLike,
    size: int | None = None,
    *,
    channels: int | None = None,
    test: float = 0.1,
    seed: int = 0,
    per_shard: int = SHARD,
) -> dict[str, Info]:
    """A folder of images: the sub-folder is the class, a .txt of the same name beside an image its caption.

    With a folder `train` at the top, and only `test`, `val` and the like beside it, these are the splits.

    Args:
        src: the folder; classes are numbered by sorted name.
        out: the folder to make.
        size: resize the shorter side to it and cut out the middle; None wants images of one size.
        channels: 1 or 3; None is 1 if all images are grey.

    Raises:
        BadInput: no images, unreadable or mixed ones, captions for some only; OUT exists or cannot be written.
    """
    src = Path(src).expanduser()
    found = folder.splits(src)
    every = [file for files in found.values() for file, _ in files]
    names = sorted({name for files in found.values() for _, name in files if name is not None})
    channels, captions = channels or folder.channels(every, size), folder.captions(every)
    number = {name: i for i, name in enumerate(names)}
    parts = {}
    for split, files in found.items():
        label = np.array([number[n] for _, n in files], np.int64) if names else None
        caption = [captions[f] for f, _ in files] if captions else None
        parts[split] = Part(lambda i, f=files: folder.pixels(f[i][0], channels, size), len(files), label, caption)
    info = Info((), len(names), names=tuple(names), range=(0.0, 255.0), captions=bool(captions), source=_named(src))
    parts = hold_out(parts[""], test, seed) if "" in parts else parts
    return shards(out, parts, info, member="png", seed=seed, per_shard=per_shard)


def npz(
    src: str | os.PathLike,
    out: str | os.PathLike,
    *,
    channels: str | None = None,
    range: tuple[float, float] | list[float] | None = None,
    names: list[str] | None = None,
    test: float = 0.1,
    seed: int = 0,
    per_shard: int = SHARD,
) -> dict[str, Info]:
    """An .npz with x (or images, data) and, for classes, y (or label, labels); or x_train, y_train, x_test, y_test.

    Args:
        src: the file.
        out: the folder to make.
        channels: "first" for (N, C, ...), "last" for (N, H, W, C), "none" for (N, H, W); None finds it out from where
            1, 3 or 4 stands. (N, D) needs none of it.
        range: values that stand for -1 and 1; None takes (0, 255) for uint8, and values within [-1, 1] on both sides
            of 0 as they are. State (-1, 1) to keep other values unscaled, such as latents.
        names: of the classes.

    Raises:
        BadInput: no such arrays, unclear channel order or range, values not finite; OUT exists or cannot be written.
    """
    src = Path(src).expanduser()
    found = npz_files.splits(npz_files.read(src), src)
    low_high = npz_files.value_range([x for x, _ in found.values()], range, src)
    parts = {}
    for split, (x, label) in found.items():
        x = npz_files.stored(npz_files.channels_first(x, channels, src))
        parts[split] = Part(x.__getitem__, len(x), label)
    classes = _classes(parts, src)
    info = Info((), classes, names=_names(names, classes, src), range=low_high, source=_named(src))
    parts = hold_out(parts[""], test, seed) if "" in parts else parts
    return shards(out, parts, info, seed=seed, per_shard=per_shard)


def idx(
    src: str | os.PathLike,
    out: str | os.PathLike,
    *,
    names: list[str] | None = None,
    seed: int = 0,
    per_shard: int = SHARD,
) -> dict[str, Info]:
    """A folder of MNIST's format: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-* for the test split, or .gz.

    Args:
        src: the folder.
        out: the folder to make.
        names: of the classes.

    Raises:
        BadInput: files missing, of another format or truncated; OUT exists or cannot be written.
    """
    src = Path(src).expanduser()
    parts = {}
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        pictures, labels = (idx_files.find(src, prefix, what) for what in ("images", "labels"))
        if not (pictures or labels) and split == "test":
            continue
        if not (pictures and labels):
            lacks = f"{prefix}-images-idx3-ubyte" if not pictures else f"{prefix}-labels-idx1-ubyte"
            raise BadInput(f"{src} lacks {lacks} (or its .gz): give a folder of MNIST's format.")
        x, label = idx_files.read(pictures, 3), idx_files.read(labels, 1)
        if len(x) != len(label):
            sizes = f"{len(x)} images, {labels.name} {len(label)} labels"
            raise BadInput(f"{pictures} holds {sizes}: take both of one set.")
        parts[split] = Part(x[:, None].__getitem__, len(x), label.astype(np.int64))
    classes = _classes(parts, src)
    info = Info((), classes, names=_names(names, classes, src), range=(0.0, 255.0), source=_named(src))
    return shards(out, parts, info, seed=seed, per_shard=per_shard)


def index_of(path: str | os.PathLike) -> Info:
    """Write an index.json for a folder of tar files from elsewhere, which are else looked through at every start.

    Raises:
        BadInput: there is an index already, a shard is damaged, or none is readable.
    """
    path = Path(path).expanduser()
    if (path / index.NAME).exists():
        raise BadInput(f"{path / index.NAME} exists already and is never overwritten: remove it first.")
    tars, info, damage, _ = index.find(path)
    if damage:
        raise BadInput(f"{damage[0]} is damaged: repair or remove it before the index is written.")
    index.write(path, info, [(Path(t.path).name, t.count, os.path.getsize(t.path)) for t in tars])
    return info


def _classes(parts: dict[str, Part], src: Path) -> int:
    labelled = {p.label is not None for p in parts.values()}
    if len(labelled) > 1:
        raise BadInput(f"{src} has labels for one split only: give labels for both, or for none.")
    return 1 + max((int(p.label.max()) for p in parts.values() if p.label is not None), default=-1)


def _names(names: list[str] | None, classes: int, src: Path) -> tuple[str, ...]:
    if names and len(names) != classes:
        raise BadInput(f"names lists {len(names)} classes, but {src} has {classes}: give one name a class.")
    return tuple(names or ())


def _named(src: Path) -> str:
    return src.resolve().name
