"""Sources of `distill data encode` and `distill data prompts`: which samples go to which shard, and reading them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.shards import index, order, tar
from distill.data.shards import sample as samples
from distill.data.shards.errors import BadSample, UnreadableShard
from distill.data.sources import image, text
from distill.data.sources import npz as npz_files
from distill.data.sources.folder import SourceFolder, common_channels, visible
from distill.errors import BadInput, near_path

ARRAYS = ("npy", "npz")
RATIOS = (1, 4 / 3, 3 / 2, 16 / 9)  # aspect ratios of the buckets, landscape and portrait
Size = tuple[int, int]  # (H, W) in pixels


@dataclass
class SourceItem:
    """A sample before it is encoded.

    Attributes:
        key: name of the sample.
        pixels: in [-1, 1]: images (3, H, W), video (3, F, H, W), sound (C, L); None for prompts.
        caption, label: None if the source has none.
        error: why the sample cannot be read; empty if it can.
    """

    key: str
    pixels: Tensor | None = None
    caption: str | None = None
    label: int | None = None
    error: str = ""


@dataclass
class SourceSettings:
    """How sources are read.

    Attributes:
        size: (H, W) of all pixels; None keeps the size of arrays, and requires images of one size.
        multiple: the sides must be multiples of it.
        frames: number of frames of a video, from its beginning; None keeps all.
        buckets: sort images into a few (H, W) of about the area of `size`.
        caption: for samples without their own; `{class}` in it is replaced by the class name.
        per_shard: largest number of samples in a shard.
        test: share of the test split, if the source has no splits.
        seed: of the test split and the stored order.
    """

    size: Size | None = None
    multiple: int = 1
    frames: int | None = None
    buckets: bool = False
    caption: str | None = None
    per_shard: int = 1000
    test: float = 0.0
    seed: int = 0


# -- plans -----------------------------------------------------------------------------------------------------------


@dataclass
class ShardJob:
    """One shard to write. Its samples are `files`, the samples `rows` of a `tar`, or `prompts`.

    Attributes:
        folder, number: of the shard, the folder below OUT.
        size: (H, W) of its pixels; None keeps theirs.
        keys, labels: of files and prompts; labels are empty without classes.
        range: values of the tar's arrays that map to (-1, 1).
    """

    folder: str
    number: int
    size: Size | None = None
    files: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    tar: str = ""
    rows: list[int] = field(default_factory=list)
    range: tuple[float, float] = (-1.0, 1.0)


@dataclass
class Plan:
    """All shards of a source, its class names, and whether every sample has a caption. Can be stored as JSON."""

    jobs: list[ShardJob]
    captions: bool = True
    classes: int = 0
    names: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Plan:
        """The plan whose `dataclasses.asdict` was stored as JSON."""
        plan = cls(**facts)
        plan.jobs = [ShardJob(**job) for job in facts["jobs"]]
        return plan


def plan_folder(path: Path, settings: SourceSettings) -> Plan:
    """The plan for a folder of images, of arrays, or of image shards.

    Raises:
        BadInput: none of these, images of several sizes without `size`, captions or classes for some files only.
    """
    if not path.is_dir():
        raise BadInput(
            f"{path} is not a folder: give a folder of images, of .npy arrays, or of image shards.{near_path(path)}"
        )
    if _shard_folders(path):
        return _plan_shards(path, settings)
    is_image = any(file.suffix.lower()[1:] in image.SUFFIXES for file in visible(path))
    if is_image:
        source = SourceFolder.open(path)
    else:
        source = SourceFolder.open(path, ARRAYS, "images, .npy arrays or shards")
    if is_image and settings.size is None:
        common_channels(source.files, None)  # refuses images of several sizes
    jobs: list[ShardJob] = []
    for number, (split, (stored, rows)) in enumerate(source.rows(settings.test, settings.seed).items()):
        rows = rows[order.permutation(len(rows), settings.seed, number)]
        jobs += _file_jobs(split, source.splits[stored], source.labels(stored), rows, settings)
    captions = source.captioned or settings.caption is not None
    return Plan(jobs, captions, len(source.classes), source.classes)


def plan_prompts(prompts: list[str], settings: SourceSettings) -> Plan:
    """The plan for a list of prompts; a sample's key is its position in the list."""
    jobs = []
    for number, (split, rows) in enumerate(order.hold_out(len(prompts), settings.test, settings.seed).items()):
        rows = rows[order.permutation(len(rows), settings.seed, number)].tolist()
        for shard, keys in enumerate(_chunks(rows, settings.per_shard)):
            jobs.append(ShardJob(split, shard, prompts=[prompts[i] for i in keys], keys=keys))
    return Plan(jobs)


