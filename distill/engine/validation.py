"""Validation: the student's numbers beside the teacher's lines, pictures, alarms, the best score, the stop on a plateau."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.engine import checkpoint, lines
from distill.engine.callbacks import Every, Record, console
from distill.engine.home import leads
from distill.engine.probes import probes
from distill.engine.sinks import history, replace
from distill.engine.watch import Alarm, Watchdog, half_of, rules_of
from distill.eval import table
from distill.eval.health import signs

STOPPED = "stopped.txt"


def batched(call: Callable[..., Tensor], z: Tensor, cond: dict[str, Tensor], method: Any, batch: int = 1000) -> Tensor:
    """`call` on slices, on the method's device, in eval mode and without gradient; the result on the CPU."""
    device, out = next(method.student.parameters()).device, []
    with torch.no_grad():
        for i in range(0, len(z), batch):
            some = {k: v[i : i + batch].to(device) for k, v in cond.items()}
            out.append(call(z[i : i + batch].to(device), some).cpu())
    return torch.cat(out)


def shown(x: Tensor, images: int = 100) -> Tensor:
    """The samples that a picture has room for."""
    return x[:images] if x.ndim == 4 else x


class Validation(Every):
    """On each beat of `train.validate_every`, at the start and at the end of a run that was not interrupted.

    The first rank measures and decides; the others lend their shards where there are any, and learn its alarms and whether
    to stop. What was measured before a restart is read from `metrics.csv`, so a resumed run decides as an uninterrupted one.

    Args:
        cfg: the run's config.
        folder: the run's.
        tests: what to measure, of `distill.eval.suite`.
        fixed: noises and conditions of every validation.
        record: where it is written.
        writer: the checkpoints' writer, told each score where the best are kept; None on ranks that write nothing.
        name: of the teacher's lines; see `lines.fingerprint`.
        rows: samples made in one call.
    """

    def __init__(
        self, cfg: Any, folder: Path, tests: Any, fixed: tuple[Tensor, dict[str, Tensor]], record: Record,
        writer: Any, name: str, rows: int = 1000,
    ):  # fmt: skip
        super().__init__(cfg.train.validate_every, self.validate, start=True, finished=True)
        self.cfg, self.folder, self.tests, self.record, self.writer = cfg, folder, tests, record, writer
        (self.z, self.cond), self.path, self.draw = fixed, lines.at(folder, name), partial(batched, batch=rows)
        self.lines: lines.Scores | None = None
        self.fresh: lines.Scores | None = None  # measured here, and kept once the run has made a step
        self.alarms: list[Alarm] = []
        self.stopped, self.past, self.dog = "", [], None

    def on_train_start(self, trainer, method):
        self.recall()
        super().on_train_start(trainer, method)

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        super().on_train_batch_end(trainer, method, outputs, batch, index)
        if self.fresh and leads():
            lines.keep(self.path, self.fresh)
        self.fresh = None
        if self.stopped:
            trainer.should_stop = True

    def on_train_end(self, trainer, method):
        super().on_train_end(trainer, method)
        if leads() and self.lines is not None and (self.stopped or method.step >= method.total_steps):
            self.summary(method)

    def recall(self) -> None:
        """What `metrics.csv` has of earlier validations: after a restart, and after steps were undone."""
        self.past = history(self.folder) if leads() else []

    def validate(self, method: Any) -> None:
        if hasattr(self.tests, "prepare") and (leads() or method.place.sharded):
            self.tests.prepare()  # a reference that the teacher makes, with all its shards
        if self.lines is None:
            self.lines = self.teacher(method)
            self.dog = Watchdog(half_of(method), method.warm_start, rules_of(method))
            for row in self.past:
                self.dog.look(row["step"], row, self.reference)
        row, alarms, self.dog.half = None, [], half_of(method)
        if leads() or method.place.sharded:
            generator = lambda z: torch.Generator(z.device).manual_seed(0)
            x = self.draw(lambda z, c: method.sample(z, c, generator=generator(z)), self.z, self.cond, method)
            asked = probes(method, self.z, x, self.cond, self.tests)
            if leads():
                row = self.tests.score(x, self.cond, quick=True) | signs(x, self.cond, self.tests.x) | asked
                alarms = self.dog.look(method.step, row, self.reference)
                self.write(method, x, row)
        alarms, self.stopped = method.place.gather((alarms, self.plateau(row)))[0]
        for alarm in alarms:
            self.alarm(alarm)
        if self.stopped and leads():
            replace(self.folder / STOPPED, lambda file: file.write(f"step {method.step}: {self.stopped}\n"))
            console.print(f"Stopping at step {method.step}: {self.stopped}", highlight=False)

    def alarm(self, alarm: Alarm) -> None:
        """On the console, in `alarms.jsonl` and on the dashboards."""
        self.alarms.append(alarm)
        if leads():
            console.print(f"ALARM at step {alarm.step}, {alarm.kind}: {alarm.said}", highlight=False)
            self.record.tell("alarm", alarm)

    # -- the teacher -------------------------------------------------------------------------------------------------

    def teacher(self, method: Any) -> lines.Scores:
        """Its lines: those that were kept, else measured now; the first rank says which."""
        found = method.place.gather(lines.read(self.path) if leads() else None)[0]
        if found is None and (leads() or method.place.sharded):
            most = max(self.cfg.eval.evaluations)
            found = lines.measured(method, self.tests, self.z, self.cond, most, self.draw, scores=leads())
            self.fresh = found
        return found or {}

    @property
    def reference(self) -> dict[str, float]:
        """What the student is held against: the teacher at the most steps, else the data."""
        return list(self.lines.values())[-1] if self.lines else {}

    # -- the student -------------------------------------------------------------------------------------------------

    def write(self, method: Any, x: Tensor, row: dict[str, float]) -> None:
        step, train = method.step, self.cfg.train
        self.past.append({"step": step} | row)
        teacher = {f"validation/{who}/{k}": v for who, values in self.lines.items() for k, v in values.items() if k in row}
        self.record.write({f"validation/{k}": v for k, v in row.items()} | teacher, step)
        self.chart([self.tests.headline])
        score = checkpoint.rank(row, self.best)
        if train.keep_best and self.writer:
            self.writer.score(step, score)
        path = self.folder / "samples" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        said = f"step {step}, {method.grid.steps} evaluations"
        self.tests.picture({said: shown(x)}, path)
        self.record.tell("picture", "samples", path, step, said)
        values = "  ".join(f"{k} {v:.4g}" for k, v in row.items())
        console.print(f"validation at step {step}: {values}", highlight=False)

    def chart(self, names: list[str]) -> None:
        """The student's curve of a number beside the teacher's lines."""
        for name in names:
            rows = [r for r in self.past if name in r]
            student = {"student": [r[name] for r in rows]}
            flat = {who: [v[name]] * len(rows) for who, v in self.lines.items() if name in v}
            if rows:
                self.record.tell("chart", name, [r["step"] for r in rows], student | flat)

    def summary(self, method: Any) -> None:
        """The run's last word: every chart, and a table of student at the end, at its best, and teacher."""
        last = self.past[-1] if self.past else {}
        names = [k for k in last if k != "step"]
        self.chart(names)
        rows = {f"student, step {last['step']}": last} if last else {}
        if self.past:
            best = min(self.past, key=lambda r: checkpoint.rank(r, self.best))
            rows = {f"best student, step {best['step']}": best} | rows
        rows |= self.lines
        table = [[who, *(values.get(k) for k in names)] for who, values in rows.items()]
        self.record.tell("table", "final", ["", *names], table)

    # -- when to stop ------------------------------------------------------------------------------------------------

    @property
    def best(self) -> str:
        return best(self.cfg, self.tests)

    def plateau(self, row: dict[str, float] | None) -> str:
        return plateau(self.past, self.best, self.cfg.train) if row else ""


def best(cfg: Any, tests: Any) -> str:
    """What the best is: "min fd", "max accuracy"."""
    return cfg.train.best or f"{'max' if table.higher(tests.headline) else 'min'} {tests.headline}"


def plateau(past: list[dict[str, float]], best: str, train: Any) -> str:
    """Why a run with these validations should stop; empty: it should not, or `train.patience` is 0.

    That is when the last `patience` of them have not improved on the best before by more than `min_delta`.
    """
    if not train.patience:
        return ""
    scores = [(row["step"], checkpoint.rank(row, best)) for row in past]
    top, since = None, 0
    for step, value in scores:
        if top is None or value < top[1] - train.min_delta:
            top, since = (step, value), 0
        else:
            since += 1
    if since < train.patience:
        return ""
    name, value = best.rpartition(" ")[2], -top[1] if best.startswith("max") else top[1]
    return (
        f"{name} has not improved on {value:.4g} of step {top[0]} by more than {train.min_delta:g} in {since} validations "
        f"(train.patience={train.patience}); raise it and --resume to go on."
    )
