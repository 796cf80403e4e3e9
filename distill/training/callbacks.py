"""Trainer callbacks: progress bar, metric logging, periodic actions and checkpoints."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())  # names as they are, lines whole
PRINT_EVERY = 10.0  # seconds between lines of progress without a terminal
WINDOW = 100  # steps over which the rate is measured


class TimedPrint:
    """Prints a line of progress if none was printed in the last `PRINT_EVERY` seconds.

    Args:
        prefix: before each line.
    """

    def __init__(self, prefix: str = ""):
        self.prefix, self.last = prefix, time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self.last >= PRINT_EVERY

    def __call__(self, text: str) -> None:
        if self.due:
            self.last = time.monotonic()
            console.print(self.prefix + text, highlight=False)


class ProgressBar(lightning.Callback):
    """rich progress bar with losses by role and steps per second; without a terminal, a line every `PRINT_EVERY` seconds.

    The rate is that of the last `WINDOW` steps of this process, loading of data included; validations, saves and what
    precedes the first step are not counted.
    """

    def __init__(self, total: int, every: int = 10):
        self.total, self.every, self.bar = total, every, None

    def on_train_start(self, trainer, method):
        self.ends: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)  # steps done, and the clock then
        if console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self.bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console)
            self.bar.start()
            name = type(method).__name__
            self.task = self.bar.add_task(name, total=self.total, completed=method.step, note="")

    def on_train_batch_start(self, trainer, method, batch, index):
        if not self.ends:  # the first step of this process, after the validation at the start
            self.line = TimedPrint()
        if not self.ends or method.step < self.ends[-1][0]:  # after a rollback
            self.ends.clear()
            self.ends.append((method.step, self.clock(trainer)))

    @staticmethod
    def clock(trainer) -> float:
        """Seconds, without those of validations and saves."""
        return time.monotonic() - sum(c.spent for c in trainer.callbacks if isinstance(c, PeriodicCallback))

    def rate(self) -> float:
        """Steps per second over the window."""
        (first, begin), (last, end) = self.ends[0], self.ends[-1]
        return (last - first) / max(end - begin, 1e-9)

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        self.ends.append((method.step, self.clock(trainer)))
        last = method.step == self.total
        if not last and not (self.line.due if self.bar is None else method.step % self.every == 0):
            return
        rate = self.rate()
        losses = {k.removesuffix("/loss"): float(v) for k, v in method.logs.items() if k.endswith("/loss")}
        note = "  ".join(f"{k} {v:.4g}" for k, v in losses.items()) + f"  {rate:.1f} steps/s"
        if self.bar:
            self.bar.update(self.task, completed=method.step, note=note)
        else:
            left = (self.total - method.step) / rate
            self.line.last = -PRINT_EVERY if last else self.line.last
            self.line(f"step {method.step}/{self.total}  {note}  {left:.0f} s left")

    def teardown(self, trainer, method, stage):
        if self.bar:
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer, method, exception):
        self.teardown(trainer, method, "fit")  # else the terminal stays without a cursor


class MetricLogger(lightning.Callback):
    """Writes `method.logs` to every logger on each `every`-th step.

    A logger that fails is a warning, once for each kind of event: the run continues.
    """

    def __init__(self, loggers: list, every: int = 10):
        self.loggers, self.every = loggers, every
        self.failed: set[tuple[str, str]] = set()

    def on_train_start(self, trainer, method):
        self.last, self.at = method.step, time.monotonic()

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        if method.step % self.every:
            return
        now = time.monotonic()
        row = {k: float(v) for k, v in method.logs.items()}
        row["steps_per_second"] = (method.step - self.last) / max(now - self.at, 1e-9)
        self.last, self.at = method.step, now
        self.write(row, method.step)

    def write(self, row: dict[str, Any], step: int) -> None:
        self.log_event("write", row, step)

    def back(self, step: int) -> None:
        """After a rollback to `step`: loggers that support it drop the rows of later steps."""
        self.last = min(self.last, step)
        self.log_event("back", step)

    def log_event(self, kind: str, *arguments: Any) -> None:
        """Call the method `kind` of every logger that has it."""
        for logger in self.loggers:
            try:
                getattr(logger, kind, lambda *arguments: None)(*arguments)
            except Exception as error:  # of a dashboard, its network or the disk: each its own class
                self._warn(type(logger).__name__, kind, error)

    def _warn(self, name: str, kind: str, error: Exception) -> None:
        if (name, kind) not in self.failed:
            self.failed.add((name, kind))
            text = " ".join(f"{type(error).__name__}: {error}".split())
            console.print(f"WARNING: {name} failed at '{kind}' ({text}); the run continues.", highlight=False)


class PeriodicCallback(lightning.Callback):
    """Calls `action(method)` every `every` steps and at the end, at most once per step.

    Args:
        every: one or several intervals in steps; 0 is never.
        action: the callback.
        start: call at step 0 too.
        finished: call at the end only if the run was not interrupted.
    """

    def __init__(
        self,
        every: int | tuple[int, ...],
        action: Callable[[Any], None],
        start: bool = False,
        finished: bool = False,
    ):
        self.every = (every,) if isinstance(every, int) else every
        self.action, self.start, self.finished, self.done = action, start, finished, None
        self.spent = 0.0  # seconds in the action

    def _call(self, method):
        if self.done != method.step:
            self.done, began = method.step, time.monotonic()
            self.action(method)
            self.spent += time.monotonic() - began

    def on_train_start(self, trainer, method):
        if self.start and method.step == 0:
            self._call(method)

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        if self.due(method.step):
            self._call(method)

    def due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in self.every)

    def on_train_end(self, trainer, method):
        if method.step >= method.total_steps or not self.finished:
            self._call(method)


class CheckpointCallback(PeriodicCallback):
    """Periodic checkpoints, written in the background; errors of a write are raised at the next step.

    After a non-finite turn the checkpoint is delayed until a step without one, so that not all kept checkpoints are from
    such a period.

    Args:
        writer: a `distill.training.checkpoints.Writer`, None on ranks that write nothing.
        facts: further entries of the manifest.
    """

    def __init__(self, every: int | tuple[int, ...], writer: Any, facts: Callable[[], dict[str, Any]]):
        super().__init__(every, self._save)
        self.writer, self.facts, self.owed = writer, facts, False

    def _save(self, method):
        state = method.snapshot()  # a collective: every rank calls it
        if self.writer:
            self.writer.submit(state, fresh=method.placement.fresh, clean=method.nonfinite.clean(), **self.facts())

    def on_train_batch_start(self, trainer, method, batch, index):
        if self.writer:
            self.writer.check()

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        self.owed = self.owed or self.due(method.step)
        if self.owed and method.nonfinite.clean():
            self.owed = False
            self._call(method)

    def on_train_end(self, trainer, method):
        self.finish(method)

    def finish(self, method):
        """Save the last step, unless that was done, and wait until it is on the disk."""
        if self.writer:
            self.writer.wait()
        super().on_train_end(None, method)
        if self.writer:
            self.writer.wait()

    def on_exception(self, trainer, method, exception):
        if self.writer:
            self.writer.finish()
