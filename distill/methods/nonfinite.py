"""Counts turns that were skipped because their loss or gradient was not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class NonFiniteGuard:
    """Skipped turns by role, in total and in a row. Counts stay on the device; only reading them synchronises.

    Args:
        roles: names to count under.
        limit: skipped turns of one role in a row after which the run goes back to a checkpoint.
    """

    def __init__(self, roles: Iterable[str], limit: int = 10):
        self.limit = limit
        self.counts = {role: torch.zeros(2, dtype=torch.long) for role in roles}  # in all, in a row

    def update(self, role: str, stepped: Tensor) -> Tensor:
        """Count a turn, `stepped` a 0-dimensional bool; returns how many have been skipped in all."""
        skipped = (~stepped).long()
        before = self.counts[role].to(stepped.device)
        self.counts[role] = torch.stack([before[0] + skipped, (before[1] + 1) * skipped])
        return self.counts[role][0]

    def over(self) -> str | None:
        """A role that has reached the limit, or None."""
        return next((role for role, n in self.state().items() if n[1] >= self.limit), None)

    def clean(self) -> bool:
        """Whether the last turn of every role was taken."""
        return not any(n[1] for n in self.state().values())

    def state(self) -> dict[str, list[int]]:
        return {role: n.tolist() for role, n in self.counts.items()}

    def restore(self, state: dict[str, list[int]]) -> None:
        self.counts |= {role: torch.tensor(n) for role, n in state.items()}
