"""Sources without files: draws from an exact distribution, and conditions alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.info import Info, Member
from distill.errors import BadInput

_HELD_OUT = 2**32 - 1  # a rank that no run has: the draws of `all`


class Conditions:
    """Labels without samples, for methods that need none; -1 (no class) when there are no classes.

    Args:
        shape: of the samples that the method will make, kept in `.info`.
        classes: labels are uniform over 0..classes-1.
        batch_size: labels a rank and step.
        seed: batch n of a rank is a function of (seed, rank, n).
    """

    samples = False

    def __init__(self, shape: list[int] | tuple[int, ...], classes: int, batch_size: int, seed: int = 0):
        self.info = Info(tuple(shape), classes, source="conditions alone")
        self.batch_size, self.seed = _checked(batch_size, seed), seed

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Endless batches from batch `start` on."""
        return (self._draw(self.batch_size, generator(self.seed, rank, n)) for n in count(start))

    def all(self, limit: int = 10_000) -> dict[str, Tensor]:
        """`limit` draws, always the same, that no loader gives."""
        return self._draw(limit, generator(self.seed, _HELD_OUT, 0))

    def _draw(self, n: int, random: torch.Generator) -> dict[str, Tensor]:
        if not self.info.classes:
            return {"label": torch.full((n,), -1)}
        return {"label": torch.randint(self.info.classes, (n,), generator=random)}


class Samples:
    """Draws from a distribution that can be sampled exactly.

    Args:
        source: has `sample(n, generator=None) -> (x (n, ...), label (n,) or None)`, such as
            `distill.denoise.GaussianMixture`.
        batch_size: samples a rank and step.
        seed: batch n of a rank is a function of (seed, rank, n).
        classes: number of labels; None counts the mixture's components, 0 leaves labels out.
    """

    def __init__(self, source: Any, batch_size: int, seed: int = 0, classes: int | None = None):
        if not hasattr(source, "sample"):
            raise BadInput(f"{type(source).__name__} cannot be sampled: give a source with sample(n, generator).")
        self.source, self.batch_size, self.seed = source, _checked(batch_size, seed), seed
        x, label = source.sample(1, generator=generator(seed, _HELD_OUT, 1))
        if classes is None:
            classes = len(getattr(source, "means", ())) if label is not None else 0
        self.info = Info(tuple(x.shape[1:]), classes, source=f"draws from {type(source).__name__}")

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Endless batches from batch `start` on."""
        return (self._draw(self.batch_size, generator(self.seed, rank, n)) for n in count(start))

    def all(self, limit: int = 10_000) -> dict[str, Tensor]:
        """`limit` draws, always the same, that no loader gives."""
        return self._draw(limit, generator(self.seed, _HELD_OUT, 0))

    @torch.no_grad()
    def _draw(self, n: int, random: torch.Generator) -> dict[str, Tensor]:
        x, label = self.source.sample(n, generator=random)
        return {"x": x.float()} | ({"label": label.long()} if self.info.classes else {})


class Tensors:
    """Random numbers of the names and shapes of a text-conditioned run's data, to try a recipe before its data is made.

    Normal numbers; of a condition whose name ends with "mask", ones for a random number of first tokens.

    Args:
        shape: of the samples, kept in `.info`.
        told: condition -> its shape for one sample, such as {"text": [77, 768]}.
        batch_size: rows a rank and step.
        samples: whether a batch holds samples `x` too; False gives conditions alone.
        seed: batch n of a rank is a function of (seed, rank, n).
    """

    def __init__(self, shape: list[int], told: dict[str, list[int]], batch_size: int, samples: bool = True, seed: int = 0):
        members = {k: Member(tuple(s), "int64" if k.endswith("mask") else "float32") for k, s in told.items()}
        self.info = Info(tuple(shape), source="random tensors", members=members, samples=samples)
        self.told, self.samples = dict(told), samples
        self.batch_size, self.seed = _checked(batch_size, seed), seed

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Endless batches from batch `start` on."""
        return (self._draw(self.batch_size, generator(self.seed, rank, n)) for n in count(start))

    def all(self, limit: int = 100, conditions: bool = True) -> dict[str, Tensor]:
        """`limit` draws, always the same, that no loader gives; without their conditions if asked."""
        batch = self._draw(limit, generator(self.seed, _HELD_OUT, 0))
        return batch if conditions else {k: v for k, v in batch.items() if k == "x"}

    def _draw(self, n: int, random: torch.Generator) -> dict[str, Tensor]:
        batch = {"x": torch.randn(n, *self.info.shape, generator=random)} if self.samples else {}
        for key, shape in self.told.items():
            if key.endswith("mask"):
                length = torch.randint(1, shape[-1] + 1, (n, 1), generator=random)
                batch[key] = (torch.arange(shape[-1]) < length).long()
            else:
                batch[key] = torch.randn(n, *shape, generator=random)
        return batch


def generator(*key: int) -> torch.Generator:
    """A CPU generator for every tuple of non-negative integers, independent of the others."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


def _checked(batch_size: int, seed: int) -> int:
    if batch_size < 1 or seed < 0:
        raise BadInput(f"batch_size={batch_size}, seed={seed}: the one must be at least 1, the other 0 or more.")
    return batch_size
