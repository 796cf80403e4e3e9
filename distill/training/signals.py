"""Handles SIGINT, SIGTERM and SIGUSR1: finish the current step on all ranks, save a checkpoint, exit with 85 or 130."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import lightning
import torch
import torch.distributed as dist

from distill.training.callbacks import console

REQUEUE = 85  # ERESTART, the exit code of a preempted run: start it again with --resume
NOTHING, INTERRUPT, PREEMPT = 0, 1, 2  # ordered: the largest of all processes decides


class Signals(lightning.Callback):
    """Ends the run cleanly on a signal.

    SIGINT (Ctrl-C) ends the run after the current step; a second SIGINT ends it at once. SIGTERM and SIGUSR1, which
    schedulers send before they take a machine back, end it after the current step and set `preempted`; repeated ones are
    ignored. A handler only records the signal, because saving inside it could interrupt a step. After each step the
    ranks take the maximum of their records over a gloo group, so that no accelerator is synchronised.

    As a context manager it handles signals before a Trainer exists.
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
            return  # Python delivers signals to the main thread only
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
        self._take(self._preempt, "SIGTERM", "SIGUSR1")  # again, since Lightning has replaced the handlers
        if dist.is_available() and dist.is_initialized() and dist.get_backend() != "gloo" and not self.group:
            self.group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        self.agreed = self._largest()
        if self.agreed:
            trainer.should_stop = True

    def _largest(self) -> int:
        """The largest signal recorded by any rank."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.note
        notes = torch.tensor(self.note)
        dist.all_reduce(notes, dist.ReduceOp.MAX, group=self.group)
        return int(notes)
