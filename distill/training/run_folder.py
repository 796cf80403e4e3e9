"""Run folders: creation, resume, and cleanup after a failed start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist

from distill import __version__, config
from distill.config.schema import Optim
from distill.errors import BadInput
from distill.files import write_text
from distill.training import checkpoints
from distill.training.callbacks import console

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
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def open_run_folder(folder: Path, resume: bool) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The state to resume from and its manifest; None and an empty manifest to start at step 0.

    Raises:
        BadInput: without `resume`, the folder exists; with it, there is no run, its newest checkpoint is damaged, or its
            checkpoints are missing.
    """
    if not is_rank_zero():  # rank 0 may have written the config already, but no checkpoint: that takes all ranks
        return _newest(folder) if resume else (None, {})
    exists = (folder / CONFIG).exists()
    if exists and not resume:
        raise BadInput(f"{folder} already holds a run; add --resume to continue it, or give another name=...")
    if not exists and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"{folder} exists and is not a run of distill; give another name=... so nothing is overwritten.")
    if resume and not exists:
        raise BadInput(f"{folder} holds no run to resume; leave out --resume to start one.")
    if not resume:
        return None, {}
    checkpoints.recover(folder / CHECKPOINTS)
    return _newest(folder)


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
    if last and last > found[-1].name:
        console.print(f"Checkpoint {last} is missing; continuing from {found[-1].name}.", highlight=False)
    return state, checkpoints.manifest(found[-1])


def record_latest(path: Path) -> None:
    """Record the newest checkpoint's name in the run folder, to detect that checkpoints were deleted."""
    write_text(path.parents[1] / NEWEST, path.name)


def recorded_latest(folder: Path) -> str:
    """The name of the newest checkpoint that the run wrote; empty if it wrote none."""
    return (folder / NEWEST).read_text().strip() if (folder / NEWEST).exists() else ""


def manifest_facts(cfg: Any, data: Any, folder: Path) -> dict[str, Any]:
    """Entries of a checkpoint's manifest besides its files."""
    streamed = {} if data.cached else {"workers": data.workers, "window": data.window}
    identity = folder / "wandb_id"
    return {
        "config": config.fingerprint(cfg),
        "distill": __version__,
        "torch": torch.__version__,
        "world": world(),
        "strategy": cfg.engine.strategy,
        "precision": cfg.engine.precision,
        "order": streamed | {"batch_size": data.batch_size},
        "wandb": identity.read_text() if identity.exists() else None,
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
    return checkpoints.load(checkpoints.latest(folder / CHECKPOINTS), mapped=True)


def read_config(folder: Path) -> Any:
    """A run's config.

    Raises:
        BadInput: the folder is no run.
    """
    if not (folder / CONFIG).exists():
        raise BadInput(f"{folder} is not a run folder: it has no {CONFIG}; name a folder that `distill train` made.")
    return config.checked(config.read(folder / CONFIG))


@contextmanager
def prepare_run_folder(folder: Path, cfg: Any, method: Any) -> Iterator[list[Any]]:
    """Create `folder` with the run's config; yields a list for its loggers and closes them. Only rank 0 writes.

    A new run that fails before its first step removes its files, so that the same command can be repeated.
    """
    new, loggers = not (folder / CONFIG).exists(), []
    if not is_rank_zero():
        yield loggers
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        config.save(cfg, folder / CONFIG)
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
        getattr(loggers.pop(), "close", lambda: None)()


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
