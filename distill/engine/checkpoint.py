"""Checkpoints that are whole or absent: staged, flushed to disk, renamed."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from distill.errors import BadInput

STATE, MANIFEST = "state.pt", "manifest.json"


def save(folder: str | Path, state: dict[str, Any], keep: int = 2, **manifest: Any) -> Path:
    """Write `state` to `folder/step-00000000`; the `keep` newest remain.

    A checkpoint is first written beside its place, flushed, then renamed, so a killed process leaves none that is half
    written. The manifest names the step, size and CRC-32 of the state, and whatever else is given (config fingerprint,
    versions).

    Raises:
        BadInput: it cannot be written, or a weight is NaN or infinite; the checkpoints that were there remain.
    """
    folder = Path(folder)
    _finite(state)
    final = folder / f"step-{state['step']:08d}"
    staging = folder / f".writing-{state['step']:08d}"
    try:
        for left in folder.glob(".writing-*"):  # by a process that was killed
            shutil.rmtree(left)
        staging.mkdir(parents=True)
        with open(staging / STATE, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        facts = {"step": state["step"], "bytes": (staging / STATE).stat().st_size, "crc32": _crc(staging / STATE)}
        with open(staging / MANIFEST, "w") as file:
            file.write(json.dumps(facts | manifest, indent=2))
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            os.replace(final, folder / f".writing-{state['step']:08d}-before")
        os.replace(staging, final)
    except (OSError, RuntimeError) as error:  # torch.save wraps what the disk says
        shutil.rmtree(staging, ignore_errors=True)
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise BadInput(f"Checkpoint {final} could not be written ({why}); free some space there.") from error
    shutil.rmtree(folder / f".writing-{state['step']:08d}-before", ignore_errors=True)
    for old in complete(folder)[:-keep] if keep else []:
        shutil.rmtree(old)
    return final


def _finite(state: dict[str, Any]) -> None:
    for name, weights in state.get("networks", {}).items():
        for key, value in weights.items():
            if not torch.isfinite(value).all():
                raise BadInput(
                    f"{name}.{key} holds NaN or infinity at step {state['step']}, so no checkpoint is written; "
                    f"lower its lr or clip under optim, and go on from the one before with --resume."
                )


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


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
    """A checkpoint's state on the CPU, read with `weights_only=True`.

    Raises:
        BadInput: it is not what was written; the message names the newest one before it that is.
    """
    path = Path(path)
    try:
        if not intact(path):
            raise ValueError("its bytes have changed since it was written")
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        older = [p for p in complete(path.parent) if p.name < path.name and intact(p)]
        mend = f"remove it to go on from {older[-1].name}" if older else "there is no older one, so start the run anew"
        raise BadInput(f"Checkpoint {path} cannot be read ({str(error).splitlines()[0]}); {mend}.") from error


def intact(path: Path) -> bool:
    """Whether the state's bytes are those that were written: torch itself does not look at its archive's check sums."""
    expected = json.loads((path / MANIFEST).read_text()).get("crc32")
    return expected is None or expected == _crc(path / STATE)
