"""What a dataset holds: shape, classes, value range, captions and conditions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distill.errors import BadInput


@dataclass(frozen=True)
class Member:
    """A named tensor that every sample of a dataset has besides `x`: its shape for one sample and its stored dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Info:
    """Facts about one split of a dataset.

    Attributes:
        shape: of one sample; images are (C, H, W). Without samples, the shape that the method will generate.
        classes: number of classes; 0 when samples have no label.
        count: samples in one pass; 0 when samples are drawn without end.
        names: class names in label order, or empty.
        range: stored values (low, high) that map to (-1, 1).
        mean, std: over all values of the split on the scale of `x`; None when not measured.
        dtype: of the stored values.
        captions: whether every sample has a caption.
        source: where the samples came from, for people.
        path: the path that messages name.
        members: conditions stored with every sample by name, such as `text` and `pooled`.
        samples: False for conditions without `x`.
        encoder: what encoded latents and conditions: fingerprints `vae`, `text`, `image`; and `pipeline`, `size`, `framed`.
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
        """Size of one decoded sample."""
        members = [*self.members.values()]
        if self.samples:
            members.append(Member(self.shape, self.dtype))
        return sum(math.prod(m.shape) * np.dtype(m.dtype).itemsize for m in members)

    def to_x(self, raw: Tensor) -> Tensor:
        """Stored values to float32 x = 2 (raw - low) / (high - low) - 1, with (low, high) = `range`."""
        x = raw.to(torch.float32)
        low, high = self.range
        return x if (low, high) == (-1.0, 1.0) else (x - low).div_((high - low) / 2).sub_(1)


def check(info: Info, shape: tuple[int, ...] | list[int], classes: int | None = None) -> None:
    """Refuse data that a network cannot take.

    Args:
        info: of the data.
        shape: of one sample, as the network expects it.
        classes: the network's number of classes, 0 for a network without labels; None skips the comparison.

    Raises:
        BadInput: the shape or the number of classes differs.
    """
    same_classes = classes is None or classes == info.classes
    same_shape = tuple(shape) == tuple(info.shape)
    if same_shape and same_classes:
        return
    where = f"shards in {info.path}" if info.path else "the data"
    expected = f"shape {tuple(shape)}" if classes is None else f"{classes} classes of shape {tuple(shape)}"
    mend = "set the network's shape and classes to these, or give other shards"
    if same_shape and classes == 0:
        mend = "give the network its classes, or train without labels by labels=false in the data"
    raise BadInput(
        f"{where} hold {info.classes} classes of shape {tuple(info.shape)}, but the network expects {expected}: {mend}."
    )
