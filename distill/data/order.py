"""Which sample comes when: pure functions of integers, so that any step can be reached without the ones before it."""

from __future__ import annotations

import functools

import numpy as np


def rng(*key: int) -> np.random.Generator:
    """Independent random numbers for every tuple of non-negative integers."""
    return np.random.default_rng(key)


@functools.lru_cache(maxsize=4)
def permutation(count: int, *key: int) -> np.ndarray:
    """A random order of 0..count-1; read-only."""
    order = rng(*key).permutation(count)
    order.flags.writeable = False
    return order


def take(first: int, n: int, count: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Places `first` to `first + n` of an endless walk over 0..count-1 that shuffles anew at every pass; int64 (n,)."""
    passes, place = np.divmod(np.arange(first, first + n), count)
    if shuffle:
        for turn in np.unique(passes):
            here = passes == turn
            place[here] = permutation(count, seed, int(turn))[place[here]]
    return place


def batch(step: int, rank: int, world: int, size: int, count: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Samples of one rank's batch: at each step the ranks take consecutive pieces of the same walk; int64 (size,)."""
    return take((step * world + rank) * size, size, count, seed, shuffle)


def lane(step: int, lanes: int) -> tuple[int, int]:
    """(lane, batch of that lane) of a rank's step when its lanes take turns."""
    return step % lanes, step // lanes
