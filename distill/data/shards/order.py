"""Order of samples as pure functions of integers, so that any step is computed without the steps before it."""

from __future__ import annotations

import functools
import math

import numpy as np

from distill.errors import BadInput

_HOLD_OUT = 1  # key of the random draw of the test split; the stored order is drawn without it


def rng(*key: int) -> np.random.Generator:
    """Independent random numbers for every tuple of non-negative integers."""
    return np.random.default_rng(key)


@functools.lru_cache(maxsize=4)
def permutation(count: int, *key: int) -> np.ndarray:
    """A random order of 0..count-1; read-only."""
    order = rng(*key).permutation(count)
    order.flags.writeable = False
    return order


def positions(first: int, n: int, count: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Samples `first` to `first + n` of an infinite sequence of passes over 0..count-1, each shuffled; int64 (n,)."""
    passes, position = np.divmod(np.arange(first, first + n), count)
    if shuffle:
        for number in np.unique(passes):
            inside = passes == number
            position[inside] = permutation(count, seed, int(number))[position[inside]]
    return position


def batch(step: int, rank: int, world: int, size: int, count: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Samples of one rank's batch; at each step the ranks take consecutive pieces of one sequence. int64 (size,)."""
    return positions((step * world + rank) * size, size, count, seed, shuffle)


def lane(step: int, lanes: int) -> tuple[int, int]:
    """(lane, batch of that lane) at a rank's step; lanes alternate."""
    return step % lanes, step // lanes


def hold_out(count: int, share: float, seed: int, label: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Split samples 0..count-1 into "train" and "test", the same for the same seed.

    The test split has floor(share * count) samples, and of each class its share rounded up or down.

    Args:
        count: number of samples.
        share: of the test split, in [0, 1).
        seed: of the draw.
        label: classes, int64 (count,); None for one class.

    Returns:
        split -> sorted samples, int64; splits without samples are left out.

    Raises:
        BadInput: `share` is out of range.
    """
    if not 0 <= share < 1:
        raise BadInput(f"test={share} must be a share from 0 to below 1.")
    classes, label = np.unique(np.zeros(count, np.int64) if label is None else label, return_inverse=True)
    wanted = share * np.bincount(label, minlength=len(classes))
    held = np.floor(wanted + 1e-9).astype(np.int64)
    missing = math.floor(share * count + 1e-9) - int(held.sum())
    held[np.argsort(held - wanted, kind="stable")[: max(missing, 0)]] += 1
    test = np.zeros(count, bool)
    for number, name in enumerate(classes):
        rows = np.flatnonzero(label == number)
        test[rows[permutation(len(rows), seed, int(name), _HOLD_OUT)[: held[number]]]] = True
    splits = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
    return {name: rows for name, rows in splits.items() if len(rows)}
