"""A run whose losses are not finite any more goes back to its last good checkpoint, once; then it stops and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning

from distill.engine import checkpoint
from distill.engine.callbacks import Saves, console
from distill.engine.home import leads, mark
from distill.errors import BadInput


class Rollback(lightning.Callback):
    """Watch `method.skips`; at the limit undo all steps since the last checkpoint that was written without a skip.

    Weights, moments, averages and counters go back; the data and the random draws do not, so that the steps that are done
    anew are others. On an accelerator it looks every `method.skips.limit` steps, for looking waits for it.

    Args:
        folder: of the checkpoints.
        saves: what writes them.
        undone: called with the step that the run went back to, on the rank that writes.

    Raises:
        BadInput: there is none to go back to, or the run went back before.
    """

    def __init__(self, folder: Path, saves: Saves, undone: Callable[[int], None] = lambda step: None):
        self.folder, self.saves, self.undone = folder, saves, undone

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        if method.device.type != "cpu" and method.step % method.skips.limit:
            return
        role = method.skips.over()
        if role is None:
            return
        said = (
            f"The {role}'s loss or gradient was not finite in {method.skips.limit} turns in a row, the last at step "
            f"{method.step - 1}"
        )
        if self.saves.writer:
            self.saves.writer.wait()
        good = method.place.gather(self.good())[0] if leads() or method.place.world > 1 else None
        if good is None or method.ahead:
            why = "again, after the run had gone back once" if method.ahead else "and no checkpoint was written before"
            raise BadInput(
                f"{said}, {why}; lower optim.{role}.lr or optim.{role}.clip, or look for bad samples in the data."
            )
        self.back(method, self.folder / good)
        if leads():
            console.print(f"{said}; going on from step {method.step} with other data.", highlight=False)

    def good(self) -> str | None:
        """The newest checkpoint that is as it was written, and was not written between skips."""
        found = reversed(checkpoint.complete(self.folder))
        return next((p.name for p in found if checkpoint.manifest(p).get("clean") and checkpoint.intact(p)), None)

    def back(self, method, path: Path) -> None:
        now, random, skipped = method.step, method.snapshot()["random"], method.skips.state()
        method.restore(checkpoint.load(path) | {"random": random})
        method.ahead += now - method.step
        method.skips.restore({role: [in_all, 0] for role, (in_all, _) in skipped.items()})
        self.saves.done = method.step
        if leads():
            checkpoint.drop_after(path)
            mark(path)
            self.undone(method.step)
