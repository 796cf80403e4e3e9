"""Datasets as iterables that any `lightning.Trainer` takes and resumes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor


class ResumableIteration:
    """Resumable iteration over a dataset's batches: `iter`, `len`, `state_dict`, `load_state_dict`.

    A dataset with a known `info.count` has epochs of that many samples, shared by the ranks; one that draws samples has
    no length. The order of the batches depends only on the seed, rank, number of ranks and position.
    """

    position: int = 0  # batches that training has consumed

    def __iter__(self) -> Iterator[dict[str, Tensor | list[str]]]:
        rank, world = rank_and_world()
        ahead = 0 if self.info.count else 1  # Lightning fetches one batch ahead of an iterable without length
        for n, batch in enumerate(self.loader(rank, world, self.position), self.position + 1):
            self.position = n - ahead
            yield batch

    def __len__(self) -> int:
        if not self.info.count:
            raise TypeError(f"{type(self).__name__} draws samples without end and has no length.")
        return max(self.info.count // (self.batch_size * rank_and_world()[1]), 1)

    def __bool__(self) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        """The position, for a checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self.position = state["position"]


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
