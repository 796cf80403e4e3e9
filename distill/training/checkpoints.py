"""Atomic checkpoints, written in the background: staged, flushed to disk, renamed."""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.errors import BadInput
from distill.files import write_json

STATE, MANIFEST, SCORES = "state.pt", "manifest.json", "scores.json"
STAGING, BEFORE = ".writing-", "-before"


def save(folder: str | Path, state: dict[str, Any], keep: int = 2, keep_best: int = 0, **manifest: Any) -> Path:
    """Write `state` to `folder/step-00000000`; keep the `keep` newest checkpoints (0: all) and the `keep_best` by score.

    A checkpoint is written to a temporary folder, flushed, renamed, and its parent flushed, so that a killed process or a
    power cut leaves no incomplete one. The manifest marks a complete checkpoint: step, size and CRC-32 of every file, and
    the entries of `manifest` (config fingerprint, versions, world size).

    Raises:
        BadInput: it cannot be written, or a weight is NaN or infinite; earlier checkpoints remain.
    """
    folder = Path(folder)
    _finite(state)
    name = f"{state['step']:08d}"
    final, staging, before = folder / f"step-{name}", folder / f"{STAGING}{name}", folder / f"{STAGING}{name}{BEFORE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        for left in folder.glob(f"{STAGING}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        staging.mkdir(exist_ok=True)
        with open(staging / STATE, "wb") as file:
            torch.save(state, file)
            _flush(file)
        facts = {"step": state["step"], "files": {STATE: _facts(staging / STATE)}}
        with open(staging / MANIFEST, "w") as file:
            file.write(json.dumps(facts | manifest, indent=2))
            _flush(file)
        _flush_folder(staging)
        if final.exists():
            os.replace(final, before)
        os.replace(staging, final)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save wraps the operating system's error
        shutil.rmtree(staging, ignore_errors=True)
        raise BadInput(_write_error(final, error, size(state))) from error
    shutil.rmtree(before, ignore_errors=True)
    prune(folder, keep, keep_best)
    return final


def _write_error(final: Path, error: Exception, needed: int) -> str:
    why = getattr(error, "strerror", None) or str(error).splitlines()[0]
    try:
        free = f"{shutil.disk_usage(final.parent).free:,} are free"
    except OSError:
        free = "free space is unknown"
    return (
        f"Checkpoint {final} could not be written ({why}): it needs {needed:,} bytes, {free}; free some space there and "
        "resume with --resume; the previous checkpoint is intact."
    )


def size(state: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size, values))


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush a folder, without which new names in it may be lost in a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _finite(state: dict[str, Any]) -> None:
    for name, weights in state.get("networks", {}).items():
        for key, value in weights.items():
            if not torch.isfinite(value).all():
                raise BadInput(
                    f"{name}.{key} holds NaN or infinity at step {state['step']}, so no checkpoint is written; "
                    f"lower its lr or clip under optim, and continue from the one before with --resume."
                )


def _facts(path: Path) -> dict[str, int]:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return {"bytes": path.stat().st_size, "crc32": value}


# -- retention -------------------------------------------------------------------------------------------------------


def prune(folder: str | Path, keep: int, keep_best: int = 0) -> None:
    """Remove all but the `keep` newest checkpoints and the `keep_best` with the lowest score; `keep=0` removes none."""
    if not keep:
        return
    found, values = complete(folder), scores(folder)
    ranked = sorted((p for p in found if p.name in values), key=lambda p: values[p.name])
    for old in set(found[:-keep]) - set(ranked[:keep_best]):
        try:
            _drop(old)
        except OSError as error:
            warnings.warn(
                f"Checkpoint {old} could not be removed ({error.strerror or error}); the run continues, remove it by hand.",
                stacklevel=2,
            )


def drop_after(path: Path) -> None:
    """Remove the checkpoints of later steps than this one's."""
    for later in (p for p in path.parent.glob("step-*") if p.name > path.name):
        _drop(later)


def _drop(path: Path) -> None:
    if path.is_symlink():
        path.unlink()  # to a checkpoint that was moved elsewhere
        return
    aside = path.with_name(f"{STAGING}{path.name}")  # a kill within the removal leaves no half of a checkpoint
    os.replace(path, aside)
    shutil.rmtree(aside)


