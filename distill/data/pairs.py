"""Pairs of noise and where a teacher's ODE takes it, solved once and stored: what reflow trains on.

On disk a pair is one array (2, ...), x then z, in shards like any others; the source in their index names the teacher
by a fingerprint of its weights. https://arxiv.org/abs/2209.03003
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.info import Info
from distill.data.pack import SHARD, Part, shards
from distill.data.shards import Batch, Shards
from distill.errors import BadInput

_MARK = "pairs of teacher "


def write(
    out: str | os.PathLike,
    endpoint: Callable[[Tensor, dict[str, Tensor]], Tensor],
    teacher: nn.Module,
    count: int,
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    about: str = "",
    seed: int = 0,
    batch: int = 256,
    per_shard: int = SHARD,
) -> Info:
    """`count` pairs to OUT/train; the same teacher, device and seed give the same bytes.

    Args:
        out: the folder to make.
        endpoint: (z (B, ...), {"label": (B,)} or {}) -> x (B, ...), such as `Reflow.endpoint`, on the teacher's device.
        teacher: whose fingerprint the shards carry.
        count, shape: how many, and of one sample.
        classes: labels are drawn uniformly from so many; 0 for none.
        about: solver, steps and guidance, in words.
        seed: of noise and labels.
        batch: samples solved at once.
        per_shard: largest number of pairs in a shard.

    Raises:
        BadInput: OUT exists or cannot be written, count below 1, or an endpoint is not finite.
    """
    if count < 1:
        raise BadInput(f"{count} pairs: give 1 or more.")
    out = Path(out).expanduser()
    if os.path.lexists(out):  # before hours of solving
        raise BadInput(f"{out} exists already and is never overwritten: give another folder, or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.solving-") as scratch:
        pairs = np.lib.format.open_memmap(Path(scratch) / "pairs.npy", "w+", np.float32, (count, 2, *shape))
        label = np.zeros(count, np.int64)
        random = torch.Generator().manual_seed(seed)
        device = next((p.device for p in (*teacher.parameters(), *teacher.buffers())), torch.device("cpu"))
        for i in range(0, count, batch):
            z = torch.randn(min(batch, count - i), *shape, generator=random)
            cond = {"label": torch.randint(classes, (len(z),), generator=random)} if classes else {}
            x = endpoint(z.to(device), {k: v.to(device) for k, v in cond.items()}).float().cpu()
            if not torch.isfinite(x).all():
                raise BadInput(f"The teacher's ODE left the finite numbers in pairs {i} to {i + len(z) - 1}: {about}.")
            pairs[i : i + len(z)] = torch.stack([x, z], 1).numpy()
            label[i : i + len(z)] = cond.get("label", 0)
        info = Info((), classes, source=f"{_MARK}{fingerprint(teacher)}, {about or 'solver not stated'}")
        parts = {"train": Part(pairs.__getitem__, count, label if classes else None)}
        return shards(out, parts, info, seed=seed, per_shard=per_shard)["train"]


class Pairs:
    """Batches with "x" and "z" from shards that `write` made.

    Args:
        path: the split, OUT/train.
        batch_size, seed, workers, cache_mb, labels: as for `distill.data.shards.Shards`.
        teacher: refuse pairs of another one; in a config, ${roles.teacher}.

    Attributes:
        info: of x.

    Raises:
        BadInput: what `Shards` refuses, shards without pairs, or pairs of another teacher.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        *,
        cache_mb: float = 256,
        labels: bool = True,
        teacher: nn.Module | None = None,
    ):
        self.shards = Shards(path, batch_size, seed, workers, cache_mb=cache_mb, labels=labels)
        info = self.shards.info
        if not info.source.startswith(_MARK):
            raise BadInput(f"{path} holds no pairs but {info.source or 'samples'}: make some by `distill data pairs`.")
        stored = info.source.removeprefix(_MARK).split(",")[0]
        if teacher is not None and stored != fingerprint(teacher):
            raise BadInput(
                f"{path} holds pairs of teacher {stored}, but this run's is {fingerprint(teacher)}: "
                "solve new ones by `distill data pairs`, or name the teacher that they came from."
            )
        self.batch_size, self.info = batch_size, replace(info, shape=info.shape[1:])
        if teacher is not None:
            self.source = teacher  # an oracle is also the exact law to validate against

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
        """Endless batches of `rank` out of `world`, from batch `start` on."""
        return map(_split, self.shards.loader(rank, world, start))

    def all(self, limit: int | None = None) -> Batch:
        """The split as one batch in stored order, or its first `limit` pairs."""
        return _split(self.shards.all(limit))


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that name a model: SHA-256 of its weights and buffers, its schedule and its prediction."""
    digest = hashlib.sha256(f"{getattr(model, 'schedule', '')}{getattr(model, 'prediction', '')}".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _split(batch: Batch) -> Batch:
    x, z = batch["x"].unbind(1)
    return batch | {"x": x, "z": z}
