"""Shards from digits, image folders, .npz and idx files: OUT/train and OUT/test, each with an index.json.

OUT is written completely or not at all; an existing OUT is refused. The same source and seed give the same bytes. Samples
are stored in a random order. A sample's key is its position in its split of the source. Values are stored losslessly,
arrays as .npy, images as .png.

All functions return the Info of each split, and share these arguments:

    test: share of the test split, the same of every class; for sources without splits
    seed: of the test split and of the stored order
    per_shard: largest number of samples in a shard
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from distill.data.info import Info
from distill.data.shards import index
from distill.data.shards.write import SHARD_SAMPLES, Split, write_splits
from distill.data.sources import idx as idx_files
from distill.data.sources import npz as npz_files
from distill.data.sources.folder import SourceFolder, common_channels, pixels
from distill.errors import BadInput
from distill.files import atomic_folder


def digits(
    out: str | os.PathLike, *, test: float = 0.2, seed: int = 0, per_shard: int = SHARD_SAMPLES
) -> dict[str, Info]:
    """scikit-learn's 1,797 handwritten digits, uint8 (1, 8, 8) in 0..16, ten classes; nothing is downloaded.

    https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html

    Raises:
        BadInput: OUT exists or cannot be written.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    x = source.images.astype(np.uint8)[:, None]
    split = Split(x.__getitem__, len(x), source.target.astype(np.int64))
    info = Info((), 10, names=tuple(map(str, range(10))), range=(0.0, 16.0), source="scikit-learn digits")
    return write_splits(out, split.hold_out(test, seed), info, seed=seed, per_shard=per_shard)


def emoji(out: str | os.PathLike, font: str | os.PathLike, size: int = 64) -> dict[str, int]:
    """A folder of emoji, OUT/SET/CODEPOINTS.png, with their names as captions, .txt; the number of pictures of each set.

    The sets are those of `distill.data.sources.emoji`. The pictures stand under the font's licence: Noto Color Emoji has the
    SIL Open Font License 1.1.

    Args:
        out: the folder to create.
        font: NotoColorEmoji.ttf with bitmaps (CBDT), as in Debian's package fonts-noto-color-emoji.
        size: height and width in pixels.

    Raises:
        BadInput: no such font or one without colour glyphs, the package `emoji` is missing, or OUT exists.
    """
    from distill.data.sources.emoji import write

    if size < 1:
        raise BadInput(f"size={size} must be at least 1.")
    with atomic_folder(out) as folder:
        return write(folder, font, size)


def images(
    src: str | os.PathLike,
    out: str | os.PathLike,
    size: int | None = None,
    *,
    channels: int | None = None,
    test: float = 0.1,
    seed: int = 0,
    per_shard: int = SHARD_SAMPLES,
) -> dict[str, Info]:
    """A folder of images: the sub-folder is the class, a .txt of the same name beside an image its caption.

    With a folder `train` at the top, and only `test`, `val` and the like beside it, these are the splits.

    Args:
        src: the folder; classes are numbered by sorted name, hidden files and folders are ignored.
        out: the folder to create.
        size: resize the shorter side to it and crop the middle; None requires images of one size.
        channels: 1 or 3; None is 1 if all images are grey.

    Raises:
        BadInput: no images, unreadable or mixed ones, captions for some only; OUT exists or cannot be written.
    """
    if size is not None and size < 1:
        raise BadInput(f"size={size} must be at least 1.")
    source = SourceFolder.open(Path(src).expanduser())
    channels = channels or common_channels(source.files, size)
    splits = {}
    for name, (stored, rows) in source.rows(test, seed).items():
        read = partial(_pixels, source.splits[stored], channels, size)
        files = Split(read, len(source.splits[stored]), source.labels(stored), source.captions(stored))
        splits[name] = files.take(rows)
    info = Info(
        (),
        len(source.classes),
        names=tuple(source.classes),
        range=(0.0, 255.0),
        captions=source.captioned,
        source=_name(source.path),
    )
    return write_splits(out, splits, info, codec="png", seed=seed, per_shard=per_shard)


def _pixels(files: list[Path], channels: int, size: int | None, i: int) -> np.ndarray:
    return pixels(files[i], channels, size)


