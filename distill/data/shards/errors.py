"""Unreadable shards and samples: counted, named in messages, and refused beyond a budget."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from distill.errors import BadInput

log = logging.getLogger(__name__)


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason."""


class UnreadableShard(Exception):
    """A shard that cannot be read to its end; the message is the reason."""


@dataclass(frozen=True)
class ShardError:
    """A damaged shard (`sample` is empty) or a damaged sample in it, and the number of samples lost by it."""

    shard: str
    sample: str
    reason: str
    lost: int = 1

    def __str__(self) -> str:
        sample = f" sample {self.sample}" if self.sample else ""
        return f"{self.shard}{sample} ({self.reason})"


class ShardErrors:
    """Errors found so far in a set of shards; each shard or sample counts once.

    Args:
        budget: errors that are skipped before reading fails. An int counts damaged shards and samples; a float below 1
            is the share of the set's samples that may be lost.
        path: named in messages.

    Attributes:
        total: samples of the set, which a share is measured against.
        entries: errors by (shard, sample).

    Raises:
        BadInput: from `count`, when the budget is exceeded.
    """

    def __init__(self, budget: int | float, path: str):
        if isinstance(budget, bool) or budget < 0 or (isinstance(budget, float) and budget >= 1):
            raise BadInput(f"budget={budget} must be a whole number of damaged samples, or a share from 0 to below 1.")
        self.budget, self.path = budget, path
        self.total = 0
        self.entries: dict[tuple[str, str], ShardError] = {}

    @property
    def lost(self) -> int:
        """Samples lost so far."""
        return sum(error.lost for error in self.entries.values())

    @property
    def exceeded(self) -> bool:
        """Whether there are more errors than the budget allows."""
        if isinstance(self.budget, float):
            return self.lost > self.budget * self.total
        return len(self.entries) > self.budget

    def count(self, errors: Iterable[ShardError]) -> None:
        """Log and count the errors that are new."""
        for error in errors:
            if (error.shard, error.sample) not in self.entries:
                self.entries[error.shard, error.sample] = error
                log.warning("skipped damaged %s; %d so far, budget %s", error, len(self.entries), self.budget)
        if self.exceeded:
            raise BadInput(
                f"{len(self.entries)} damaged shards or samples in {self.path} exceed budget={self.budget}: "
                f"{self.summary()}. Write those shards again, or raise budget to train on what is left."
            )

    def summary(self, limit: int = 5) -> str:
        """The first errors as one line."""
        first = [str(error).removeprefix(f"{self.path}/") for error in list(self.entries.values())[:limit]]
        more = len(self.entries) - len(first)
        return "; ".join(first) + (f"; and {more} more" if more else "")
