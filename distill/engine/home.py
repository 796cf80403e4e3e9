"""A run's folder: who may write there, and what is left of it when a run fails."""

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
from distill.engine import checkpoint
from distill.engine.callbacks import console
from distill.errors import BadInput

CONFIG, METRICS, CHECKPOINTS, NEWEST = "config.yaml", "metrics.json", "checkpoints", "newest_checkpoint"
INEXACT = {
    "world": "the order of the data, the random draws and the samples of a step",
    "strategy": "the order of sums, and so the last digits,",
    "precision": "the last digits",
    "order": "the samples of a step",
    "torch": "the last digits, perhaps the random draws,",
}


def leads() -> bool:
    """Whether this process writes the run's files: the first rank, by torch.distributed or else its launcher's word."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def enter(folder: Path, resume: bool) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The state to go on from and its manifest; None and nothing to start at step 0.

    Raises:
        BadInput: a taken folder without `resume`; with it, no run there, or one whose newest checkpoint is damaged or
            whose checkpoints are gone.
    """
    if not leads():  # the first rank may have written its config meanwhile, but no checkpoint: that takes all ranks
        return _newest(folder) if resume else (None, {})
    exists = (folder / CONFIG).exists()
    if exists and not resume:
        raise BadInput(f"{folder} already holds a run; add --resume to go on with it, or give another name=...")
    if not exists and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"{folder} exists and is not a run of distill; give another name=... so nothing is overwritten.")
    if resume and not exists:
        raise BadInput(f"{folder} holds no run to resume; leave out --resume to start one.")
    if not resume:
        return None, {}
    checkpoint.recover(folder / CHECKPOINTS)
    return _newest(folder)


def _newest(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    last, found = marked(folder), sorted((folder / CHECKPOINTS).glob("step-*"))
    if not found and last:
        raise BadInput(
            f"{folder} had checkpoint {last} and has none now; bring it back into {folder / CHECKPOINTS}, or start anew "
            "under another name=..."
        )
    if not found:
        console.print(f"{folder} was stopped before its first checkpoint; starting at step 0.", highlight=False)
        return None, {}
    if found[-1] not in checkpoint.complete(folder / CHECKPOINTS):
        raise BadInput(f"Checkpoint {found[-1]} is not whole; {checkpoint.mend(found[-1])}.")
    state = checkpoint.load(found[-1])
    if last and last > found[-1].name:
        console.print(f"Checkpoint {last} is gone; going on from {found[-1].name}.", highlight=False)
    return state, checkpoint.manifest(found[-1])


def mark(path: Path) -> None:
    """Note the newest checkpoint in its run's folder, so that its absence is never taken for a run without any."""
    staging = path.parents[1] / f"{NEWEST}.writing"
    staging.write_text(path.name)
    os.replace(staging, path.parents[1] / NEWEST)


def marked(folder: Path) -> str:
    """The newest checkpoint that the run has had; empty where it has had none."""
    return (folder / NEWEST).read_text().strip() if (folder / NEWEST).exists() else ""


def facts(cfg: Any, data: Any, folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says besides its files."""
    streamed = {"workers": data.workers, "window": data.window} if getattr(data, "cached", True) is False else {}
    identity = folder / "wandb_id"
    return {
        "config": config.fingerprint(cfg), "distill": __version__, "torch": torch.__version__,
        "world": world(), "strategy": cfg.engine.strategy, "precision": cfg.engine.precision,
        "order": streamed | {"batch_size": getattr(data, "batch_size", None)},
        "wandb": identity.read_text() if identity.exists() else None,
    }  # fmt: skip


class Exactness(lightning.Callback):
    """Say once, at the start of a resumed run, what is no longer that of an uninterrupted one."""

    def __init__(self, facts: Callable[[], Mapping[str, Any]], before: Mapping[str, Any]):
        self.facts, self.before = facts, before

    def on_train_start(self, trainer, method):
        for sentence in inexact(self.facts(), self.before) if leads() else ():
            console.print(sentence, highlight=False)


def inexact(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What a resumed run does not share with an uninterrupted one, in sentences; both are manifests' facts.

    Weights, moments, averages and counters are the same under every change.
    """
    said = []
    for name, what in INEXACT.items():
        old, new = before.get(name), now.get(name)
        if old is not None and old != new:
            said.append(f"{name} was {old} and is {new}: {what} differ from those of an uninterrupted run.")
    return said


def newest(folder: Path) -> dict[str, Any]:
    """The state of a run's newest checkpoint; what is not looked at is not read."""
    return checkpoint.load(checkpoint.latest(folder / CHECKPOINTS), mapped=True)


def config_of(folder: Path) -> Any:
    """A run's config.

    Raises:
        BadInput: the folder is no run.
    """
    if not (folder / CONFIG).exists():
        raise BadInput(f"{folder} is no run: it has no {CONFIG}; name a folder that `distill train` made.")
    return config.checked(config.read(folder / CONFIG))


@contextmanager
def written(folder: Path, cfg: Any, method: Any) -> Iterator[list[Any]]:
    """`folder` with the run's config; yields a list for its sinks and closes them. Only the first rank writes.

    A new run that fails before its first step leaves no trace, so that the same command can be given again.
    """
    new, sinks = not (folder / CONFIG).exists(), []
    if not leads():
        yield sinks
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        config.save(cfg, folder / CONFIG)
        yield sinks
    except BaseException:
        if new and method.step == 0:
            _close(sinks)
            shutil.rmtree(folder)
        raise
    finally:
        _close(sinks)


def _close(sinks: list[Any]) -> None:
    while sinks:
        getattr(sinks.pop(), "close", lambda: None)()


def same_recipe(new: Mapping, old: Mapping) -> None:
    """Refuse to go on under another recipe: roles, method, data and seed must agree; the rest may change.

    Raises:
        BadInput: they do not; names the first key that differs.
    """
    for key in ("seed", "roles", "method", "data"):
        if found := _difference(new[key], old[key], key):
            raise BadInput(f"--resume: {found} in the run's own config; resume without changing it.")


def _difference(new: Any, old: Any, key: str) -> str:
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        names = [*new, *(k for k in old if k not in new)]
        return next(filter(None, (_difference(new.get(k), old.get(k), f"{key}.{k}") for k in names)), "")
    return "" if new == old else f"{key} is {new} but was {old}"
