"""Base class of all data sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.data.info import Info
from distill.data.iteration import ResumableIteration

Batch = dict[str, Tensor | list[str]]


@runtime_checkable
class Distribution(Protocol):
    """A distribution that can be sampled exactly."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """x (n, ...) and labels (n,), or None without classes."""


@runtime_checkable
class ExactLaw(Protocol):
    """A distribution with a known density under noise, such as `distill.denoise.GaussianMixture`."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """x (n, ...) and labels (n,), or None without classes."""

    def log_prob(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """log p_t(x_t), (B,)."""


class Dataset(ResumableIteration):
    """A source of training batches whose order is known for every step.

    A batch is a dict: "x" float32 (B, ...), images (B, C, H, W) in [-1, 1]; "label" int64 (B,), -1 for no class;
    "caption" list of B str; conditions by name, float32 (B, ...). Each key is there only if the dataset has it.

    Subclasses set `info` and `batch_size` and implement `loader`.

    Attributes:
        info: shape, classes, count and the rest, see `Info`.
        batch_size: samples of a batch (one rank, one micro-batch).
        samples: whether batches have "x"; False for conditions alone.
        null: the null (unconditional) condition by name, one row each; None if the dataset has none.
        shapes: shapes of `x` by bucket, the largest bucket first; None when all samples have `info.shape`.
        oracle: the exact distribution of `x` with a `log_prob`, to validate against; None if it is not known.
        cached: whether the samples are in memory; False for a stream, whose order depends on `workers` and `window`.
        workers: processes that read a stream.
        window: samples that a stream shuffles at a time.
        accumulate: micro-batches of one training step. The run sets it; a dataset whose batches differ in shape gives
            each group of `accumulate` consecutive batches one shape.
    """

    info: Info
    batch_size: int
    samples: bool = True
    null: dict[str, Tensor] | None = None
    shapes: list[tuple[int, ...]] | None = None
    oracle: ExactLaw | None = None
    cached: bool = True
    workers: int = 0
    window: int = 0
    accumulate: int = 1
    default_limit: ClassVar[int] = 10_000  # samples of `all()` where a pass has no end

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
        """An infinite iterator over full batches of `rank` out of `world` ranks, starting at batch `start`.

        Batch n of a rank is a function of the dataset's seed, `rank`, `world` and n.
        """
        raise NotImplementedError

    def all(self, limit: int | None = None, conditions: bool = True) -> Batch:
        """A fixed set of samples as one batch, the same at every call; here, the first of rank 0's batches.

        Args:
            limit: largest number of samples; None gives one pass, or `default_limit` samples of an endless source.
            conditions: False leaves out `info.members`.
        """
        limit = self.info.count or self.default_limit if limit is None else limit
        batches, count = [], 0
        for batch in self.loader():
            batches.append(batch)
            count += self.batch_size
            if count >= limit:
                break
        batch = {key: value[:limit] for key, value in concatenate(batches).items()}
        return batch if conditions else without(batch, self.info.members)


def concatenate(batches: list[Batch]) -> Batch:
    """Batches with the same keys as one batch."""
    return {key: _joined([batch[key] for batch in batches]) for key in batches[0]}


def _joined(values: list) -> Tensor | list[str]:
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]


def without(batch: Batch, names: Any) -> Batch:
    """A batch without the keys in `names`."""
    return {key: value for key, value in batch.items() if key not in names}
