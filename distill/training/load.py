"""Builds the objects of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill import config
from distill.errors import BadInput
from distill.models.copies import free_except, share_weights
from distill.training import (
    run_folder,
)
from distill.training.experiment import Experiment, build_experiment
from distill.training.run_folder import CHECKPOINTS, CONFIG


def restore_experiment(experiment: Experiment, state: dict[str, Any], folder: Path) -> None:
    """Load the networks of a checkpoint's state into an experiment's method.

    Raises:
        BadInput: they do not fit.
    """
    try:
        experiment.method.restore(state, weights_only=True)
    except (KeyError, RuntimeError, AttributeError) as error:
        text = str(error).splitlines()[0].strip()
        raise BadInput(
            f"{folder / CHECKPOINTS}: the weights do not fit the networks of {folder / CONFIG} ({text}); "
            "use the version of distill that wrote them."
        ) from error


def load_experiment(folder: Path, allow: tuple[str, ...] = (), alone: bool = False) -> Experiment:
    """A run's objects with the weights of its newest checkpoint, memory-mapped: for reading, not for training.

    `alone`: only the averaged student keeps its weights, with the base that it is an adapter on; at no time are there
    more weights in memory than one network's.
    """
    folder = Path(folder)
    cfg = run_folder.read_config(folder)
    config.confirm(cfg, allow, folder)
    state = run_folder.latest_state(folder)
    with share_weights():
        experiment = build_experiment(cfg, allow)
    if alone:
        state["networks"] = {"ema": state["networks"]["ema"]}
    restore_experiment(experiment, state, folder)
    experiment.method.eval()
    if alone:
        free_except(experiment.method, experiment.method.ema)
    return experiment
