"""Turns that were not taken because their loss or gradient was not finite: how many in all, how many in a row."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Skips:
    """Counts by role, kept on the device: counting waits for no accelerator, reading does.

    Args:
        roles: names to count under.
        limit: turns of one role in a row that are too many.
    """

    def __init__(self, roles: Iterable[str], limit: int = 10):
        self.limit = limit
        self.counts = {role: torch.zeros(2, dtype=torch.long) for role in roles}  # in all, in a row

    def note(self, role: str, stepped: Tensor) -> Tensor:
        """Count a turn, `stepped` a 0-dimensional bool; returns how many have been skipped in all."""
        skipped = (~stepped).long()
        before = self.counts[role].to(stepped.device)
        self.counts[role] = torch.stack([before[0] + skipped, (before[1] + 1) * skipped])
        return self.counts[role][0]

    def over(self) -> str | None:
        """A role that has reached the limit."""
        return next((role for role, n in self.state().items() if n[1] >= self.limit), None)

    def clean(self) -> bool:
        """Whether the last turn of every role was taken."""
        return not any(n[1] for n in self.state().values())

    def state(self) -> dict[str, list[int]]:
        return {role: n.tolist() for role, n in self.counts.items()}

    def restore(self, state: dict[str, list[int]]) -> None:
        self.counts |= {role: torch.tensor(n) for role, n in state.items()}
