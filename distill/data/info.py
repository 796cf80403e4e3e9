"""What a set of samples is: shape, classes, range; and the check against a network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distill.errors import BadInput


@dataclass(frozen=True)
class Member:
    """A named tensor that every sample of a set holds beside x: its shape in one sample, and its stored type."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Info:
    """Facts about a split.

    Attributes:
        shape: of one sample, images (C, H, W).
        classes: number of classes; 0 when samples carry no label.
        count: samples in one pass; 0 when they are drawn without end.
        names: one a class, or empty.
        range: stored values that stand for -1 and 1.
        mean, std: over all values of the split in the scale of `x`; None when not measured.
        dtype: of the stored values.
        captions: whether every sample has one.
        source: where the samples came from, in words.
        path: what messages name.
        members: further tensors of every sample by name, such as the conditions `text` and `pooled`.
        samples: False for conditions alone, without x; `shape` is then that of what the method will make.
        encoder: what made latents and conditions: fingerprints `vae`, `text`, `image`; `pipeline`, `size`, `framed` in words.
    """

    shape: tuple[int, ...]
    classes: int = 0
    count: int = 0
    names: tuple[str, ...] = ()
    range: tuple[float, float] = (-1.0, 1.0)
    mean: float | None = None
    std: float | None = None
    dtype: str = "float32"
    captions: bool = False
    source: str = ""
    path: str = ""
    members: dict[str, Member] = field(default_factory=dict)
    samples: bool = True
    encoder: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of one decoded sample."""
        held = [*self.members.values(), *([Member(self.shape, self.dtype)] if self.samples else [])]
        return sum(math.prod(m.shape) * np.dtype(m.dtype).itemsize for m in held)

    def to_x(self, raw: Tensor) -> Tensor:
        """Stored values to float32 x = 2 (raw - low) / (high - low) - 1, (low, high) = `range`."""
        x = raw.to(torch.float32)
        low, high = self.range
        return x if (low, high) == (-1.0, 1.0) else (x - low).div_((high - low) / 2).sub_(1)


def check(info: Info, shape: tuple[int, ...] | list[int], classes: int | None = None) -> None:
    """Refuse data that the network cannot take.

    Args:
        info: of the data.
        shape: of one sample, as the network expects it.
        classes: the network's number of classes, 0 for a network without labels; None does not compare.

    Raises:
        BadInput: another shape or number of classes.
    """
    where = f"shards in {info.path}" if info.path else "the data"
    same = classes is None or classes == info.classes
    if tuple(shape) == tuple(info.shape) and same:
        return
    expects = f"shape {tuple(shape)}" if classes is None else f"{classes} classes of shape {tuple(shape)}"
    mend = "set the network's shape and classes to these, or give other shards"
    if not same and classes == 0 and tuple(shape) == tuple(info.shape):
        mend = "give the network its classes, or train without labels by labels=false in the data"
    raise BadInput(
        f"{where} hold {info.classes} classes of shape {tuple(info.shape)}, but the network expects {expects}: {mend}."
    )