def _file_jobs(
    split: str, files: list[Path], labels: np.ndarray | None, rows: np.ndarray, settings: SourceSettings
) -> list[ShardJob]:
    by_size: dict[Size | None, list[int]] = {}
    for i in map(int, rows):
        size = _bucket_of(_file_shape(files[i]), settings) if settings.buckets else settings.size
        by_size.setdefault(size, []).append(i)
    jobs = []
    for size in sorted(by_size, key=str):
        for number, keys in enumerate(_chunks(by_size[size], settings.per_shard)):
            job = ShardJob(_bucket_folder(split, size, settings), number, size, keys=keys)
            job.files = [str(files[i]) for i in keys]
            job.labels = [] if labels is None else [int(labels[i]) for i in keys]
            jobs.append(job)
    return jobs


def _shard_folders(path: Path) -> list[Path]:
    """Visible folders with tar files: `path` and those directly below it."""
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))]
    return [f for f in folders if any(p.name.endswith(index.SUFFIXES) and p.name[0] != "." for p in f.iterdir())]


def _plan_shards(path: Path, settings: SourceSettings) -> Plan:
    """One job for each shard of a split, or one for each of its buckets and chunks."""
    plan = Plan([])
    count: dict[str, int] = {}
    for folder in [f for f in _shard_folders(path) if f != path] or [path]:
        shards = index.find(folder)
        info = shards.info
        if shards.errors:
            raise BadInput(
                f"{shards.errors[0]} is damaged: repair it, or remove it from {folder}, before it is encoded."
            )
        is_latent = info.dtype != "uint8" and len(info.shape) == 3 and info.shape[0] not in (1, 3)
        if info.members or not info.samples or is_latent:
            raise BadInput(f"{folder} holds {info.dtype} {info.shape}, which are no images: give shards of images.")
        plan.captions &= info.captions or settings.caption is not None
        plan.classes, plan.names = max(plan.classes, info.classes), list(info.names)
        split = "train" if folder == path else folder.name
        for shard in shards.tars:
            for size, rows in _rows_by_size(shard, settings).items():
                name = _bucket_folder(split, size, settings)
                for chunk in _chunks(rows, settings.per_shard):
                    number = count[name] = count.get(name, -1) + 1
                    plan.jobs.append(ShardJob(name, number, size, tar=shard.path, rows=chunk, range=info.range))
    return plan


def _rows_by_size(shard: index.Tar, settings: SourceSettings) -> dict[Size | None, list[int]]:
    """Size -> samples of a shard."""
    if not settings.buckets:
        return {settings.size: list(range(shard.count))}
    by_size: dict[Size | None, list[int]] = {}
    for i, raw in enumerate(tar.samples(shard.path)):
        by_size.setdefault(_bucket_of(_raw_shape(raw), settings), []).append(i)
    return by_size


def _file_shape(file: Path) -> Size:
    try:
        return image.probe(file)[1:]
    except Exception:  # decoders raise many kinds of errors; encoding the file reports it
        return 1, 1


def _raw_shape(raw: dict) -> Size:
    try:
        name = samples.suffix(raw)
        return samples.values(raw).shape[1:] if name == "npy" else image.probe(raw[name])[1:]
    except Exception:  # decoders raise many kinds of errors; encoding the sample reports it
        return 1, 1


def _bucket_of(shape: Size, settings: SourceSettings) -> Size:
    return nearest_bucket(shape, bucket_sizes(settings.size, settings.multiple))


def bucket_sizes(size: Size, multiple: int) -> list[Size]:
    """(H, W) of about the area of `size` at each aspect ratio of `RATIOS`, in multiples of `multiple`."""
    side = math.sqrt(size[0] * size[1])
    sizes = set()
    for ratio in (*RATIOS, *(1 / r for r in RATIOS)):
        sides = (side * ratio**0.5, side / ratio**0.5)
        sizes.add(tuple(max(multiple, round(s / multiple) * multiple) for s in sides))
    return sorted(sizes)


