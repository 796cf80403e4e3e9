"""Handles SIGINT, SIGTERM and SIGUSR1: finish the current step on all ranks, save a checkpoint, exit with 85 or 130."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable

import lightning
import torch
import torch.distributed as dist

from distill.training.callbacks import console
from distill.training.launch import GRACE_AFTER_FAILURE, GRACE_AFTER_SIGNAL, PARENT, WAITED

REQUEUE = 85  # ERESTART, the exit code of a preempted run: start it again with --resume
NOTHING, INTERRUPT, PREEMPT = 0, 1, 2  # ordered: the largest of all processes decides


class Signals(lightning.Callback):
    """Ends the run cleanly on a signal.

    SIGINT (Ctrl-C) ends the run after the current step; a second SIGINT ends it at once. SIGTERM and SIGUSR1, which
    schedulers send before they take a machine back, end it after the current step and set `preempted`; repeated ones are
    ignored. A handler only records the signal, because saving inside it could interrupt a step. After each step the
    ranks take the maximum of their records over a gloo group, so that no accelerator is synchronised.

    A step that waits for something that does not come, such as a stopped rank, a stopped data worker or a file system, has
    `GRACE_AFTER_SIGNAL` seconds to end, or twice as long as the longest one before it; then the process ends without a
    checkpoint. A thread sees to that, which the kernel wakes at once, since handlers of Python run between its
    instructions only.

    Used as a context manager it listens from the start, before there is a trainer.
    """

    def __init__(self):
        self.note = self.agreed = NOTHING  # this process's, all ranks'
        self.old, self.group = {}, None
        self.mark, self.longest, self.ended, self.closed = time.monotonic(), 0.0, False, threading.Event()

    @property
    def preempted(self) -> bool:
        return PREEMPT in (self.note, self.agreed)

    def __enter__(self) -> Signals:
        self._take(self._preempt, "SIGTERM", "SIGUSR1")
        if self.old:
            self.pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else os.pipe()
            os.set_blocking(self.pipe[1], False)
            self.woken = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            self.thread = threading.Thread(target=self._limit, name="signals", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.closed.set()
        if self.old:
            signal.set_wakeup_fd(self.woken, warn_on_full_buffer=True)
            self.thread.join()
            for end in self.pipe:
                os.close(end)
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

    # -- when the step does not end ------------------------------------------------------------------------------------

    def _limit(self) -> None:
        """In a thread: wait for a signal, then end the process if its step does not end."""
        found: list[int] = []
        while not self.closed.is_set():
            if select.select([self.pipe[0]], [], [], 0.1)[0]:
                found += [n for n in os.read(self.pipe[0], 64) if n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
                since = time.monotonic()
            if not found or self.agreed or self.ended:
                continue
            twice = found.count(signal.SIGINT) > 1  # ends the run at once
            limit = GRACE_AFTER_FAILURE if twice else max(GRACE_AFTER_SIGNAL, 2 * self.longest)
            if time.monotonic() - max(since, self.mark) > limit:
                self._give_up(signal.Signals(found[-1]).name, limit, 130 if found[-1] == signal.SIGINT else REQUEUE)

    def _give_up(self, name: str, seconds: float, code: int) -> None:
        console.print(
            f"{name}: the step has not ended in {seconds:.0f} s, as if it waited for a rank, a data worker or a file that "
            "does not answer; ending without a checkpoint, --resume continues from the last one.",
            highlight=False,
        )
        for child in multiprocessing.active_children():
            child.kill()  # a stopped one would stay
        os._exit(WAITED if PARENT in os.environ and code == REQUEUE else code)

    def _note_progress(self) -> None:
        now = time.monotonic()
        self.longest, self.mark = max(self.longest, now - self.mark), now

    # -- in the trainer --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer, method, batch, index):
        self._note_progress()

    def on_train_start(self, trainer, method):
        self._take(self._interrupt, "SIGINT")
        self._take(self._preempt, "SIGTERM", "SIGUSR1")  # again, since Lightning has replaced the handlers
        if dist.is_available() and dist.is_initialized() and dist.get_backend() != "gloo" and not self.group:
            self.group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        self.agreed = self._largest()
        self._note_progress()
        if self.agreed:
            trainer.should_stop = True

    def on_train_end(self, trainer, method):
        self.ended = True  # what is left is to save

    def _largest(self) -> int:
        """The largest signal recorded by any rank."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.note
        notes = torch.tensor(self.note)
        dist.all_reduce(notes, dist.ReduceOp.MAX, group=self.group)
        return int(notes)
