"""A folder of images: classes by sub-folder, captions by .txt files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.data import image
from distill.errors import BadInput

SPLITS = ("train", "test", "val", "valid", "validation")
Found = list[tuple[Path, str | None]]


def splits(src: Path, suffixes: tuple[str, ...] = image.SUFFIXES, what: str = "images") -> dict[str, Found]:
    """Split -> (file, class name or None) of its images, sorted; the one split "" when no folder `train` is at the top.

    Raises:
        BadInput: no such folder, no images, or some in classes and some not.
    """
    if not src.is_dir():
        raise BadInput(f"{src} is not a folder: give the folder that holds the {what}.")
    tops = sorted(p.name for p in src.iterdir() if p.is_dir() and not p.name.startswith("."))
    if "train" in tops and set(tops) <= set(SPLITS):
        found = {s: _files(src / s, suffixes, what) for s in SPLITS if s in tops}
    else:
        found = {"": _files(src, suffixes, what)}
    classed = {name is not None for files in found.values() for _, name in files}
    if len(classed) > 1:
        raise BadInput(f"some {what} of {src} lie in class folders and some do not: move all into class folders.")
    return found


def _files(folder: Path, suffixes: tuple[str, ...], what: str) -> Found:
    inside = (p for p in folder.rglob("*") if p.suffix.lower()[1:] in suffixes and p.is_file())
    files = sorted(p for p in inside if not any(q.startswith(".") for q in p.relative_to(folder).parts))
    if not files:
        raise BadInput(f"{folder} holds no {what}: give a folder with {', '.join(suffixes)} files.")
    return [(p, p.relative_to(folder).parts[0] if p.parent != folder else None) for p in files]


def channels(files: list[Path], size: int | None) -> int:
    """1 if all images are grey, else 3; reads their headers.

    Raises:
        BadInput: an image that cannot be read, or images of several sizes when `size` is None.
    """
    shapes = {}
    for file in files:
        try:
            shapes.setdefault(image.probe(file)[1:], []).append(file)
        except Exception as error:  # decoders raise many kinds
            raise _unreadable(file, error) from None
    if size is None and len(shapes) > 1:
        (a, (first, *_)), (b, (other, *_)), *_ = shapes.items()
        raise BadInput(
            f"images are of {len(shapes)} sizes, {first} is {a[1]}x{a[0]} and {other} is {b[1]}x{b[0]}: "
            "give size= to bring all to one."
        )
    return max(image.probe(f)[0] for f in files)


def pixels(file: Path, channels: int, size: int | None) -> np.ndarray:
    """uint8 (C, H, W) of one image.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return image.decode(file, channels, size)
    except Exception as error:  # decoders raise many kinds
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> BadInput:
    return BadInput(f"{file} cannot be read as an image ({error}): repair or remove it.")


def captions(files: list[Path]) -> dict[Path, str] | None:
    """Image -> text of the .txt file of the same name beside it; None if no image has one.

    Raises:
        BadInput: only some images have one, or one is not UTF-8.
    """
    return {file: caption(file) for file in files} if captioned(files) else None


def captioned(files: list[Path]) -> bool:
    """Whether all have a caption; BadInput when only some have."""
    without = [f for f in files if not f.with_suffix(".txt").is_file()]
    if without and len(without) < len(files):
        raise BadInput(f"{without[0]} has no caption, while others have: write {without[0].with_suffix('.txt').name}.")
    return not without


def caption(file: Path) -> str:
    """The text of the .txt file beside; BadInput when it is not UTF-8."""
    try:
        return file.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file.with_suffix('.txt')} cannot be read ({error}): save it as UTF-8.") from None
