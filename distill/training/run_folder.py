"""Run folders: creation, resume, and cleanup after a failed start."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist

from distill import __version__, config
from distill.config import launcher
from distill.config.schema import Optim
from distill.errors import BadInput, near_path
from distill.files import write_text
from distill.training import checkpoints
from distill.training.callbacks import console
from distill.training.lock import LOCK, RunLock
from distill.training.records import history

STOPPED, IDENTITY = "stopped.txt", "run_id"
CONFIG, METRICS, CHECKPOINTS, NEWEST = "config.yaml", "metrics.json", "checkpoints", "newest_checkpoint"
INEXACT = {
    "world": "the order of the data, the random draws and the samples of a step",
    "strategy": "the order of sums, and so the last digits,",
    "precision": "the last digits",
    "order": "the samples of a step",
    "torch": "the last digits, perhaps the random draws,",
}


def is_rank_zero() -> bool:
    """Whether this process is rank 0, which writes the run's files; from the environment before torch.distributed starts."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return launcher.launcher_rank()[0] == 0


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def open_run_folder(folder: Path, resume: bool, lock: RunLock) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The state to resume from and its manifest; None and an empty manifest to start at step 0.

    A folder that is resumed is locked first, by rank 0.

    Raises:
        BadInput: another process trains there; a taken folder without `resume`; with it, no run there, or one whose newest
            checkpoint is damaged or whose checkpoints are gone.
    """
    if not is_rank_zero():  # rank 0 may have written the config already, but no checkpoint: that takes all ranks
        return _newest(folder) if resume else (None, {})
    exists = (folder / CONFIG).exists()
    if exists and not resume:
        raise BadInput(f"{folder} already holds a run; add --resume to continue it, or give another name=...")
    if not exists and folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= {LOCK}):
        raise BadInput(f"{folder} exists and is not a run of distill; give another name=... so nothing is overwritten.")
    if resume and not exists:
        raise BadInput(f"{folder} holds no run to resume; leave out --resume to start one.")
    if not resume:
        return None, {}
    _locked(lock)
    checkpoints.recover(folder / CHECKPOINTS)
    return _newest(folder)


def _locked(lock: RunLock) -> None:
    if not lock.acquire():
        console.print(
            f"{lock.path.parent} is on a file system without locks: see to it that no other process trains there.",
            highlight=False,
        )


def _newest(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    last, found = recorded_latest(folder), sorted((folder / CHECKPOINTS).glob("step-*"))
    if not found and last:
        raise BadInput(
            f"{folder} had checkpoint {last} and has none now; restore it to {folder / CHECKPOINTS}, or start a new run "
            "under another name=..."
        )
    if not found:
        console.print(f"{folder} was stopped before its first checkpoint; starting at step 0.", highlight=False)
        return None, {}
    if found[-1] not in checkpoints.complete(folder / CHECKPOINTS):
        raise BadInput(f"Checkpoint {found[-1]} is not complete; {checkpoints.mend(found[-1])}.")
    state = checkpoints.load(found[-1])
    check_own(found[-1], folder)
    if last and last > found[-1].name:
        console.print(f"Checkpoint {last} is missing; continuing from {found[-1].name}.", highlight=False)
    return state, checkpoints.manifest(found[-1])


def record_latest(path: Path) -> None:
    """Record the newest checkpoint's name in the run folder, to detect that checkpoints were deleted."""
    write_text(path.parents[1] / NEWEST, path.name)


def recorded_latest(folder: Path) -> str:
    """The name of the newest checkpoint that the run wrote; empty if it wrote none.

    Raises:
        BadInput: the record is damaged.
    """
    if not (folder / NEWEST).exists():
        return ""
    name = (folder / NEWEST).read_text(errors="replace").strip()
    if not re.fullmatch(r"step-\d{8,}", name):
        raise BadInput(
            f"{folder / NEWEST} is damaged: it holds {name[:40]!r}, not the name of a checkpoint; remove it."
        )
    return name


def identity(folder: Path) -> str:
    """The random name of a run, kept in its folder and in every checkpoint; empty in a folder of an older release."""
    return (folder / IDENTITY).read_text(errors="replace").strip() if (folder / IDENTITY).exists() else ""


def check_own(path: Path, folder: Path) -> None:
    """Refuse a checkpoint that another run wrote.

    Raises:
        BadInput: its manifest names another run than the folder does.
    """
    written, own = checkpoints.manifest(path).get("run"), identity(folder)
    if written and own and written != own:
        raise BadInput(
            f"Checkpoint {path} is of another run ({written}, and {folder} is {own}); bring back the run's own, or use it in "
            "the folder that it comes from."
        )


def is_validated(folder: Path, step: int) -> bool:
    """Whether a run whose steps are done has the validation of its last one: it is saved before it is validated."""
    return (folder / STOPPED).exists() or any(row["step"] == step for row in history(folder))