def nearest_bucket(shape: Size, sizes: list[Size]) -> Size:
    """The bucket whose aspect ratio is nearest, by the logarithm of the ratio."""
    ratio = math.log(shape[0] / shape[1])
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), size))


def _bucket_folder(split: str, size: Size | None, settings: SourceSettings) -> str:
    return f"{split}/{size[0]}x{size[1]}" if settings.buckets else split


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    if size < 1:
        raise BadInput(f"per_shard={size} must be at least 1.")
    return (rows[i : i + size] for i in range(0, len(rows), size))


# -- samples ---------------------------------------------------------------------------------------------------------


def read_items(job: ShardJob, names: list[str], settings: SourceSettings) -> Iterator[SourceItem]:
    """The samples of a job in its order; `error` is set if one cannot be read."""
    if job.prompts:
        yield from (SourceItem(f"{key:09d}", caption=prompt) for key, prompt in zip(job.keys, job.prompts))
    elif job.tar:
        yield from _read_tar(job, names, settings)
    else:
        for i, file in enumerate(map(Path, job.files)):
            item = SourceItem(f"{job.keys[i]:09d}", label=job.labels[i] if job.labels else None)
            has_caption = text.caption_file(file).is_file()
            item.caption = text.caption(file) if has_caption else _default_caption(item.label, names, settings)
            try:
                item.pixels = _read_pixels(file, job.size, settings.frames)
            except Exception as error:  # decoders raise many kinds of errors
                item.error = f"{file} cannot be read ({' '.join(str(error).split())})"
            yield item


def _default_caption(label: int | None, names: list[str], settings: SourceSettings) -> str | None:
    name = names[label] if label is not None and label < len(names) else ""
    return settings.caption and settings.caption.replace("{class}", name)


def _read_tar(job: ShardJob, names: list[str], settings: SourceSettings) -> Iterator[SourceItem]:
    rows = set(job.rows)
    try:
        for i, raw in enumerate(tar.samples(job.tar)):
            if i not in rows:
                continue
            item = SourceItem(raw["__key__"])
            try:
                item.pixels = _tar_pixels(raw, job)
                item.label = samples.label(raw) if "cls" in raw else None
                has_caption = "txt" in raw
                item.caption = samples.caption(raw) if has_caption else _default_caption(item.label, names, settings)
            except (BadSample, ValueError) as error:
                item.error = f"{job.tar} sample {item.key} ({error})"
            yield item
    except UnreadableShard as error:
        raise BadInput(f"{job.tar} {error}: write it again.") from None


def _tar_pixels(raw: dict, job: ShardJob) -> Tensor:
    """Pixels (3, H, W) of a raw sample."""
    size = tuple(job.size) if job.size else None
    low, high = job.range
    x = samples.values(raw, 3)
    x = image.fit(x, size) if size else x
    x = np.broadcast_to(x, (3, *x.shape[1:])) if len(x) == 1 else x
    return (torch.from_numpy(x.astype(np.float32)) - low) * (2 / (high - low)) - 1


def _read_pixels(file: Path, size: Size | None, frames: int | None) -> Tensor:
    """Pixels of an image, a video uint8 (F, H, W, 3) or float in [-1, 1], or sound float (C, L) in [-1, 1]."""
    if file.suffix.lower()[1:] not in ARRAYS:
        return _scaled(image.decode(file, 3, tuple(size) if size else None))
    if file.suffix.lower() == ".npz":
        x = next(iter(npz_files.read(file).values()))
    else:
        x = np.load(file, allow_pickle=False)
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
        if not np.isfinite(x).all() or np.abs(x).max() > 1.001:
            raise ValueError(f"values from {x.min():g} to {x.max():g}: save uint8, or floats in [-1, 1]")
    if x.ndim == 2:
        return _scaled(x)
    if x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"is {x.dtype} {x.shape}: video is (F, H, W, 3), sound (C, L)")
    if frames and len(x) < frames:
        raise ValueError(f"has {len(x)} frames, fewer than frames={frames}")
    x = np.moveaxis(x[:frames], -1, 0)
    return _scaled(image.fit(x, tuple(size)) if size else x)


def _scaled(x: np.ndarray) -> Tensor:
    """uint8 to float32 in [-1, 1]; floats unchanged."""
    if x.dtype == np.uint8:
        return torch.from_numpy(np.array(x)).float() / 127.5 - 1
    return torch.from_numpy(np.array(x, dtype=np.float32))
