"""Handles SIGINT, SIGTERM and SIGUSR1: finish the current step on all ranks, save a checkpoint, exit with 85 or 130."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import lightning
import torch
import torch.distributed as dist

from distill.training.callbacks import console

REQUEUE = 85  # ERESTART: the run was asked to go away and wants to be started again
NOTHING, INTERRUPT, PREEMPT = 0, 1, 2  # by rank: what another process was told outweighs what this one was not


class Signals(lightning.Callback):
    """Ends the run cleanly on a signal.

    Ctrl-C (SIGINT) ends it after the step in hand, a second one at once. SIGTERM and SIGUSR1, by which schedulers
    announce that the machine is wanted, end it after the step in hand too, and leave `preempted` set; further ones change
    nothing. A handler only records the signal, because saving within it could interrupt a step. All ranks agree on the
    step by the largest of their records, over a gloo group, so that no accelerator is synchronised.

    Used as a context manager it listens from the start, before there is a trainer.
    """

    def __init__(self):
        self.note = self.agreed = NOTHING  # this process's, all ranks'
        self.old, self.group = {}, None

    @property
    def preempted(self) -> bool:
        return PREEMPT in (self.note, self.agreed)

    def __enter__(self) -> Signals:
        self._take(self._preempt, "SIGTERM", "SIGUSR1")
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
        self.old = {}

    def _take(self, receive: Callable, *names: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # python hands signals to the main thread only
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):  # Windows lacks some
            found = signal.signal(number, receive)
            self.old.setdefault(number, found)

    def _interrupt(self, number, frame):
        if self.note:
            raise KeyboardInterrupt
        self.note = INTERRUPT
        console.print("Interrupted: ending after this step, with a checkpoint.", highlight=False)

    def _preempt(self, number, frame):
        if self.note == PREEMPT:
            return
        self.note = PREEMPT
        name = signal.Signals(number).name
        console.print(f"{name}: ending after this step, with a checkpoint, to be started again.", highlight=False)

    def on_train_start(self, trainer, method):
        self._take(self._interrupt, "SIGINT")
        self._take(self._preempt, "SIGTERM", "SIGUSR1")  # again: lightning has put its own handlers there
        if dist.is_available() and dist.is_initialized() and dist.get_backend() != "gloo" and not self.group:
            self.group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        self.agreed = self._largest()
        if self.agreed:
            trainer.should_stop = True

    def _largest(self) -> int:
        """The largest note of all ranks."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.note
        notes = torch.tensor(self.note)
        dist.all_reduce(notes, dist.ReduceOp.MAX, group=self.group)
        return int(notes)
