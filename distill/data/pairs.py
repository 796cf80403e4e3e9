"""Stored pairs of noise and the teacher's ODE solution from it, or whole ODE paths.

On disk a path is one array (n, ...), from x at t = 0 to z at t = 1; a pair has n = 2. The `source` of the index holds a
fingerprint of the teacher's weights, and the times. https://arxiv.org/abs/2209.03003, https://arxiv.org/abs/2101.02388
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.base import Batch, Dataset, ExactLaw
from distill.data.info import Info
from distill.data.shards.dataset import CACHE_MB, Shards
from distill.data.shards.write import SHARD_SAMPLES, Split, refuse_existing, write_splits
from distill.errors import BadInput
from distill.files import digest

_SOURCE = "pairs of teacher "


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
    per_shard: int = SHARD_SAMPLES,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Info | None:
    """Solve `count` paths and write them to OUT/train. Ranks share the batches; the bytes do not depend on their number.

    Args:
        out: the folder to create.
        path: (z (B, ...), {"label": (B,)} or {}) -> (B, n, ...), such as `Reflow.path`, on the teacher's device.
        teacher: its fingerprint is stored.
        count: number of paths.
        shape: of one sample.
        times: 0 = t_0 < ... < t_{n-1} = 1 of a path.
        classes: labels are drawn uniformly from 0..classes-1; 0 for none.
        about: solver, steps and guidance, for people.
        seed: of noise and labels.
        batch: samples solved at once.
        per_shard: largest number of paths in a shard.
        rank, world: this process among all.
        barrier: waits for all ranks.

    Returns:
        The Info of the written split on rank 0; None on other ranks.

    Raises:
        BadInput: OUT exists or cannot be written, `count` is below 1, or a path is not finite.
    """
    if count < 1:
        raise BadInput(f"{count} pairs: give 1 or more.")
    out = Path(out).expanduser()
    refuse_existing(out)  # checked before hours of solving
    scratch = out.parent / f".{out.name}.solving"
    if rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
        scratch.mkdir(parents=True)
    barrier()
    try:
        paths = _shared_array(scratch / "paths.npy", rank, np.float32, (count, len(times), *shape), barrier)
        label = _shared_array(scratch / "label.npy", rank, np.int64, (count,), barrier)
        device = next((p.device for p in (*teacher.parameters(), *teacher.buffers())), torch.device("cpu"))
        for i in range(rank * batch, count, world * batch):
            random = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
            z = torch.randn(min(batch, count - i), *shape, generator=random)
            cond = {"label": torch.randint(classes, (len(z),), generator=random)} if classes else {}
            solved = path(z.to(device), {key: value.to(device) for key, value in cond.items()}).float().cpu()
            if not torch.isfinite(solved).all():
                raise BadInput(f"The teacher's ODE solution is not finite in pairs {i} to {i + len(z) - 1}: {about}.")
            paths[i : i + len(z)], label[i : i + len(z)] = solved.numpy(), cond.get("label", 0)
        paths.flush()
        label.flush()
        barrier()
        if rank:
            return None
        source = (
            f"{_SOURCE}{model_fingerprint(teacher)}, at {'/'.join(map(repr, times))}, {about or 'solver not stated'}"
        )
        splits = {"train": Split(paths.__getitem__, count, np.array(label) if classes else None)}
        info = Info((), classes, source=source)
        return write_splits(out, splits, info, seed=seed, per_shard=per_shard)["train"]
    finally:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _shared_array(file: Path, rank: int, dtype: type, shape: tuple[int, ...], barrier: Callable[[], None]) -> np.memmap:
    """A memory-mapped array that all ranks write to; rank 0 creates it."""
    if rank == 0:
        np.lib.format.open_memmap(file, "w+", dtype, shape).flush()
    barrier()
    return np.lib.format.open_memmap(file, "r+")


class Pairs(Dataset):
    """Batches with "x" and "z" from shards that `write` made; of paths also "path" (B, n, ...) and "times" (B, n).

    Args:
        path: the split, OUT/train.
        batch_size, seed, workers, cache_mb, labels: as for `distill.data.shards.Shards`.
        teacher: refuse pairs of another teacher; in a config, ${roles.teacher}.

    Attributes:
        info: of x.

    Raises:
        BadInput: as `Shards`; shards without pairs, or pairs of another teacher.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        *,
        cache_mb: float = CACHE_MB,
        labels: bool = True,
        teacher: nn.Module | None = None,
    ):
        self.shards = Shards(path, batch_size, seed, workers, cache_mb=cache_mb, labels=labels)
        info = self.shards.info
        if not info.source.startswith(_SOURCE):
            raise BadInput(f"{path} holds no pairs but {info.source or 'samples'}: make some by `distill data pairs`.")
        stored, times = info.source.removeprefix(_SOURCE).split(", ")[:2]
        if teacher is not None and stored != model_fingerprint(teacher):
            raise BadInput(
                f"{path} holds pairs of teacher {stored}, but this run's is {model_fingerprint(teacher)}: "
                "solve new ones by `distill data pairs`, or name the teacher that they came from."
            )
        self.times = tuple(float(t) for t in times.removeprefix("at ").split("/"))
        self.batch_size, self.info = batch_size, replace(info, shape=info.shape[1:])
        self.cached, self.workers, self.window = self.shards.cached, workers, self.shards.window
        self.oracle = teacher if isinstance(teacher, ExactLaw) else None

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
        """Endless batches of `rank` out of `world`, from batch `start` on."""
        return map(self._split, self.shards.loader(rank, world, start))

    def all(self, limit: int | None = None, conditions: bool = True) -> Batch:
        """The split as one batch in stored order, or its first `limit` pairs."""
        return self._split(self.shards.all(limit, conditions))

    def _split(self, batch: Batch) -> Batch:
        path = batch["x"]
        batch = batch | {"x": path[:, 0], "z": path[:, -1]}
        if len(self.times) > 2:
            batch |= {"path": path, "times": torch.tensor(self.times).expand(len(path), -1)}
        return batch


def model_fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that identify a model: SHA-256 of its weights and buffers, its schedule and its prediction."""
    return digest(_contents(model))


def _contents(model: nn.Module) -> Iterator[bytes | str]:
    yield f"{getattr(model, 'schedule', '')}{getattr(model, 'prediction', '')}"
    for name, value in sorted(model.state_dict().items()):
        yield f"{name}{value.dtype}{tuple(value.shape)}"
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
