"""Evaluation on several processes: each has a share of the samples; rank 0 computes the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import BadInput


class SampleShares:
    """A single process."""

    rank, world = 0, 1

    def share(self, n: int) -> slice:
        """This rank's slice of n rows; the slices of all ranks in order are all rows."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def counts(self, n: int) -> list[int]:
        """Number of rows of every rank, given this rank's n; all ranks call it."""
        return [n]

    def gather(self, x: Tensor) -> Tensor | None:
        """The rows of all ranks in order of rank, on the CPU of rank 0; None on the others."""
        return x.cpu()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The result of `make` on rank 0, returned on all ranks; its exception is raised on all ranks."""
        return make()

    def on_all(self, make: Callable[[], Any]) -> Any:
        """The result of `make` on this rank. An exception on any rank is raised on all, so that none waits for another."""
        return make()


class GroupShares(SampleShares):
    """The ranks of torch's default process group, over its CPU backend."""

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def counts(self, n: int) -> list[int]:
        counts: list[Any] = [None] * self.world
        dist.all_gather_object(counts, n)
        return counts

    def gather(self, x: Tensor) -> Tensor | None:
        x = x.detach().cpu().contiguous()
        facts: list[Any] = [None] * self.world
        dist.all_gather_object(facts, (len(x), tuple(x.shape[1:]), x.dtype))
        most = max(n for n, *_ in facts)
        row, dtype = next(((row, dtype) for n, row, dtype in facts if n), facts[0][1:])
        padded = torch.zeros(most, *row, dtype=dtype)
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in facts] if self.rank == 0 else None
        dist.gather(padded, parts)
        return torch.cat([part[:n] for part, (n, *_) in zip(parts, facts)]) if parts else None

    def from_first(self, make: Callable[[], Any]) -> Any:
        result: list[Any] = [None]
        if self.rank == 0:
            result = [_attempt(make)]
        dist.broadcast_object_list(result)
        return _unpack(result[0])

    def on_all(self, make: Callable[[], Any]) -> Any:
        mine = _attempt(make)
        errors: list[Any] = [None] * self.world
        dist.all_gather_object(errors, mine[1])
        if failed := next((e for e in errors if e), None):
            raise failed
        return mine[0]


def _attempt(make: Callable[[], Any]) -> tuple[Any, BadInput | RuntimeError | None]:
    try:
        return make(), None
    except BadInput as error:
        return None, BadInput(str(error))
    except Exception as error:
        return None, RuntimeError(f"{type(error).__name__}: {error}")


def _unpack(result: tuple[Any, Exception | None]) -> Any:
    value, error = result
    if error:
        raise error
    return value


ALONE = SampleShares()


def current_shares() -> SampleShares:
    """The ranks of this process: a group where one was started."""
    return GroupShares() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else ALONE
