"""Arrays of an .npz file: samples, labels, channel order and value range."""

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
    """Split -> (x, label int64 or None); the one split "" if there is no x_train.

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
    """(N, C, ...) or (N, D).

    Args:
        x: one sample a row.
        channels: "first", "last", "none", or None to infer it from the shape.
        path: named in messages.

    Raises:
        BadInput: another value of `channels`, or an order that cannot be inferred.
    """
    if channels is None:
        candidates = [k for k, axis in (("first", 1), ("last", -1)) if x.ndim == 4 and x.shape[axis] in _CHANNELS]
        channels = {2: "first", 3: "none"}.get(x.ndim) or (candidates[0] if len(candidates) == 1 else None)
    if channels == "first":
        return x
    if channels == "last":
        return np.moveaxis(x, -1, 1)
    if channels == "none":
        return x[:, None]
    raise BadInput(f"x of {path} is {x.shape}, its channel order is unclear: pass --channels first, last or none.")


def value_range(xs: list[np.ndarray], stated: tuple | list | None, path: Path) -> tuple[float, float]:
    """Stored values (low, high) that map to (-1, 1).

    Raises:
        BadInput: `stated` is None or invalid, and the values are neither uint8 nor in [-1, 1] with both signs.
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
        f"{path} has {xs[0].dtype} values from {low:g} to {high:g}: pass the range that maps to [-1, 1], for example "
        "`--range 0 1`, or `--range -1 1` to keep the values."
    )


def stored_dtype(x: np.ndarray) -> np.ndarray:
    """`x` in its stored dtype: integers in the smallest of uint8, int16, int32; floats in at most 32 bits."""
    if x.dtype.kind == "f":
        return x.astype(np.float16 if x.dtype.itemsize == 2 else np.float32, copy=False)
    fits = (t for t in (np.uint8, np.int16, np.int32) if np.iinfo(t).min <= x.min() and x.max() <= np.iinfo(t).max)
    return x.astype(next(fits, np.float32), copy=False)
