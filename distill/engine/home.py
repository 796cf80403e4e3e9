"""A run's folder: who may write there, and what is left of it when a run fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill import config
from distill.engine import checkpoint
from distill.engine.callbacks import console
from distill.errors import BadInput

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.json", "checkpoints"


def enter(folder: Path, resume: bool) -> dict[str, Any] | None:
    """The state to go on from, None to start at step 0.

    Raises:
        BadInput: a taken folder without `resume`; with it, no run there, or one whose checkpoints are all damaged.
    """
    exists = (folder / CONFIG).exists()
    if exists and not resume:
        raise BadInput(f"{folder} already holds a run; add --resume to go on with it, or give another name=...")
    if not exists and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"{folder} exists and is not a run of distill; give another name=... so nothing is overwritten.")
    if resume and not exists:
        raise BadInput(f"{folder} holds no run to resume; leave out --resume to start one.")
    if not resume:
        return None
    if not any((folder / CHECKPOINTS).glob("step-*")):
        console.print(f"{folder} was stopped before its first checkpoint; starting at step 0.", highlight=False)
        return None
    return newest(folder)


def newest(folder: Path) -> dict[str, Any]:
    """The state of a run's newest checkpoint."""
    return checkpoint.load(checkpoint.latest(folder / CHECKPOINTS))


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
    """`folder` with the run's config; yields a list for its sinks and closes them.

    A new run that fails before its first step leaves no trace, so that the same command can be given again.
    """
    new, sinks = not (folder / CONFIG).exists(), []
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
