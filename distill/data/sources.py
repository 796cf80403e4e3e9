"""What can be encoded, as a plan of jobs and as samples: images, arrays (video, sound), image shards, prompts.

A job is one shard to come, in plain JSON: the folder `at` and `number` of its shard, the `size` (H, W) of its pixels or
none to keep theirs, and where its samples are: `files`, or a `tar` with the `rows` to take, or `prompts`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data import folder, image, index, order, tar
from distill.data import npz as npz_files
from distill.data import sample as samples
from distill.data.damage import Bad, Cut
from distill.errors import BadInput

ARRAYS = ("npy", "npz")
RATIOS = (1, 4 / 3, 3 / 2, 16 / 9)  # of the buckets' sides, either way round
_HELD_OUT = 1


@dataclass
class Item:
    """A sample before it is encoded: pixels in [-1, 1], (3, H, W) or (3, F, H, W), or sound (C, L); or `bad`, why not."""

    key: str
    pixels: Tensor | None = None
    caption: str | None = None
    label: int | None = None
    bad: str = ""


@dataclass
class Settings:
    """How sources are read.

    Attributes:
        size: (H, W) of all pixels; None keeps the size of arrays and wants images of one.
        multiple: of which the sides must be multiples.
        frames: of each video, the first so many; None keeps all.
        buckets: sort images into a few (H, W) of about the area of `size`.
        caption: for samples without their own; `{class}` in it is the class folder's name.
        per_shard, test, seed: as for `distill.data.write`.
    """

    size: tuple[int, int] | None = None
    multiple: int = 1
    frames: int | None = None
    buckets: bool = False
    caption: str | None = None
    per_shard: int = 1000
    test: float = 0.0
    seed: int = 0


def buckets(size: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """(H, W) of about the area of `size` at a few ratios of the sides, in multiples."""
    side = math.sqrt(size[0] * size[1])
    snap = lambda v: max(multiple, round(v / multiple) * multiple)
    found = {(snap(side * r**0.5), snap(side / r**0.5)) for q in RATIOS for r in (q, 1 / q)}
    return sorted(found)


def nearest(shape: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose ratio of the sides is nearest."""
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1] * shape[1] / shape[0])), s))


# -- plans -----------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Jobs, classes and their names, and whether every sample has a caption. Plain JSON but for its frame."""

    jobs: list[dict[str, Any]]
    captions: bool = True
    classes: int = 0
    names: list[str] = field(default_factory=list)


def plan(src: Path, how: Settings) -> Plan:
    """What is to do for a folder of images, of arrays, or of image shards.

    Raises:
        BadInput: none of these, images of several sizes without `size`, captions or classes for some only.
    """
    if not src.is_dir():
        raise BadInput(f"{src} is not a folder: give a folder of images, of .npy arrays, or of image shards.")
    if any(src.rglob(index.NAME)) or any(src.glob("*.tar")) or any(src.glob("*/*.tar")):
        return _of_shards(src, how)
    images = any(p.suffix.lower()[1:] in image.SUFFIXES for p in src.rglob("*"))
    kind = (image.SUFFIXES, "images") if images else (ARRAYS, "images, .npy arrays or shards")
    found = folder.splits(src, *kind)
    every = [file for files in found.values() for file, _ in files]
    names = sorted({name for files in found.values() for _, name in files if name is not None})
    if images and how.size is None:
        folder.channels(every, None)  # refuses images of several sizes
    jobs: list[dict[str, Any]] = []
    for split, rows in _held_out(found, how).items():
        jobs += _of_files(split, found[split if split in found else ""], rows, names, how, images)
    return Plan(jobs, folder.captioned(every) or how.caption is not None, len(names), names)


def _held_out(found: dict[str, Any], how: Settings) -> dict[str, np.ndarray]:
    """Split -> places of its files, in the stored order."""
    if "" not in found:
        return {s: order.permutation(len(f), how.seed, n) for n, (s, f) in enumerate(found.items())}
    return held_out(len(found[""]), how)


def held_out(count: int, how: Settings) -> dict[str, np.ndarray]:
    """Split -> places among 0..count-1, in the stored order; "test" is a share of them."""
    if not 0 <= how.test < 1:
        raise BadInput(f"test={how.test} must be a share from 0 to below 1.")
    shuffled, held = order.permutation(count, how.seed, 0, _HELD_OUT), round(how.test * count)
    return {k: v for k, v in {"train": shuffled[held:], "test": shuffled[:held]}.items() if len(v)}


