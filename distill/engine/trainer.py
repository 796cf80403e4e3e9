"""The lightning Trainer as this project uses it: the loop and the device; steps, logs and checkpoints are ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import lightning


class Batches:
    """An iterable over batches that starts anew at each `iter`."""

    def __init__(self, source: Callable[[], Iterator[dict[str, Any]]], count: int):
        self.source, self.count = source, count

    def __iter__(self):
        return islice(self.source(), self.count)

    def __len__(self):
        return self.count


def fit(
    method: lightning.LightningModule,
    source: Callable[[int], Iterator[dict[str, Any]]],
    steps: int,
    callbacks: Iterable[lightning.Callback] = (),
    *,
    accelerator: str = "auto",
    precision: str = "32",
    resume: dict[str, Any] | None = None,
) -> None:
    """Train until `method.step == steps`. `source(start)` yields batches from step `start` on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    method.total_steps = steps
    start = resume["step"] if resume else method.step
    callbacks = [*callbacks, *([_Restore(resume)] if resume else [])]
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision if "-" in precision or precision == "32" else f"{precision}-mixed",
        max_epochs=1,
        max_steps=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(method, train_dataloaders=Batches(lambda: source(start), max(steps - start, 0)))


class _Restore(lightning.Callback):
    """Put a checkpoint's state back once the optimisers exist, before any other callback looks."""

    def __init__(self, state: dict[str, Any]):
        self.state = state

    def on_fit_start(self, trainer, method):
        method.restore(self.state)
