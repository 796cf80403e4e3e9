"""Decoding of samples: tar members to arrays, conditions, label and caption."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from distill.data.base import Batch
from distill.data.info import Info, Member
from distill.data.shards.errors import BadSample
from distill.data.sources import array, image

_CODECS = ("npy", *image.SUFFIXES)


@dataclass
class Sample:
    """One sample with its stored values.

    Attributes:
        x: array or image; None for conditions alone.
        label: class number; None without classes.
        caption: None without captions.
        cond: conditions by name.
        key: name of the sample in its shard.
    """

    x: np.ndarray | None
    label: int | None = None
    caption: str | None = None
    cond: dict[str, np.ndarray] = field(default_factory=dict)
    key: str = ""


def suffix(members: dict) -> str:
    """Name of the member that holds the array or image.

    Raises:
        BadSample: there is none.
    """
    for name in _CODECS:
        if name in members:
            return name
    names = ", ".join(name for name in members if not name.startswith("__"))
    raise BadSample(f"has no array or image member, only {names or 'nothing'}")


def values(members: dict, channels: int | None = None, size: int | tuple[int, int] | None = None) -> np.ndarray:
    """Stored values of the array or image; `channels` and `size` as in `image.decode`.

    Raises:
        BadSample: there is none, or it cannot be decoded.
    """
    return _decoded(members, suffix(members), channels, size)


def conditions(members: dict) -> dict[str, np.ndarray]:
    """All conditions by name; NAME is stored as the member NAME.npy.

    Raises:
        BadSample: one cannot be decoded.
    """
    names = [name for name in members if name.endswith(".npy")]
    return {name.removesuffix(".npy"): _decoded(members, name) for name in names}


def _decoded(
    members: dict, name: str, channels: int | None = None, size: int | tuple[int, int] | None = None
) -> np.ndarray:
    try:
        if name.split(".")[-1] == "npy":
            x = array.decode(members[name])
        else:
            x = image.decode(members[name], channels, size)
        return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
    except Exception as error:  # decoders raise many kinds of errors on damaged bytes
        reason = (str(error) or repr(error)).splitlines()[0]
        raise BadSample(f".{name} member cannot be decoded: {reason}") from None


def label(members: dict, classes: int | None = None) -> int:
    """The class in the .cls member, 0 <= label < classes.

    Raises:
        BadSample: missing, not a number, or out of range.
    """
    if "cls" not in members:
        raise BadSample("has no .cls member")
    try:
        number = int(members["cls"])
    except ValueError:
        raise BadSample(f".cls member is not a whole number: {bytes(members['cls'][:20])!r}") from None
    if number < 0 or (classes is not None and number >= classes):
        raise BadSample(f"class {number} is outside 0 to {'' if classes is None else classes - 1}".rstrip())
    return number


def caption(members: dict) -> str:
    """The text in the .txt member, UTF-8 with or without a byte order mark.

    Raises:
        BadSample: missing or not UTF-8.
    """
    if "txt" not in members:
        raise BadSample("has no .txt member")
    try:
        return members["txt"].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample(".txt member is not UTF-8") from None


def decode(members: dict, info: Info, size: int | None = None) -> Sample:
    """One sample of the set that `info` describes.

    Raises:
        BadSample: a member is missing, cannot be decoded, is not finite, or differs from the set in shape or dtype.
    """
    x = None
    if info.samples:
        channels = info.shape[0] if len(info.shape) == 3 and info.shape[0] in (1, 3) else None
        x = values(members, channels, size)
        _check_member(x, Member(info.shape, info.dtype), "")
    number = label(members, info.classes) if info.classes else None
    text = caption(members) if info.captions else None
    return Sample(x, number, text, _stated_conditions(members, info))


def _stated_conditions(members: dict, info: Info) -> dict[str, np.ndarray]:
    cond = {}
    for name, member in info.members.items():
        if f"{name}.npy" not in members:
            raise BadSample(f"has no .{name}.npy member")
        cond[name] = _decoded(members, f"{name}.npy")
        _check_member(cond[name], member, f".{name}.npy member ")
    return cond


def _check_member(x: np.ndarray, member: Member, subject: str) -> None:
    if x.shape != member.shape or x.dtype.name != member.dtype:
        raise BadSample(f"{subject}is {x.dtype.name} {x.shape} where the set is {member.dtype} {member.shape}")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise BadSample(f"{subject}holds NaN or infinite values")


def collate(samples: list[Sample], info: Info) -> Batch:
    """Samples as a batch, with the keys that the set has.

    "x" is float32 (B, ...), "label" int64 (B,), "caption" a list. Conditions that are stored as floats are float32, others
    keep their dtype.
    """
    batch: Batch = {}
    if info.samples:
        batch["x"] = info.to_x(torch.from_numpy(np.stack([sample.x for sample in samples])))
    for name in info.members:
        batch[name] = widened(torch.from_numpy(np.stack([sample.cond[name] for sample in samples])))
    if info.classes:
        batch["label"] = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    if info.captions:
        batch["caption"] = [sample.caption for sample in samples]
    return batch


def widened(x: Tensor) -> Tensor:
    """Floats as float32; other dtypes unchanged."""
    return x.float() if x.is_floating_point() else x


def resized(info: Info, size: int | None) -> Info:
    """`info` of images that are resized to `size` x `size`."""
    return info if size is None else replace(info, shape=(info.shape[0], size, size))
