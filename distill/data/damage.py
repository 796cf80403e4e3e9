"""What is broken in a set of shards: counted, named, and refused when it is too much."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from distill.errors import BadInput

log = logging.getLogger(__name__)


class Bad(Exception):
    """One sample that cannot be used; the message is the reason."""


class Cut(Exception):
    """A shard that cannot be read to its end; the message is the reason."""


@dataclass(frozen=True)
class Damage:
    """A damaged shard (`sample` empty) or a damaged sample in it, and how many samples that loses."""

    shard: str
    sample: str
    reason: str
    lost: int = 1

    def __str__(self) -> str:
        return f"{self.shard}{f' sample {self.sample}' if self.sample else ''} ({self.reason})"


class Ledger:
    """Damage met so far, each shard or sample once.

    Args:
        budget: how much is skipped before it is refused: a whole number counts damaged shards and samples alike, a
            share below 1 is that of the set's samples lost.
        where: the path that messages name.

    Raises:
        BadInput: from `take`, when the budget is exceeded.
    """

    def __init__(self, budget: int | float, where: str):
        if isinstance(budget, bool) or budget < 0 or (isinstance(budget, float) and budget >= 1):
            raise BadInput(f"budget={budget} must be a whole number of damaged samples, or a share from 0 to below 1.")
        self.budget, self.where = budget, where
        self.total = 0  # samples of the set; a share is measured against it
        self.entries: dict[tuple[str, str], Damage] = {}

    @property
    def lost(self) -> int:
        """Samples lost so far."""
        return sum(d.lost for d in self.entries.values())

    def take(self, found: Iterable[Damage]) -> None:
        """Log and count what is new."""
        for damage in found:
            if (damage.shard, damage.sample) not in self.entries:
                self.entries[damage.shard, damage.sample] = damage
                log.warning("skipped damaged %s; %d so far, budget %s", damage, len(self.entries), self.budget)
        share = isinstance(self.budget, float)
        if (self.lost > self.budget * self.total) if share else (len(self.entries) > self.budget):
            raise BadInput(
                f"{len(self.entries)} damaged shards or samples in {self.where} exceed budget={self.budget}: "
                f"{self.names()}. Write those shards again, or raise budget to train on what is left."
            )

    def names(self, most: int = 5) -> str:
        """The first few, in words."""
        few = [str(d).removeprefix(f"{self.where}/") for d in list(self.entries.values())[:most]]
        more = len(self.entries) - len(few)
        return "; ".join(few) + (f"; and {more} more" if more else "")
