"""What to measure for a kind of data: images against a reference split, 2-D toys against their exact law."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.eval import metrics, pictures


class Images:
    """fd, mmd, precision, recall against reference images, and accuracy of a classifier fitted on them.

    Args:
        x, label: the reference split (n, C, H, W) in [-1, 1] and its classes (n,) or None.
        held_out: the other split, for the finite-sample floor fd(reference, held out).
        reward: what a method ranks its samples by, `metric(x, **cond) -> (B,)`; its mean is scored too.
    """

    headline = "fd"

    def __init__(self, x: Tensor, label: Tensor | None = None, held_out: Tensor | None = None,
                 reward: Any = None):
        self.x, self.label, self.held_out, self.reward = x, label, held_out, reward

    @cached_property
    def accuracy(self) -> metrics.Accuracy | None:
        return None if self.label is None else metrics.Accuracy(self.x, self.label)

    def score(self, x: Tensor, cond: dict[str, Tensor], quick: bool = False) -> dict[str, float]:
        """Metric -> value of samples x made under `cond`; `quick` leaves out what needs all pairs of samples."""
        x = x.cpu().float()
        out = {"fd": metrics.frechet(x, self.x)}
        if self.accuracy and "label" in cond:
            out["accuracy"] = self.accuracy.score(x, cond["label"].cpu())
        if self.reward:
            out["reward"] = float(self.reward(x, **cond).double().mean())
        if not quick:
            out["mmd"] = metrics.mmd(x, self.x)
            out["precision"], out["recall"] = metrics.precision_recall(x, self.x)
        return out

    def floor(self) -> dict[str, float]:
        """Distance between the two real splits: what a perfect model would show against the held-out one."""
        return {} if self.held_out is None else {"fd": metrics.frechet(self.x, self.held_out)}

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 10) -> None:
        pictures.compare({k: v.cpu().float() for k, v in panels.items()}, path, columns=columns)


class Toy:
    """Energy distance, exact divergences and mode masses against an oracle of `distill.denoise`.

    In one dimension with a deterministic student also `map_error`: root mean square of G(z) - flow map(z), over the
    data's standard deviation.
    """

    headline = "energy"

    def __init__(self, oracle: Any, samples: int = 4000, seed: int = 12345):
        self.oracle = oracle
        self.x, _ = oracle.sample(samples, generator=torch.Generator().manual_seed(seed))

    def score(self, x: Tensor, cond: dict[str, Tensor], quick: bool = False) -> dict[str, float]:
        x = x.cpu().float()
        out = {"energy": metrics.energy_distance(x, self.x)}
        if not quick:
            out["nll_gap"] = metrics.nll_gap(x, self.oracle)
            if hasattr(self.oracle, "means"):
                out["mode_kl"] = metrics.mode_kl(x, self.oracle)
        return out

    def map_error(self, z: Tensor, x: Tensor) -> float:
        """RMS of x - exact flow map(z, 1 -> 0), over the data's standard deviation."""
        n = len(z)
        exact = self.oracle.flow_map(z.double(), torch.ones(n).double(), torch.zeros(n).double())
        return float((x.double() - exact).square().mean().sqrt() / self.x.std())

    def floor(self) -> dict[str, float]:
        other, _ = self.oracle.sample(len(self.x), generator=torch.Generator().manual_seed(54321))
        return {"energy": metrics.energy_distance(other, self.x)}

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 0) -> None:
        panels = {k: v.cpu().float() for k, v in panels.items()}
        if self.x.shape[1] == 2:
            pictures.scatter(panels, path, reference=self.oracle)
        else:
            pictures.histogram(panels, path, reference=self.x)
