"""Evaluation on several processes: each has a share of the samples; rank 0 computes the metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import BadInput

MINUTES = 1440.0  # that ranks wait for each other where no config says it


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

    def gather_to_all(self, x: Tensor) -> Tensor:
        """The rows of all ranks in order of rank, on the CPU of each."""
        return x.cpu()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The result of `make` on rank 0, returned on all ranks; its exception is raised on all ranks."""
        return make()

    def on_all(self, make: Callable[[], Any]) -> Any:
        """The result of `make` on this rank. An exception on any rank is raised on all, so that none waits for another."""
        return make()


class GroupShares(SampleShares):
    """All ranks, in a gloo group of their own: one rank may draw and score for long while the others wait.

    Args:
        minutes: that a rank waits for the others.

    Raises:
        BadInput: from every method, after waiting that long.
    """

    groups: dict[tuple[int, float], Any] = {}  # by default group and limit: each is made once, by all ranks

    def __init__(self, minutes: float = MINUTES):
        self.rank, self.world, self.minutes = dist.get_rank(), dist.get_world_size(), minutes
        key = id(dist.group.WORLD), minutes
        if key not in self.groups:
            self.groups[key] = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
        self.group = self.groups[key]

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
            raise BadInput(
                f"Rank {self.rank} waited {self.minutes:g} minutes for another rank to draw or score its samples; raise "
                "engine.validation_timeout, or lower eval.validation_samples."
            ) from error

    def _objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        with self._waiting():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def counts(self, n: int) -> list[int]:
        return self._objects(n)

    def gather(self, x: Tensor) -> Tensor | None:
        padded, counts = self._padded(x)
        parts = [torch.empty_like(padded) for _ in counts] if self.rank == 0 else None
        with self._waiting():
            dist.gather(padded, parts, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, counts)]) if parts else None

    def gather_to_all(self, x: Tensor) -> Tensor:
        padded, counts = self._padded(x)
        parts = [torch.empty_like(padded) for _ in counts]
        with self._waiting():
            dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    def _padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """This rank's rows with zeros up to the most rows of a rank, and the number of rows of every rank."""
        x = x.detach().cpu().contiguous()
        facts = self._objects((len(x), tuple(x.shape[1:]), x.dtype))
        most = max(n for n, *_ in facts)
        row, dtype = next(((row, dtype) for n, row, dtype in facts if n), facts[0][1:])
        padded = torch.zeros(most, *row, dtype=dtype)
        padded[: len(x)] = x
        return padded, [n for n, *_ in facts]

    def from_first(self, make: Callable[[], Any]) -> Any:
        result: list[Any] = [None]
        if self.rank == 0:
            result = [_attempt(make)]
        with self._waiting():
            dist.broadcast_object_list(result, group=self.group)
        return _unpack(result[0])

    def on_all(self, make: Callable[[], Any]) -> Any:
        mine = _attempt(make)
        if failed := next((e for e in self._objects(mine[1]) if e), None):
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


def current_shares(minutes: float = MINUTES) -> SampleShares:
    """The ranks of this process: a group where one was started; all of them call it. `minutes`: see `GroupShares`."""
    return (
        GroupShares(minutes) if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else ALONE
    )
