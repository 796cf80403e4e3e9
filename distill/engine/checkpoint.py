"""Checkpoints that are whole or absent: staged, flushed to disk, renamed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from distill.errors import BadInput

STATE, MANIFEST = "state.pt", "manifest.json"


def save(folder: str | Path, state: dict[str, Any], keep: int = 2, **manifest: Any) -> Path:
    """Write `state` to `folder/step-00000000`; the `keep` newest remain.

    A checkpoint is first written beside its place, flushed, then renamed, so a killed process leaves none that is half
    written. The manifest names the step and whatever else is given (config fingerprint, versions).
    """
    folder = Path(folder)
    final = folder / f"step-{state['step']:08d}"
    staging = folder / f".writing-{state['step']:08d}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with open(staging / STATE, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        text = json.dumps({"step": state["step"], "bytes": (staging / STATE).stat().st_size, **manifest}, indent=2)
        (staging / MANIFEST).write_text(text)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise BadInput(f"Checkpoint {final} could not be written ({error.strerror}); free some space there.") from None
    if final.exists():
        shutil.rmtree(final)
    os.replace(staging, final)
    for old in complete(folder)[:-keep] if keep else []:
        shutil.rmtree(old)
    return final


def complete(folder: str | Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first: those whose manifest agrees with their size."""
    found = []
    for path in sorted(Path(folder).glob("step-*")):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            if (path / STATE).stat().st_size == manifest["bytes"]:
                found.append(path)
        except (OSError, ValueError, KeyError):
            continue
    return found


def latest(folder: str | Path) -> Path:
    """The newest whole checkpoint.

    Raises:
        BadInput: there is none.
    """
    found = complete(folder)
    if not found:
        raise BadInput(f"{folder} holds no whole checkpoint; train first, or name another run.")
    return found[-1]


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint's state on the CPU, read with `weights_only=True`."""
    try:
        return torch.load(Path(path) / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BadInput(f"Checkpoint {path} cannot be read ({type(error).__name__}); name an older one.") from None
