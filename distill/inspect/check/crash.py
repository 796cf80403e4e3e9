"""Exceptions that end a check: of the run's own code, which would end the training too, or of the check."""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
from pathlib import Path
from typing import Any

import torch

from distill.inspect.check.base import Finding

CHECKS, PACKAGE = Path(__file__).parent, Path(__file__).parents[2]
STDLIB, INSTALLED = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
LIBRARIES = (
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "numpy",
    "scipy",
    "sklearn",
    "PIL",
    "safetensors",
    "peft",
)


def crash(error: Exception, method: Any, step: bool) -> Finding:
    """The finding about a check that raised `error`.

    FAIL if the run's own code raised it, with the place in that code; else WARN.

    Args:
        error: as caught around the check.
        method: the run's method.
        step: whether the check computes a training step, so that any exception which is not of the check ends the run too.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    frames = [(Path(f.filename), f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
    users = [frame for frame in frames if _is_users(frame[0])]
    ours = [frame for frame in frames if PACKAGE in frame[0].parents]
    full = isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    )  # a dry run holds the gradients of all roles at once
    if not full and (users or step and ours and CHECKS not in ours[-1][0].parents):
        file, line = users[-1] if users else _definition(method, text) or ours[-1]
        return Finding.fail(f"{file}:{line}: {text}")
    return Finding.warn(f"the check failed to run ({text}); if your own code is not in it, please report it.")


def _is_users(file: Path) -> bool:
    if PACKAGE in file.parents or str(file).startswith("<"):
        return False
    if INSTALLED in file.parents:
        return file.relative_to(INSTALLED).parts[0].removesuffix(".py") not in LIBRARIES
    return STDLIB not in file.parents


def _definition(method: Any, text: str) -> tuple[Path, int] | None:
    """Where a class of the user defines the function whose call fails by its arguments: no frame of it is in a traceback."""
    named = re.search(r"(\w+)\.(\w+)\(\) (?:takes|missing|got)", text)
    function = vars(type(method)).get(named[2]) if named and named[1] == type(method).__name__ else None
    if not inspect.isfunction(function):
        return None
    return Path(function.__code__.co_filename), function.__code__.co_firstlineno
