"""Samples of fixed noises, drawn by all ranks together and the same however many there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from distill.metrics.shares import ALONE, SampleShares
from distill.solvers import RowNoise

PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16}  # `engine.precision` of the config


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context under which networks compute in `engine.precision`, as training steps do."""
    return torch.autocast(device.type, PRECISIONS.get(precision), enabled=precision in PRECISIONS)


class SharedDraw:
    """Draws samples: each rank those of its share of the noises, in batches, under the run's precision.

    Every rank makes equally many calls of equal size, as networks that are cut to shards need: a share that is short of a
    row repeats one, whose sample is dropped.

    Args:
        z, cond: noises (n, ...) and conditions of n rows, of all ranks.
        batch: most rows of a call.
        ranks: who shares them.
        precision: `engine.precision`.
    """

    def __init__(
        self, z: Tensor, cond: dict[str, Any], batch: int = 1000, ranks: SampleShares = ALONE, precision: str = "32"
    ):
        self.ranks, self.batch, self.precision = ranks, batch, precision
        rows = torch.arange(len(z))[ranks.share(len(z))]
        self.count, most = len(rows), -(-len(z) // ranks.world)
        self.rows = torch.cat([rows, torch.zeros(most - len(rows), dtype=torch.long)])
        self.z, self.cond = z[self.rows], {k: v[self.rows] for k, v in cond.items()}
        self.own_cond = {k: v[: self.count] for k, v in self.cond.items()}  # of the samples that a draw returns

    @torch.no_grad()
    def __call__(self, sampler: Callable[[Tensor, dict[str, Any], RowNoise], Tensor], model: nn.Module) -> Tensor:
        """This rank's samples (n / world, ...) on the CPU of `sampler(z, cond, noise)`, on the device of `model`."""
        device, samples = next(model.parameters()).device, []
        with autocast(device, self.precision):
            for i in range(0, len(self.z), self.batch):
                part = slice(i, i + self.batch)
                cond = {k: v[part].to(device) for k, v in self.cond.items()}
                samples.append(sampler(self.z[part].to(device), cond, RowNoise(self.rows[part].tolist())).cpu())
        return torch.cat(samples)[: self.count]


def without_noise(sampler: Callable[[Tensor, dict[str, Any]], Tensor]) -> Callable[..., Tensor]:
    """A deterministic `sampler(z, cond)` as `SharedDraw` calls one."""
    return lambda z, cond, noise: sampler(z, cond)