def manifest_facts(cfg: Any, data: Any, folder: Path) -> dict[str, Any]:
    """Entries of a checkpoint's manifest besides its files."""
    streamed = {} if data.cached else {"workers": data.workers, "window": data.window}
    dashboard = folder / "wandb_id"
    return {
        "config": config.fingerprint(cfg),
        "run": identity(folder),
        "distill": __version__,
        "torch": torch.__version__,
        "world": world(),
        "strategy": cfg.engine.strategy,
        "precision": cfg.engine.precision,
        "order": streamed | {"batch_size": data.batch_size},
        "wandb": dashboard.read_text() if dashboard.exists() else None,
    }


class ResumeNotice(lightning.Callback):
    """Prints at the start of a resumed run in what it will differ from an uninterrupted one."""

    def __init__(self, manifest_facts: Callable[[], Mapping[str, Any]], before: Mapping[str, Any]):
        self.facts, self.before = manifest_facts, before

    def on_train_start(self, trainer, method):
        for sentence in resume_notices(self.facts(), self.before) if is_rank_zero() else ():
            console.print(sentence, highlight=False)


def resume_notices(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Differences of a resumed run from an uninterrupted one, as sentences; both arguments are from `manifest_facts`.

    Weights, moments, averages and counters never differ.
    """
    notices = []
    for name, what in INEXACT.items():
        old, new = before.get(name), now.get(name)
        if old is not None and old != new:
            notices.append(f"{name} was {old} and is {new}: {what} differ from those of an uninterrupted run.")
    return notices


def latest_state(folder: Path) -> dict[str, Any]:
    """The state of a run's newest checkpoint, memory-mapped: tensors are read when they are used."""
    newest = checkpoints.latest(folder / CHECKPOINTS)
    check_own(newest, folder)
    return checkpoints.load(newest, mapped=True)


def read_config(folder: Path) -> Any:
    """A run's config.

    Raises:
        BadInput: the folder is not a run, or its config is damaged.
    """
    if not (folder / CONFIG).exists():
        raise BadInput(
            f"{folder} is not a run folder: it has no {CONFIG}; name a folder that `distill train` made."
            f"{near_path(folder)}"
        )
    cfg = config.checked(config.read(folder / CONFIG))
    for key in ("roles", "method", "data"):
        if not cfg[key] or key != "roles" and config.TARGET not in cfg[key]:
            raise BadInput(f"{folder / CONFIG} is damaged: it does not describe '{key}'; restore it from a backup.")
    return cfg


@contextmanager
def prepare_run_folder(folder: Path, cfg: Any, method: Any, lock: RunLock) -> Iterator[list[Any]]:
    """`folder`, locked, with the run's config; yields a list for its loggers and closes them. Only rank 0 writes.

    A new run that fails before its first step removes its files, so that the same command can be repeated.
    """
    new, loggers = not (folder / CONFIG).exists(), []
    if not is_rank_zero():
        yield loggers
        return
    folder.mkdir(parents=True, exist_ok=True)
    _locked(lock)
    if new and (folder / CONFIG).exists():
        raise BadInput(f"{folder} was begun by another process meanwhile; give another name=...")
    try:
        config.save(cfg, folder / CONFIG)
        if not identity(folder):
            write_text(folder / IDENTITY, secrets.token_hex(8))
        yield loggers
    except BaseException:
        if new and method.step == 0:
            _close(loggers)
            shutil.rmtree(folder)
        raise
    finally:
        _close(loggers)


def _close(loggers: list[Any]) -> None:
    while loggers:
        logger = loggers.pop()
        try:
            getattr(logger, "close", lambda: None)()
        except Exception as error:  # each dashboard has its own; the run has its checkpoints
            console.print(
                f"{type(logger).__name__} could not be closed: {' '.join(str(error).split())}", highlight=False
            )


def check_same_recipe(new: Mapping, old: Mapping) -> None:
    """Refuse to resume under another recipe: roles, method, data, seed and optimizers must agree; the rest may change.

    An optimizer's settings may: they are in force from the first resumed step on.

    Raises:
        BadInput: they do not; names the first key that differs.
    """
    for key in ("seed", "roles", "method", "data"):
        if found := _difference(new[key], old[key], key):
            raise BadInput(f"--resume: {found} in the run's own config; resume without changing it.")
    for role in {*new["optim"], *old["optim"]}:
        names = [str((cfg["optim"].get(role) or {}).get("name") or Optim.name) for cfg in (new, old)]
        if names[0] != names[1]:
            raise BadInput(
                f"--resume: optim.{role}.name is {names[0]} but was {names[1]}, whose moments the checkpoint holds; resume "
                "without changing it, or start a new run from its student."
            )


def _difference(new: Any, old: Any, key: str) -> str:
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        names = [*new, *(k for k in old if k not in new)]
        return next(filter(None, (_difference(new.get(k), old.get(k), f"{key}.{k}") for k in names)), "")
    return "" if new == old else f"{key} is {new} but was {old}"
