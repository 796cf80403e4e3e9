"""Folders of files, one sample each: splits and classes by sub-folder, captions by .txt files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from distill.data.shards import order
from distill.data.sources import image, text
from distill.errors import BadInput, near_path
from distill.files import digest

SPLITS = ("train", "test", "val", "valid", "validation")  # also test-NAME and val-NAME


def visible(folder: Path) -> Iterator[Path]:
    """All files below a folder, except hidden ones (.name) and those in hidden folders such as .ipynb_checkpoints."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(parent, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def state(path: Path) -> str:
    """A digest of a file's or folder's state: name, size and modification time of each visible file, contents unread."""
    files = sorted(visible(path)) if path.is_dir() else [path]
    facts = ((file, file.stat()) for file in files)
    return digest(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n" for file, stat in facts)


def _is_split(name: str) -> bool:
    return name in SPLITS or name.startswith(("test-", "val-"))


@dataclass
class SourceFolder:
    """The files of a source folder.

    Attributes:
        path: of the folder.
        splits: split -> its files, sorted; the one split "" if the folder has no splits.
    """

    path: Path
    splits: dict[str, list[Path]]

    @classmethod
    def open(cls, path: Path, suffixes: tuple[str, ...] = image.SUFFIXES, kind: str = "images") -> SourceFolder:
        """Find the files.

        With a folder `train` at the top, and only `test`, `val`, `test-NAME` and the like beside it, these are the splits.

        Args:
            path: of the folder.
            suffixes: endings of the files, lower case, without dot.
            kind: what the files are, for messages.

        Raises:
            BadInput: no such folder, no such files in a split, or some files in class folders and some not.
        """
        if not path.is_dir():
            raise BadInput(f"{path} is not a folder: give the folder that holds the {kind}.{near_path(path)}")
        tops = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        has_splits = "train" in tops and all(_is_split(name) for name in tops)
        order = sorted(tops, key=lambda name: (name != "train", name))
        folders = {name: path / name for name in order} if has_splits else {"": path}
        splits = {}
        for name, folder in folders.items():
            splits[name] = sorted(file for file in visible(folder) if file.suffix.lower()[1:] in suffixes)
            if not splits[name]:
                raise BadInput(f"{folder} holds no {kind}: give a folder with {', '.join(suffixes)} files.")
        source = cls(path, splits)
        if len({source.class_of(name, file) is None for name, files in splits.items() for file in files}) > 1:
            raise BadInput(f"some {kind} of {path} are in class folders and some are not: move all into class folders.")
        return source

    @property
    def files(self) -> list[Path]:
        """The files of all splits."""
        return [file for files in self.splits.values() for file in files]

    def class_of(self, split: str, file: Path) -> str | None:
        """The class of a file: the first folder below its split; None without class folders."""
        folder = self.path / split
        return file.relative_to(folder).parts[0] if file.parent != folder else None

    @cached_property
    def classes(self) -> list[str]:
        """Sorted class names; empty without class folders."""
        names = {self.class_of(split, file) for split, files in self.splits.items() for file in files}
        return sorted(name for name in names if name is not None)

    def labels(self, split: str) -> np.ndarray | None:
        """Class numbers of a split's files, int64 (N,); None without class folders."""
        if not self.classes:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[self.class_of(split, file)] for file in self.splits[split]], np.int64)

    def captions(self, split: str) -> list[str] | None:
        """Captions of a split's files; None if no file of the folder has one."""
        return text.captions(self.splits[split]) if self.captioned else None

    @cached_property
    def captioned(self) -> bool:
        """Whether all files have a caption.

        Raises:
            BadInput: only some have one.
        """
        return text.captioned(self.files)

    def rows(self, test: float, seed: int) -> dict[str, tuple[str, np.ndarray]]:
        """Split to write -> (split of the folder, its files' numbers): the folder's own splits, or a hold-out.

        Raises:
            BadInput: `test` is out of range.
        """
        if "" not in self.splits:
            return {name: (name, np.arange(len(files))) for name, files in self.splits.items()}
        rows = order.hold_out(len(self.splits[""]), test, seed, self.labels(""))
        return {name: ("", part) for name, part in rows.items()}


def common_channels(files: list[Path], size: int | None) -> int:
    """1 if all images are grey, else 3; reads the files' headers.

    Raises:
        BadInput: an image cannot be read, or images differ in size and `size` is None.
    """
    files_of: dict[tuple[int, int], list[Path]] = {}
    channels = 1
    for file in files:
        try:
            count, *shape = image.probe(file)
        except Exception as error:  # decoders raise many kinds of errors
            raise _unreadable(file, error) from None
        channels = max(channels, count)
        files_of.setdefault(tuple(shape), []).append(file)
    if size is None and len(files_of) > 1:
        (a, (first, *_)), (b, (second, *_)), *_ = files_of.items()
        raise BadInput(
            f"images are of {len(files_of)} sizes, {first} is {a[1]}x{a[0]} and {second} is {b[1]}x{b[0]}: "
            "give --size to resize all to one."
        )
    return channels


def pixels(file: Path, channels: int, size: int | None) -> np.ndarray:
    """uint8 (C, H, W) of one image; `channels` and `size` as in `image.decode`.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return image.decode(file, channels, size)
    except Exception as error:  # decoders raise many kinds of errors
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> BadInput:
    return BadInput(f"{file} cannot be read as an image ({error}): repair or remove it.")
