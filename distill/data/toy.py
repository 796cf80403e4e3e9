"""Data sources without files: exact distributions, labels alone, random tensors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, repeat

import numpy as np
import torch
from torch import Tensor

from distill.data.base import Batch, Dataset, Distribution, ExactLaw, without
from distill.data.info import Info, Member
from distill.errors import BadInput

_FIXED = 2**32 - 1  # a rank that no run has; seeds the draws of `all`


class Drawn(Dataset):
    """A dataset whose batch n on a rank is drawn from a generator seeded by (seed, rank, n).

    Subclasses set `info` and implement `draw`.

    Args:
        batch_size: samples of a batch (one rank, one micro-batch).
        seed: of the draws.

    Raises:
        BadInput: `batch_size` or `seed` is out of range.
    """

    def __init__(self, batch_size: int, seed: int):
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise BadInput(f"{name}={value} must be at least {least}.")
        self.batch_size, self.seed = batch_size, seed

    def draw(self, n: int, random: torch.Generator) -> Batch:
        """A batch of n samples."""
        raise NotImplementedError

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
        """Endless batches from batch `start` on."""
        return (self.draw(self.batch_size, generator(self.seed, rank, n)) for n in count(start))

    def all(self, limit: int | None = None, conditions: bool = True) -> Batch:
        """`limit` (by default `default_limit`) samples, the same at every call, that no loader draws."""
        batch = self.draw(self.default_limit if limit is None else limit, generator(self.seed, _FIXED, 0))
        return batch if conditions else without(batch, self.info.members)


class Conditions(Drawn):
    """Labels without samples, for data-free methods; -1 (no class) if there are no classes.

    Args:
        shape: of the samples that the method will generate, kept in `info`.
        classes: labels are uniform over 0..classes-1.
        batch_size: labels of a batch (one rank, one micro-batch).
        seed: of the draws.
    """

    samples = False

    def __init__(self, shape: list[int] | tuple[int, ...], classes: int, batch_size: int, seed: int = 0):
        super().__init__(batch_size, seed)
        self.info = Info(tuple(shape), classes, source="conditions alone")

    def draw(self, n: int, random: torch.Generator) -> Batch:
        """n labels."""
        if not self.info.classes:
            return {"label": torch.full((n,), -1)}
        return {"label": torch.randint(self.info.classes, (n,), generator=random)}


class Samples(Drawn):
    """Samples of a distribution that can be sampled exactly.

    Args:
        source: has `sample(n, generator=None) -> (x (n, ...), label (n,) or None)`, such as
            `distill.denoise.GaussianMixture`.
        batch_size: samples of a batch (one rank, one micro-batch).
        seed: of the draws.
        classes: number of labels; None counts the components of a mixture, 0 leaves out labels.

    Raises:
        BadInput: `source` cannot be sampled, or `batch_size` or `seed` is out of range.
    """

    def __init__(self, source: Distribution, batch_size: int, seed: int = 0, classes: int | None = None):
        if not isinstance(source, Distribution):
            raise BadInput(f"{type(source).__name__} cannot be sampled: give a source with sample(n, generator).")
        super().__init__(batch_size, seed)
        self.source = source
        self.oracle = source if isinstance(source, ExactLaw) else None
        x, label = source.sample(1, generator=generator(seed, _FIXED, 1))
        if classes is None:
            classes = len(getattr(source, "means", ())) if label is not None else 0
        self.info = Info(tuple(x.shape[1:]), classes, source=f"draws from {type(source).__name__}")

    @torch.no_grad()
    def draw(self, n: int, random: torch.Generator) -> Batch:
        """n samples with their labels."""
        x, label = self.source.sample(n, generator=random)
        batch: Batch = {"x": x.float()}
        if self.info.classes:
            batch["label"] = label.long()
        return batch


class Tensors(Drawn):
    """Normal random tensors in place of a text-conditioned dataset, to try a recipe before its data exists.

    A condition whose name ends with "mask" is one for a random number of first tokens, then zero.

    Args:
        shape: of the samples, kept in `info`.
        conditions: condition -> its shape for one sample, such as {"text": [77, 768]}.
        batch_size: samples of a batch (one rank, one micro-batch).
        samples: whether batches have samples `x`; False gives conditions alone.
        seed: of the draws.
    """

    default_limit = 100

    def __init__(
        self, shape: list[int], conditions: dict[str, list[int]], batch_size: int, samples: bool = True, seed: int = 0
    ):
        super().__init__(batch_size, seed)
        members = {}
        for name, size in conditions.items():
            members[name] = Member(tuple(size), "int64" if name.endswith("mask") else "float32")
        self.info = Info(tuple(shape), source="random tensors", members=members, samples=samples)
        self.samples = samples

    def draw(self, n: int, random: torch.Generator) -> Batch:
        """n samples with their conditions."""
        batch: Batch = {"x": torch.randn(n, *self.info.shape, generator=random)} if self.samples else {}
        for name, member in self.info.members.items():
            if name.endswith("mask"):
                tokens = member.shape[-1]
                length = torch.randint(1, tokens + 1, (n, 1), generator=random)
                batch[name] = (torch.arange(tokens) < length).long()
            else:
                batch[name] = torch.randn(n, *member.shape, generator=random)
        return batch


def generator(*key: int) -> torch.Generator:
    """A CPU generator for every tuple of non-negative integers, independent of the others."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


class ShapeData(Dataset):
    """Random batches of given shapes, in place of data that does not exist yet.

    Args:
        shape, classes: of the samples; classes 0 gives no labels.
        batch_size: samples per batch.
    """

    def __init__(self, shape: list[int], classes: int = 0, batch_size: int = 1):
        self.info, self.batch_size = Info(tuple(shape), classes, source="shapes alone"), batch_size

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[dict[str, Tensor]]:
        label = {"label": torch.zeros(self.batch_size, dtype=torch.long)} if self.info.classes else {}
        return repeat({"x": torch.randn(self.batch_size, *self.info.shape)} | label)
