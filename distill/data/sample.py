"""Members of a raw sample to pixels or latents, conditions, label and caption."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from distill.data import array, image
from distill.data.damage import Bad
from distill.data.info import Info, Member

_CODECS = ("npy", *image.SUFFIXES)


@dataclass
class Sample:
    """One decoded sample: stored values, label (None without classes), caption (None without captions), conditions."""

    x: np.ndarray | None
    label: int | None = None
    caption: str | None = None
    cond: dict[str, np.ndarray] = field(default_factory=dict)


def suffix(members: dict) -> str:
    """The member that holds the array or image.

    Raises:
        Bad: there is none.
    """
    for name in _CODECS:
        if name in members:
            return name
    has = ", ".join(k for k in members if not k.startswith("__"))
    raise Bad(f"has no array or image member, only {has or 'nothing'}")


def values(members: dict, channels: int | None = None, size: int | None = None) -> np.ndarray:
    """Stored values of the array or image, `channels` and `size` as in `image.decode`.

    Raises:
        Bad: there is none, or it cannot be decoded.
    """
    return _decoded(members, suffix(members), channels, size)


def named(members: dict) -> dict[str, np.ndarray]:
    """The further tensors: member NAME.npy by NAME.

    Raises:
        Bad: one cannot be decoded.
    """
    found = [k for k in members if k.endswith(".npy")]
    return {k.removesuffix(".npy"): _decoded(members, k) for k in found}


def _decoded(members: dict, name: str, channels: int | None = None, size: int | None = None) -> np.ndarray:
    try:
        x = array.decode(members[name]) if name.split(".")[-1] == "npy" else image.decode(members[name], channels, size)
        return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
    except Exception as error:  # whatever the bytes provoke in a decoder, the sample is at fault
        raise Bad(f".{name} member cannot be decoded: {(str(error) or repr(error)).splitlines()[0]}") from None


def label(members: dict, classes: int | None = None) -> int:
    """The class in the .cls member, 0 <= label < classes.

    Raises:
        Bad: missing, not a number, or outside.
    """
    if "cls" not in members:
        raise Bad("has no .cls member")
    try:
        found = int(members["cls"])
    except ValueError:
        raise Bad(f".cls member is not a whole number: {bytes(members['cls'][:20])!r}") from None
    if found < 0 or (classes is not None and found >= classes):
        raise Bad(f"class {found} is outside 0 to {'' if classes is None else classes - 1}".rstrip())
    return found


def caption(members: dict) -> str:
    """The text in the .txt member, UTF-8.

    Raises:
        Bad: missing or not UTF-8.
    """
    if "txt" not in members:
        raise Bad("has no .txt member")
    try:
        return members["txt"].decode()
    except UnicodeDecodeError:
        raise Bad(".txt member is not UTF-8") from None


def decode(members: dict, info: Info, size: int | None = None) -> Sample:
    """One sample of the set that `info` describes.

    Raises:
        Bad: a member is missing, cannot be decoded, is not finite, or is not of the set's shape and type.
    """
    x = None
    if info.samples:
        x = values(members, info.shape[0] if len(info.shape) == 3 and info.shape[0] in (1, 3) else None, size)
        _fits(x, Member(info.shape, info.dtype), "")
    y = label(members, info.classes) if info.classes else None
    return Sample(x, y, caption(members) if info.captions else None, _conditions(members, info))


def _conditions(members: dict, info: Info) -> dict[str, np.ndarray]:
    found = {}
    for name, member in info.members.items():
        if f"{name}.npy" not in members:
            raise Bad(f"has no .{name}.npy member")
        found[name] = _decoded(members, f"{name}.npy")
        _fits(found[name], member, f".{name}.npy member ")
    return found


def _fits(x: np.ndarray, member: Member, what: str) -> None:
    if x.shape != member.shape or x.dtype.name != member.dtype:
        raise Bad(f"{what}is {x.dtype.name} {x.shape} where the set is {member.dtype} {member.shape}")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise Bad(f"{what}holds NaN or infinite values")


def collate(rows: list[Sample], info: Info) -> dict[str, Tensor | list[str]]:
    """A batch: "x" float32 (B, ...), conditions by name, "label" int64 (B,) and "caption" as far as the set has them.

    Conditions are float32 where they are stored as floats of any size, else as stored.
    """
    batch: dict[str, Tensor | list[str]] = {}
    if info.samples:
        batch["x"] = info.to_x(torch.from_numpy(np.stack([r.x for r in rows])))
    for name in info.members:
        batch[name] = wide(torch.from_numpy(np.stack([r.cond[name] for r in rows])))
    if info.classes:
        batch["label"] = torch.tensor([r.label for r in rows], dtype=torch.int64)
    if info.captions:
        batch["caption"] = [r.caption for r in rows]
    return batch


def wide(x: Tensor) -> Tensor:
    """Floats as float32, all else as it is."""
    return x.float() if x.is_floating_point() else x


def resized(info: Info, size: int | None) -> Info:
    """`info` of images brought to `size` by `size`."""
    return info if size is None else replace(info, shape=(info.shape[0], size, size))
