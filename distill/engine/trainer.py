"""The lightning Trainer as this project uses it: the loop and the device; steps, logs and checkpoints are ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import Any

import lightning
import torch.distributed as dist

from distill.errors import BadInput


class Batches:
    """`count` batches of this process's share of `data`, from step `start` on, anew at each `iter`."""

    def __init__(self, data: Any, start: int, count: int):
        self.data, self.start, self.count = data, start, count

    def __iter__(self):
        alone = not (dist.is_available() and dist.is_initialized())
        rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        return islice(self.data.loader(rank, world, self.start), self.count)

    def __len__(self):
        return self.count


def fit(
    method: lightning.LightningModule,
    data: Any,
    steps: int,
    callbacks: Iterable[lightning.Callback] = (),
    *,
    accelerator: str = "auto",
    precision: str = "32",
    resume: dict[str, Any] | None = None,
) -> None:
    """Train until `method.step == steps`. `data.loader(rank, world, start)` yields its batches from step `start` on.

    Raises:
        BadInput: this machine lacks the accelerator, or that the precision.
        KeyboardInterrupt: the run was interrupted a second time, or before its first step.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    method.total_steps = steps
    start = resume["step"] if resume else method.step
    callbacks = [*callbacks, *([_Restore(resume)] if resume else [])]
    trainer = _trainer(accelerator, precision, callbacks)
    try:
        trainer.fit(method, train_dataloaders=Batches(data, start, max(steps - start, 0)))
    except SystemExit as error:  # lightning's answer to KeyboardInterrupt, with exit code 1
        raise KeyboardInterrupt from error


def _trainer(accelerator: str, precision: str, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    try:
        return lightning.Trainer(
            accelerator=accelerator,
            devices=1,
            precision={"16": "16-mixed", "bf16": "bf16-mixed"}.get(precision, precision),
            max_epochs=1,
            max_steps=-1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except Exception as error:  # ValueError, RuntimeError and lightning's own MisconfigurationException
        text = " ".join(str(error).split())
        raise BadInput(
            f"train.accelerator={accelerator} with train.precision={precision} does not work here: {text}"
        ) from error


class _Restore(lightning.Callback):
    """Put a checkpoint's state back once the optimisers exist, before any other callback looks."""

    def __init__(self, state: dict[str, Any]):
        self.state = state

    def on_fit_start(self, trainer, method):
        method.restore(self.state)
