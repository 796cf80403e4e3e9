"""Rollback to the last good checkpoint when losses stay non-finite; the second time the run stops with an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning

from distill.errors import BadInput
from distill.training import checkpoints
from distill.training.callbacks import CheckpointCallback, console
from distill.training.run_folder import is_rank_zero, record_latest


class Rollback(lightning.Callback):
    """Restores the last clean checkpoint when `method.nonfinite` reaches its limit.

    Weights, moments, averages and counters are restored; the position in the data and the random generators are not, so
    that the repeated steps see other batches. On an accelerator the counters are read every `method.nonfinite.limit`
    steps only, since reading them synchronises.

    Args:
        folder: of the checkpoints.
        saves: the CheckpointCallback.
        undone: called with the restored step, on the rank that writes.

    Raises:
        BadInput: there is no checkpoint to restore, or one was restored before.
    """

    def __init__(self, folder: Path, saves: CheckpointCallback, undone: Callable[[int], None] = lambda step: None):
        self.folder, self.saves, self.undone = folder, saves, undone

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        if method.device.type != "cpu" and method.step % method.nonfinite.limit:
            return
        role = method.nonfinite.over()
        if role is None:
            return
        cause = (
            f"The {role}'s loss or gradient was not finite in {method.nonfinite.limit} turns in a row, the last at step "
            f"{method.step - 1}"
        )
        if self.saves.writer:
            self.saves.writer.wait()
        good = method.placement.gather(self.good())[0] if is_rank_zero() or method.placement.world > 1 else None
        if good is None or method.extra_batches:
            why = "again, after one rollback" if method.extra_batches else "and no checkpoint was written before"
            raise BadInput(
                f"{cause}, {why}; lower optim.{role}.lr or optim.{role}.clip, or look for bad samples in the data."
            )
        now = method.step
        self.back(method, self.folder / good)
        trainer.fit_loop.epoch_loop.max_steps += now - method.step  # global_step keeps counting passes
        if is_rank_zero():
            console.print(f"{cause}; continuing from step {method.step} with other data.", highlight=False)

    def good(self) -> str | None:
        """The newest intact checkpoint that was not written between skipped turns."""
        found = reversed(checkpoints.complete(self.folder))
        return next((p.name for p in found if checkpoints.manifest(p).get("clean") and checkpoints.intact(p)), None)

    def back(self, method, path: Path) -> None:
        now, random, skipped = method.step, method.snapshot()["random"], method.nonfinite.state()
        method.restore(checkpoints.load(path) | {"random": random})
        method.extra_batches += now - method.step
        method.nonfinite.restore({role: [in_all, 0] for role, (in_all, _) in skipped.items()})
        self.saves.done = method.step
        if is_rank_zero():
            checkpoints.drop_after(path)
            record_latest(path)
            self.undone(method.step)
