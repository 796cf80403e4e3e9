"""Arrays of an .npz: which is x, which the label, where the channels stand, what the values mean."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from distill.errors import BadInput

_X, _Y = ("x", "images", "data", "arr_0"), ("y", "label", "labels")
_CHANNELS = (1, 3, 4)


def read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of the file; nothing is unpickled.

    Raises:
        BadInput: missing, not an .npz, or with arrays of objects.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single .npy array")
        with file:
            return {k: file[k] for k in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path} cannot be read as .npz ({error}): save plain arrays by numpy.savez.") from None


def splits(arrays: dict[str, np.ndarray], path: Path) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Split -> (x, label int64 or None); the one split "" unless there is an x_train.

    Raises:
        BadInput: no x, or labels that do not fit it.
    """
    endings = [s for s in ("train", "test") if f"x_{s}" in arrays]
    if endings:
        return {s: _pair(arrays, f"x_{s}", [f"y_{s}"], path) for s in endings}
    name = next((k for k in _X if k in arrays), None)
    if name is None:
        raise BadInput(f"{path} holds {', '.join(arrays) or 'nothing'}, but no array x: save the samples as x=.")
    return {"": _pair(arrays, name, _Y, path)}


def _pair(arrays: dict, name: str, label_names: list | tuple, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    x = arrays[name]
    if x.ndim < 2 or not len(x) or x.dtype.kind not in "biuf":
        raise BadInput(f"{name} of {path} is {x.dtype} {x.shape}: give numbers with one sample a row.")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise BadInput(f"{name} of {path} holds NaN or infinite values: remove those samples.")
    key = next((k for k in label_names if k in arrays), None)
    if key is None:
        return x, None
    y = arrays[key]
    if y.shape not in ((len(x),), (len(x), 1)) or y.dtype.kind not in "iu" or y.min() < 0:
        raise BadInput(f"{key} of {path} is {y.dtype} {y.shape}: give one whole number from 0 up for each of {len(x)}.")
    return x, y.reshape(-1).astype(np.int64)


def channels_first(x: np.ndarray, channels: str | None, path: Path) -> np.ndarray:
    """(N, C, ...) or (N, D); `channels` is "first", "last", "none", or None to find out.

    Raises:
        BadInput: another word, or an order that the shape does not tell.
    """
    moves = {"first": lambda: x, "last": lambda: np.moveaxis(x, -1, 1), "none": lambda: x[:, None]}
    if channels is None:
        fits = [k for k, axis in (("first", 1), ("last", -1)) if x.ndim == 4 and x.shape[axis] in _CHANNELS]
        channels = {2: "first", 3: "none"}.get(x.ndim) or (fits[0] if len(fits) == 1 else None)
    if channels not in moves:
        raise BadInput(f"x of {path} is {x.shape}, its channels are unclear: state channels=first, last or none.")
    return moves[channels]()


def value_range(xs: list[np.ndarray], stated: tuple | list | None, path: Path) -> tuple[float, float]:
    """Values that stand for -1 and 1.

    Raises:
        BadInput: not stated, and not uint8 or values within [-1, 1] on both sides of 0.
    """
    if stated is not None:
        if len(stated) != 2 or not stated[0] < stated[1]:
            raise BadInput(f"range={tuple(stated)} must be two numbers, the lower first.")
        return float(stated[0]), float(stated[1])
    if all(x.dtype == np.uint8 for x in xs):
        return 0.0, 255.0
    low, high = min(x.min() for x in xs), max(x.max() for x in xs)
    if all(x.dtype.kind == "f" for x in xs) and -1 <= low < 0 < high <= 1:
        return -1.0, 1.0
    raise BadInput(
        f"x of {path} holds {xs[0].dtype} values from {low:g} to {high:g}: state which stand for -1 and 1, such as "
        "range=(0, 1), or (-1, 1) to keep them as they are."
    )


def stored(x: np.ndarray) -> np.ndarray:
    """The smallest of uint8, int16, int32 that holds the whole numbers; floats in at most 32 bits, as batches are."""
    if x.dtype.kind == "f":
        return x.astype(np.float16 if x.dtype.itemsize == 2 else np.float32, copy=False)
    fits = (t for t in (np.uint8, np.int16, np.int32) if np.iinfo(t).min <= x.min() and x.max() <= np.iinfo(t).max)
    return x.astype(next(fits, np.float32), copy=False)