def scores(folder: str | Path) -> dict[str, float]:
    """Checkpoint's name -> its validation score, lower is better; empty if the file is damaged."""
    try:
        return {str(name): float(value) for name, value in json.loads((Path(folder) / SCORES).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def score(folder: str | Path, step: int, value: float) -> None:
    """Record the validation score of a step, lower is better; NaN counts as infinity."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    value = value if value == value else float("inf")
    write_json(folder / SCORES, scores(folder) | {f"step-{step:08d}": value})


def rank(scores: dict[str, float], best: str) -> float:
    """The score to keep the best by, lower is better; `best` is "min NAME" or "max NAME" of one of `scores`.

    NaN, the score of samples that are not finite, is the worst there is.
    """
    direction, _, name = best.rpartition(" ")
    if direction not in ("", "min", "max") or name not in scores:
        raise BadInput(f"train.best: '{best}' must be min or max and one of {', '.join(scores)}.")
    value = -scores[name] if direction == "max" else scores[name]
    return value if value == value else float("inf")


# -- reading ---------------------------------------------------------------------------------------------------------


def recover(folder: Path) -> None:
    """Restores a checkpoint that was renamed by a save which was then killed."""
    for before in folder.glob(f"{STAGING}*{BEFORE}"):
        final = folder / f"step-{before.name.removeprefix(STAGING).removesuffix(BEFORE)}"
        if not final.exists():
            os.replace(before, final)


def manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest; empty if it is damaged."""
    try:
        found = json.loads((path / MANIFEST).read_text())
        well_formed = all({"bytes", "crc32"} <= facts.keys() for facts in found["files"].values())
        if not (well_formed and isinstance(found["step"], int)):
            return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return found


def complete(folder: str | Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first: those whose files have the sizes in their manifest."""
    return [p for p in sorted(Path(folder).glob("step-*")) if _whole(p)]


def _whole(path: Path) -> bool:
    files = manifest(path).get("files")
    try:
        return bool(files) and all((path / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except OSError:
        return False


def latest(folder: str | Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        BadInput: there is none.
    """
    found = complete(folder)
    if not found:
        raise BadInput(f"{folder} has no complete checkpoint; train first, or name another run.")
    return found[-1]


def load(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """A checkpoint's state on the CPU, read with `weights_only=True`; `mapped` memory-maps the tensors.

    Raises:
        BadInput: it is damaged; the message names the newest older checkpoint that is intact.
    """
    path = Path(path)
    try:
        if not intact(path):
            raise ValueError("its bytes have changed since it was written")
        state = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=mapped)
        steps = {path.name, *(f"step-{found['step']:08d}" for found in (manifest(path), state))}
        if len(steps) > 1:
            raise ValueError(f"its folder, manifest and state are of different steps: {', '.join(sorted(steps))}")
        return state
    except Exception as error:
        raise BadInput(f"Checkpoint {path} cannot be read ({str(error).splitlines()[0]}); {mend(path)}.") from error


def mend(path: Path) -> str:
    """The remedy for a damaged checkpoint, as text."""
    older = [p for p in complete(path.parent) if p.name < path.name and intact(p)]
    return f"remove it to continue from {older[-1].name}" if older else "there is no older one, so start a new run"


def intact(path: Path) -> bool:
    """Whether the files have the recorded CRC-32; `torch.load` does not verify checksums."""
    files = manifest(path).get("files", {})
    return bool(files) and all(_facts(path / name) == facts for name, facts in files.items())


# -- background writes -----------------------------------------------------------------------------------------------


class Writer:
    """Writes checkpoints in a background thread, one at a time; `submit` blocks only for the copy to host memory.

    Args:
        folder, keep, keep_best: see `save`.
        written: called in the thread with the folder of each complete checkpoint.

    Raises:
        BadInput: the error of a background write, once, from `check`, `wait` or the next `submit`.
    """

    def __init__(
        self, folder: Path, keep: int = 2, keep_best: int = 0, written: Callable[[Path], None] = lambda path: None
    ):
        self.folder, self.keep, self.keep_best, self.written = folder, keep, keep_best, written
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def submit(self, state: dict[str, Any], fresh: bool = False, **manifest: Any) -> None:
        """Wait for the previous write, copy `state` (unless it is a `fresh` copy already), and start to write it."""
        self.wait()
        copied = state if fresh else to_cpu(state)
        self.thread = threading.Thread(target=self._write, args=(copied, manifest), name="checkpoint")
        self.thread.start()

    def _write(self, state: dict[str, Any], manifest: dict[str, Any]) -> None:
        try:
            self.written(save(self.folder, state, self.keep, self.keep_best, **manifest))
        except BaseException as error:  # raised in the training thread
            self.error = error

    def score(self, step: int, value: float) -> None:
        """Record a step's validation score, by which the best checkpoints are kept."""
        score(self.folder, step, value)
        if not self.thread:  # else the next write prunes
            prune(self.folder, self.keep, self.keep_best)

    def check(self) -> None:
        """Raise the error of a finished write."""
        if self.error:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        """Wait for the current write; raise its error."""
        if self.thread:
            self.thread.join()
            self.thread = None
        self.check()

    def finish(self) -> None:
        """Wait for the current write and ignore its error, since another exception is being raised."""
        if self.thread:
            self.thread.join()
        self.thread = self.error = None


def to_cpu(state: Any) -> Any:
    """A deep copy on the CPU of nested dictionaries, lists and tensors."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {k: to_cpu(v) for k, v in state.items()}
    return type(state)(map(to_cpu, state)) if isinstance(state, (list, tuple)) else state