def npz(
    src: str | os.PathLike,
    out: str | os.PathLike,
    *,
    channels: str | None = None,
    range: tuple[float, float] | list[float] | None = None,
    names: list[str] | None = None,
    test: float = 0.1,
    seed: int = 0,
    per_shard: int = SHARD_SAMPLES,
) -> dict[str, Info]:
    """An .npz with x (or images, data) and, for classes, y (or label, labels); or x_train, y_train, x_test, y_test.

    Args:
        src: the file.
        out: the folder to create.
        channels: "first" for (N, C, ...), "last" for (N, H, W, C), "none" for (N, H, W); None infers it from the axis of
            length 1, 3 or 4. (N, D) needs none of it.
        range: values (low, high) that map to (-1, 1); None takes (0, 255) for uint8, and leaves floats in [-1, 1] with
            both signs as they are. (-1, 1) leaves other values unscaled, such as latents.
        names: of the classes.

    Raises:
        BadInput: no such arrays, unclear channel order or range, values not finite; OUT exists or cannot be written.
    """
    src = Path(src).expanduser()
    arrays = npz_files.splits(npz_files.read(src), src)
    low_high = npz_files.value_range([x for x, _ in arrays.values()], range, src)
    splits = {}
    for name, (x, label) in arrays.items():
        x = npz_files.stored_dtype(npz_files.channels_first(x, channels, src))
        splits[name] = Split(x.__getitem__, len(x), label)
    classes = _classes(splits, src)
    info = Info((), classes, names=_class_names(names, classes, src), range=low_high, source=_name(src))
    splits = splits[""].hold_out(test, seed) if "" in splits else splits
    return write_splits(out, splits, info, seed=seed, per_shard=per_shard)


def idx(
    src: str | os.PathLike,
    out: str | os.PathLike,
    *,
    names: list[str] | None = None,
    seed: int = 0,
    per_shard: int = SHARD_SAMPLES,
) -> dict[str, Info]:
    """A folder of MNIST's format: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-* for the test split, or .gz.

    Args:
        src: the folder.
        out: the folder to create.
        names: of the classes.

    Raises:
        BadInput: files missing, of another format or truncated; OUT exists or cannot be written.
    """
    src = Path(src).expanduser()
    splits = {"train": _idx_split(src, "train")}
    if any(idx_files.find(src, "t10k", kind) for kind in ("images", "labels")):
        splits["test"] = _idx_split(src, "t10k")
    classes = _classes(splits, src)
    info = Info((), classes, names=_class_names(names, classes, src), range=(0.0, 255.0), source=_name(src))
    return write_splits(out, splits, info, seed=seed, per_shard=per_shard)


def _idx_split(src: Path, prefix: str) -> Split:
    images, labels = (idx_files.find(src, prefix, kind) for kind in ("images", "labels"))
    if not (images and labels):
        missing = f"{prefix}-images-idx3-ubyte" if not images else f"{prefix}-labels-idx1-ubyte"
        raise BadInput(f"{src} lacks {missing} (or its .gz): give a folder of MNIST's format.")
    x, label = idx_files.read(images, 3), idx_files.read(labels, 1)
    if len(x) != len(label):
        raise BadInput(f"{images} holds {len(x)} images, {labels.name} {len(label)} labels: use both files of one set.")
    return Split(x[:, None].__getitem__, len(x), label.astype(np.int64))


def index_of(path: str | os.PathLike) -> Info:
    """Write an index.json for a folder of tar files from elsewhere, which are otherwise read completely at every start.

    Raises:
        BadInput: there is an index already, a shard is damaged, or none is readable.
    """
    path = Path(path).expanduser()
    if (path / index.NAME).exists():
        raise BadInput(f"{path / index.NAME} exists already and is never overwritten: remove it first.")
    shards = index.find(path)
    if shards.errors:
        raise BadInput(f"{shards.errors[0]} is damaged: repair or remove it before the index is written.")
    index.write(path, shards.info, [(Path(t.path).name, t.count, os.path.getsize(t.path)) for t in shards.tars])
    return shards.info


def _classes(splits: dict[str, Split], src: Path) -> int:
    labels = [split.label for split in splits.values() if split.label is not None]
    if 0 < len(labels) < len(splits):
        raise BadInput(f"{src} has labels for one split only: give labels for both, or for none.")
    return max((int(label.max()) + 1 for label in labels), default=0)


def _class_names(names: list[str] | None, classes: int, src: Path) -> tuple[str, ...]:
    if names and len(names) != classes:
        raise BadInput(f"names lists {len(names)} classes, but {src} has {classes}: give one name per class.")
    return tuple(names or ())


def _name(src: Path) -> str:
    return src.resolve().name
