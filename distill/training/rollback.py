"""Goes back to the last good checkpoint when losses or weights are not finite; a second time, the run stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch

from distill.errors import BadInput
from distill.methods.placement import tensors
from distill.training import checkpoints
from distill.training.callbacks import CheckpointCallback, console
from distill.training.run_folder import is_rank_zero, record_latest


class Rollback(lightning.Callback):
    """Checks `method.nonfinite`, and before a checkpoint or a validation all weights and averages.

    At the limit, or where a weight is not finite, all steps since the last clean checkpoint are undone.

    Weights, moments, averages and counters are restored; the position in the data and the random generators are not, so
    that the repeated steps see other batches. On an accelerator the counters are read every `method.nonfinite.limit`
    steps only, since reading them synchronises.

    Args:
        folder: of the checkpoints.
        saves: what writes them.
        undone: called with the step that the run went back to, on the rank that writes.
        due: whether a step will be validated.

    Raises:
        BadInput: there is no checkpoint to restore, or one was restored before.
    """

    def __init__(
        self,
        folder: Path,
        saves: CheckpointCallback,
        undone: Callable[[int], None] = lambda step: None,
        due: Callable[[int], bool] = lambda step: False,
    ):
        self.folder, self.saves, self.undone, self.due = folder, saves, undone, due

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        if self.saves.due(method.step) or self.due(method.step) or method.step == method.total_steps:
            broken = next(filter(None, method.placement.gather(broken_network(method))), None)
            if broken:
                role = broken if broken in method.trainable else "student"
                self.undo(trainer, method, role, f"The weights of '{broken}' are not finite at step {method.step}")
                return
        if method.device.type != "cpu" and method.step % method.nonfinite.limit:
            return
        role = method.nonfinite.over()
        if role is None:
            return
        cause = (
            f"The {role}'s loss or gradient was not finite in {method.nonfinite.limit} turns in a row, the last at step "
            f"{method.step - 1}"
        )
        self.undo(trainer, method, role, cause)

    def undo(self, trainer, method, role: str, cause: str) -> None:
        """Go back to the last good checkpoint because of a role; `cause` is the beginning of the reason."""
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


def broken_network(method: Any) -> str | None:
    """A trained network or average of which this rank holds a value that is not finite."""
    for name in (*method.trainable, *method._averages):
        if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors(method.placement.module(name))):
            return name
    return None
