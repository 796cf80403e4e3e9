"""Pairs of noise and where a teacher's ODE takes it, or its path there, solved once and stored.

On disk a path is one array (n, ...), from x at t = 0 to z at t = 1, in shards like any others; a pair has n = 2. The source
in their index names the teacher by a fingerprint of its weights, and the times. https://arxiv.org/abs/2209.03003,
https://arxiv.org/abs/2101.02388
"""

from __future__ import annotations

import hashlib
import os
import shutil
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
    path: Callable[[Tensor, dict[str, Tensor]], Tensor],
    teacher: nn.Module,
    count: int,
    shape: tuple[int, ...],
    *,
    times: tuple[float, ...] = (0.0, 1.0),
    classes: int = 0,
    about: str = "",
    seed: int = 0,
    batch: int = 256,
    per_shard: int = SHARD,
    rank: int = 0,
    world: int = 1,
    meet: Callable[[], None] = lambda: None,
) -> Info | None:
    """`count` paths to OUT/train, each batch by one of `world` processes; the same bytes however many there are.

    Args:
        out: the folder to make.
        path: (z (B, ...), {"label": (B,)} or {}) -> (B, n, ...), such as `Reflow.path`, on the teacher's device.
        teacher: whose fingerprint the shards carry.
        count, shape: how many, and of one sample.
        times: 0 = t_0 < ... < t_{n-1} = 1 of a path.
        classes: labels are drawn uniformly from so many; 0 for none.
        about: solver, steps and guidance, in words.
        seed: of noise and labels.
        batch: samples solved at once.
        per_shard: largest number of paths in a shard.
        rank, world: this process among all; `meet` waits for the others.

    Returns:
        what was written, on the first rank.

    Raises:
        BadInput: OUT exists or cannot be written, count below 1, or a path is not finite.
    """
    if count < 1:
        raise BadInput(f"{count} pairs: give 1 or more.")
    out = Path(out).expanduser()
    if os.path.lexists(out):  # before hours of solving
        raise BadInput(f"{out} exists already and is never overwritten: give another folder, or remove it first.")
    scratch = out.parent / f".{out.name}.solving"
    if rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        scratch.mkdir(parents=True)
    meet()
    try:
        paths, label = (_array(scratch / name, rank, world, kind, (count, *rest), meet) for name, kind, rest in
                        (("paths.npy", np.float32, (len(times), *shape)), ("label.npy", np.int64, ())))
        device = next((p.device for p in (*teacher.parameters(), *teacher.buffers())), torch.device("cpu"))
        for i in range(rank * batch, count, world * batch):
            random = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
            z = torch.randn(min(batch, count - i), *shape, generator=random)
            cond = {"label": torch.randint(classes, (len(z),), generator=random)} if classes else {}
            found = path(z.to(device), {k: v.to(device) for k, v in cond.items()}).float().cpu()
            if not torch.isfinite(found).all():
                raise BadInput(f"The teacher's ODE left the finite numbers in pairs {i} to {i + len(z) - 1}: {about}.")
            paths[i : i + len(z)], label[i : i + len(z)] = found.numpy(), cond.get("label", 0)
        paths.flush(), label.flush()
        meet()
        if rank:
            return None
        source = f"{_MARK}{fingerprint(teacher)}, at {'/'.join(map(repr, times))}, {about or 'solver not stated'}"
        parts = {"train": Part(paths.__getitem__, count, np.array(label) if classes else None)}
        return shards(out, parts, Info((), classes, source=source), seed=seed, per_shard=per_shard)["train"]
    finally:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _array(file: Path, rank: int, world: int, kind: type, shape: tuple[int, ...], meet: Callable[[], None]) -> np.memmap:
    """One array on disk that all processes write to; the first one makes it."""
    if rank == 0:
        np.lib.format.open_memmap(file, "w+", kind, shape).flush()
    meet()
    return np.lib.format.open_memmap(file, "r+")


class Pairs:
    """Batches with "x" and "z" from shards that `write` made; of paths also "path" (B, n, ...) and "times" (B, n).

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
        stored, at = info.source.removeprefix(_MARK).split(", ")[:2]
        if teacher is not None and stored != fingerprint(teacher):
            raise BadInput(
                f"{path} holds pairs of teacher {stored}, but this run's is {fingerprint(teacher)}: "
                "solve new ones by `distill data pairs`, or name the teacher that they came from."
            )
        self.times = tuple(float(t) for t in at.removeprefix("at ").split("/"))
        self.batch_size, self.info = batch_size, replace(info, shape=info.shape[1:])
        if teacher is not None:
            self.source = teacher  # an oracle is also the exact law to validate against

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
        """Endless batches of `rank` out of `world`, from batch `start` on."""
        return map(self._split, self.shards.loader(rank, world, start))

    def all(self, limit: int | None = None) -> Batch:
        """The split as one batch in stored order, or its first `limit` pairs."""
        return self._split(self.shards.all(limit))

    def _split(self, batch: Batch) -> Batch:
        path = batch["x"]
        more = {"path": path, "times": torch.tensor(self.times).expand(len(path), -1)} if len(self.times) > 2 else {}
        return batch | {"x": path[:, 0], "z": path[:, -1]} | more


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that name a model: SHA-256 of its weights and buffers, its schedule and its prediction."""
    digest = hashlib.sha256(f"{getattr(model, 'schedule', '')}{getattr(model, 'prediction', '')}".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]