def _of_files(split: str, files: folder.Found, rows: np.ndarray, names: list[str], how: Settings,
              images: bool) -> list[dict[str, Any]]:
    sizes = buckets(how.size, how.multiple) if how.buckets else []
    sorted_in: dict[Any, list[int]] = {}
    for i in map(int, rows):
        sorted_in.setdefault(nearest(_shape(files[i][0]), sizes) if sizes else how.size, []).append(i)
    jobs = []
    for size in sorted(sorted_in, key=str):
        at = f"{split}/{size[0]}x{size[1]}" if sizes else split
        for number, some in enumerate(_pieces(sorted_in[size], how.per_shard)):
            label = [names.index(files[i][1]) for i in some] if names else None
            jobs.append({"at": at, "number": number, "size": size, "files": [str(files[i][0]) for i in some],
                         "keys": some, "label": label})
    return jobs


def _shape(file: Path) -> tuple[int, int]:
    try:
        return image.probe(file)[1:]
    except Exception:  # the one who encodes it says so
        return 1, 1


def _of_shards(src: Path, how: Settings) -> Plan:
    """One job for each shard of a split, or as many as it has buckets and pieces."""
    tops = [p for p in sorted(src.iterdir()) if p.is_dir() and any(p.glob("*.tar"))]
    whole = Plan([])
    for split in tops or [src]:
        tars, info, damage, _ = index.find(split)
        if damage:
            raise BadInput(f"{damage[0]} is damaged: repair it, or take it out of {split}, before it is encoded.")
        if info.members or not info.samples or (info.dtype != "uint8" and len(info.shape) == 3 and info.shape[0] not in (1, 3)):
            raise BadInput(f"{split} holds {info.dtype} {info.shape}, which are no images: give shards of images.")
        whole.captions &= info.captions or how.caption is not None
        whole.classes, whole.names = max(whole.classes, info.classes), list(info.names)
        at, taken = split.name if tops else "train", {}
        for shard in tars:
            for size, rows in _sorted(shard.path, shard.count, how).items():
                where = f"{at}/{size[0]}x{size[1]}" if how.buckets else at
                for some in _pieces(rows, how.per_shard):
                    number = taken[where] = taken.get(where, -1) + 1
                    whole.jobs.append({"at": where, "number": number, "size": size, "tar": shard.path, "rows": some,
                                 "range": info.range})
    return whole


def _sorted(path: str, count: int, how: Settings) -> dict[Any, list[int]]:
    """Size -> rows of a shard."""
    if not how.buckets:
        return {how.size: list(range(count))}
    sizes, found = buckets(how.size, how.multiple), {}
    for i, raw in enumerate(tar.samples(path)):
        try:
            name = samples.suffix(raw)
            shape = samples.values(raw).shape[1:] if name == "npy" else image.probe(raw[name])[1:]
        except Exception:  # the one who encodes it says so
            shape = (1, 1)
        found.setdefault(nearest(shape, sizes), []).append(i)
    return found


def _pieces(rows: list[int], size: int) -> Iterator[list[int]]:
    if size < 1:
        raise BadInput(f"per_shard={size} must be at least 1.")
    return (rows[i : i + size] for i in range(0, len(rows), size))


# -- samples ---------------------------------------------------------------------------------------------------------


def read(job: dict[str, Any], names: list[str], how: Settings) -> Iterator[Item]:
    """The samples of a job in its order; one that cannot be read says why in `bad`."""
    if "prompts" in job:
        yield from (Item(f"{k:09d}", caption=p) for k, p in zip(job["keys"], job["prompts"]))
    elif "tar" in job:
        yield from _from_tar(job, how)
    else:
        for i, file in enumerate(map(Path, job["files"])):
            item = Item(f"{job['keys'][i]:09d}", label=job["label"][i] if job["label"] else None)
            beside = file.with_suffix(".txt").is_file()
            name = names[item.label] if item.label is not None else ""
            item.caption = folder.caption(file) if beside else how.caption and how.caption.replace("{class}", name)
            try:
                item.pixels = _pixels(file, job["size"], how.frames)
            except Exception as error:  # decoders raise many kinds
                item.bad = f"{file} cannot be read ({' '.join(str(error).split())})"
            yield item


def _from_tar(job: dict[str, Any], how: Settings) -> Iterator[Item]:
    wanted, (low, high) = set(job["rows"]), job["range"]
    try:
        for i, raw in enumerate(tar.samples(job["tar"])):
            if i not in wanted:
                continue
            item = Item(raw["__key__"])
            try:
                name = samples.suffix(raw)
                size = None if name == "npy" or job["size"] is None else tuple(job["size"])
                x = samples.values(raw, 3, size)
                item.pixels = covered((torch.from_numpy(x.astype(np.float32)) - low) * (2 / (high - low)) - 1, job["size"])
                item.label = samples.label(raw) if "cls" in raw else None
                item.caption = samples.caption(raw) if "txt" in raw else how.caption
            except (Bad, ValueError) as bad:
                item.bad = f"{job['tar']} sample {item.key} ({bad})"
            yield item
    except Cut as cut:
        raise BadInput(f"{job['tar']} {cut}: write it again.") from None


def _pixels(file: Path, size: tuple[int, int] | None, frames: int | None) -> Tensor:
    """Of an image file, or of an array: video uint8 (F, H, W, 3), or float in [-1, 1]; sound float (C, L)."""
    if file.suffix.lower()[1:] not in ARRAYS:
        return torch.from_numpy(image.decode(file, 3, tuple(size) if size else None)).float() / 127.5 - 1
    packed = file.suffix.lower() == ".npz"
    found = next(iter(npz_files.read(file).values())) if packed else np.load(file, allow_pickle=False)
    whole = found.dtype == np.uint8
    x = torch.from_numpy(np.ascontiguousarray(found)).float()
    x = x / 127.5 - 1 if whole else x
    if not torch.isfinite(x).all() or x.abs().max() > 1.001:
        raise ValueError(f"values from {x.min():g} to {x.max():g}: save uint8, or floats in [-1, 1]")
    if x.ndim == 2:
        return x
    if x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"is {found.dtype} {found.shape}: video is (F, H, W, 3), sound (C, L)")
    if frames and len(x) < frames:
        raise ValueError(f"has {len(x)} frames, fewer than frames={frames}")
    return covered(x[:frames].permute(3, 0, 1, 2), size)


def covered(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Pixels (C, ..., H, W) resized until they cover (H, W), and the middle cut out; grey as colour."""
    x = x.expand(3, *x.shape[1:]) if len(x) == 1 else x
    if size is None or tuple(x.shape[-2:]) == tuple(size):
        return x
    factor = max(s / n for s, n in zip(size, x.shape[-2:]))
    flat = x.reshape(1, -1, *x.shape[-2:])
    sides = [max(s, round(n * factor)) for s, n in zip(size, x.shape[-2:])]
    flat = torch.nn.functional.interpolate(flat, sides, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = ((n - s) // 2 for n, s in zip(sides, size))
    return flat[..., top : top + size[0], left : left + size[1]].reshape(*x.shape[:-2], *size)


# -- prompts ---------------------------------------------------------------------------------------------------------


def prompts(file: Path) -> list[str]:
    """One a line of a .txt; the column `Prompt` (`prompt`, `caption`, `text`) of a .tsv or .csv. Empty lines are left out.

    Raises:
        BadInput: no such file, another kind, no such column, or no prompt.
    """
    if file.suffix.lower() not in (".txt", ".tsv", ".csv"):
        raise BadInput(f"{file} must end in .txt (one prompt a line), .tsv or .csv (a column Prompt).")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} cannot be read ({error}): give a file in UTF-8.") from None
    if file.suffix.lower() == ".txt":
        found = text.splitlines()
    else:
        tabs = file.suffix.lower() == ".tsv"
        kind = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
        rows = csv.DictReader(text.splitlines(keepends=True), **kind)
        column = next((c for c in rows.fieldnames or () if c.strip().lower() in ("prompt", "caption", "text")), None)
        if column is None:
            has = ", ".join(rows.fieldnames or ()) or "nothing"
            raise BadInput(f"{file} has the columns {has}, but no Prompt: name the column of prompts so.")
        found = [row[column] or "" for row in rows]
    found = [line.strip() for line in found if line.strip()]
    if not found:
        raise BadInput(f"{file} holds no prompt: write one a line.")
    return found


def plan_prompts(lines: list[str], how: Settings) -> Plan:
    """What is to do for a list of prompts; a sample's key is its place in the list."""
    jobs = []
    for split, rows in held_out(len(lines), how).items():
        for number, some in enumerate(_pieces(rows.tolist(), how.per_shard)):
            jobs.append({"at": split, "number": number, "prompts": [lines[i] for i in some], "keys": some})
    return Plan(jobs)
