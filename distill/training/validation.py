"""Validation: scores beside the teacher baseline, pictures, alarms, best checkpoints, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.files import write_text
from distill.metrics import table
from distill.metrics.collapse import collapse_indicators
from distill.metrics.evaluate import panel_samples
from distill.metrics.shared_draw import SharedDraw
from distill.metrics.shares import ALONE, SampleShares
from distill.training import baseline, checkpoints
from distill.training.alarms import Alarm, MetricMonitor, halfway_step, rules_for
from distill.training.callbacks import MetricLogger, PeriodicCallback, console
from distill.training.probes import probes
from distill.training.records import history
from distill.training.run_folder import STOPPED, is_rank_zero

NOT_FINITE = (
    "{} of {} samples of the student's average hold NaN or infinity, so every metric is NaN; lower optim.student.lr or "
    "optim.student.clip, or set engine.precision=32."
)


class Validation(PeriodicCallback):
    """Validates every `train.validate_every` steps, at the start, and at the end of a run that was not interrupted.

    All ranks draw and score their shares of the samples, under the run's precision; rank 0 writes and decides, and the
    others receive its alarms and its decision to stop. Earlier validations are read from `metrics.csv`, so a resumed run
    decides as an uninterrupted one.

    Args:
        cfg: the run's config.
        folder: the run folder.
        tests: the metrics, a `distill.metrics.suite.Suite`.
        fixed: noises and conditions of every validation.
        record: the MetricLogger.
        writer: the checkpoint Writer, which receives the scores; None on ranks that write nothing.
        name: of the teacher baseline; see `baseline.baseline_fingerprint`.
        rows: samples per call.
        ranks: who shares the samples.
    """

    def __init__(
        self,
        cfg: Any,
        folder: Path,
        tests: Any,
        fixed: tuple[Tensor, dict[str, Tensor]],
        record: MetricLogger,
        writer: Any,
        name: str,
        rows: int = 1000,
        ranks: SampleShares = ALONE,
    ):
        super().__init__(cfg.train.validate_every, self.validate, start=True, finished=True)
        self.cfg, self.folder, self.tests, self.record, self.writer = cfg, folder, tests, record, writer
        self.path, self.rows, self.ranks = baseline.baseline_path(folder, name), rows, ranks
        self.draw = SharedDraw(*fixed, rows, ranks, cfg.engine.precision)
        self.z, self.cond = fixed
        self.baseline: baseline.Scores | None = None
        self.fresh: baseline.Scores | None = None  # measured by this process; saved after the run's first step
        self.alarms: list[Alarm] = []
        self.stopped, self.past, self.monitor = "", [], None
        self.save: Callable[[Any], None] = lambda method: None  # of the last step, before it is validated
        self.started = self.measured = False

    def on_train_start(self, trainer, method):
        self.started = True
        self.reload_history()
        super().on_train_start(trainer, method)

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        super().on_train_batch_end(trainer, method, outputs, batch, index)
        if self.fresh and is_rank_zero():
            baseline.save_baseline(self.path, self.fresh)
        self.fresh = None
        if self.stopped:
            trainer.should_stop = True

    def on_train_end(self, trainer, method):
        if method.step >= method.total_steps:
            self.save(method)
        super().on_train_end(trainer, method)
        if is_rank_zero() and self.baseline is not None and (self.stopped or method.step >= method.total_steps):
            self.summary(method)

    def on_fit_end(self, trainer, method):
        if not self.started:  # all steps are done, and the process died before it had validated the last one
            self.reload_history()
            self.on_train_end(trainer, method)

    def reload_history(self) -> None:
        """Read earlier validations from `metrics.csv`, after a restart or a rollback."""
        self.past = history(self.folder) if is_rank_zero() else []

    def validate(self, method: Any) -> None:
        self.tests.prepare(self.ranks)
        if self.baseline is None:
            self.baseline = self.teacher(method)
            self.monitor = MetricMonitor(halfway_step(method), method.warm_start, rules_for(method))
            for row in self.past:
                self.monitor.check(row["step"], row, self.reference)
        self.monitor.half = halfway_step(method)
        alarms, self.stopped = self.report(method)
        for alarm in alarms:
            self.alarm(alarm)
        if self.stopped and is_rank_zero():
            write_text(self.folder / STOPPED, f"step {method.step}: {self.stopped}\n")
            console.print(f"Stopping at step {method.step}: {self.stopped}", highlight=False)

    def report(self, method: Any) -> tuple[list[Alarm], str]:
        """Draw, score and write; returns the alarms, and why the run should stop or "". All ranks call it.

        A failure is raised by the first validation of a process, where it costs no step; later ones are alarms.
        """
        own = self.draw(lambda z, cond, noise: method.sample(z, cond, generator=noise), method.student)
        x = self.ranks.gather_to_all(own)
        bad = int((~torch.isfinite(x).flatten(1).all(1)).sum())
        scores, diagnostics = {}, {}
        try:
            if not bad:
                scores = self.tests.score(own, self.draw.own_cond, quick=True, ranks=self.ranks)
                shared = {"batch": self.rows, "ranks": self.ranks, "precision": self.cfg.engine.precision}
                diagnostics = probes(method, self.z, x, self.cond, self.tests, **shared)
            result = self.ranks.from_first(lambda: self.decide(method, x, scores, diagnostics, bad))
        except Exception as error:  # of a metric, its network or the disk: each its own class
            if not self.measured:
                raise
            text = " ".join(f"{type(error).__name__}: {error}".split())
            mend = "the run continues; `distill eval` measures its last checkpoint"
            return [Alarm(method.step, "validation failed", f"{text}; {mend}.")], ""
        self.measured = True
        return result

    def decide(
        self, method: Any, x: Tensor, scores: dict[str, float], diagnostics: dict[str, float], bad: int
    ) -> tuple[list[Alarm], str]:
        """On rank 0: write the scores; the alarms, and why the run should stop. `bad` samples of x are not finite."""
        if bad:
            row = dict.fromkeys({*self.reference, self.best.rpartition(" ")[2], self.tests.headline}, math.nan)
            alarms = [Alarm(method.step, "samples not finite", NOT_FINITE.format(bad, len(x)))]
        else:
            row = scores | collapse_indicators(x, self.cond, self.tests.x) | diagnostics
            alarms = self.monitor.check(method.step, row, self.reference)
        self.write(method, x, row)
        return alarms, plateau(self.past, self.best, self.cfg.train)

    def alarm(self, alarm: Alarm) -> None:
        """Report an alarm on the console, in `alarms.jsonl` and on the dashboards."""
        self.alarms.append(alarm)
        if is_rank_zero():
            console.print(f"ALARM at step {alarm.step}, {alarm.kind}: {alarm.message}", highlight=False)
            self.record.log_event("alarm", alarm)

    # -- the teacher -------------------------------------------------------------------------------------------------

    def teacher(self, method: Any) -> baseline.Scores:
        """The teacher baseline: read from its file on rank 0, else measured."""
        found = self.ranks.from_first(lambda: baseline.read_baseline(self.path))
        if found is None:
            found = self.fresh = baseline.measure_baseline(
                method, self.tests, self.draw, self.cond, max(self.cfg.eval.evaluations)
            )
        return found

    @property
    def reference(self) -> dict[str, float]:
        """The values that alarms compare with: the teacher at the most evaluations, else the data."""
        return list(self.baseline.values())[-1] if self.baseline else {}

    # -- the student -------------------------------------------------------------------------------------------------

    def write(self, method: Any, x: Tensor, row: dict[str, float]) -> None:
        step, train = method.step, self.cfg.train
        self.past.append({"step": step} | row)
        teacher = {
            f"validation/{who}/{k}": v for who, values in self.baseline.items() for k, v in values.items() if k in row
        }
        self.record.write({f"validation/{k}": v for k, v in row.items()} | teacher, step)
        self.chart([self.tests.headline])
        score = checkpoints.rank(row, self.best)
        if train.keep_best and self.writer:
            self.writer.score(step, score)
        path = self.folder / "samples" / f"step-{step:08d}.png"
        caption = f"step {step}, {method.grid.steps} evaluations"
        try:
            path.parent.mkdir(exist_ok=True)
            self.tests.picture({caption: panel_samples(torch.nan_to_num(x))}, path)
            self.record.log_event("picture", "samples", path, step, caption)
        except Exception as error:  # of a decoder, matplotlib or the disk: each its own class
            text = " ".join(f"{type(error).__name__}: {error}".split())
            console.print(f"WARNING: {path} could not be drawn ({text}); the run continues.", highlight=False)
        values = "  ".join(f"{k} {v:.4g}" for k, v in row.items())
        console.print(f"validation at step {step}: {values}", highlight=False)

    def chart(self, names: list[str]) -> None:
        """The student's curve of a metric beside the teacher baseline."""
        for name in names:
            rows = [r for r in self.past if name in r]
            student = {"student": [r[name] for r in rows]}
            flat = {who: [v[name]] * len(rows) for who, v in self.baseline.items() if name in v}
            if rows:
                self.record.log_event("chart", name, [r["step"] for r in rows], student | flat)

    def summary(self, method: Any) -> None:
        """At the end: all charts, and a table of the last student, the best one, and the teacher."""
        last = self.past[-1] if self.past else {}
        names = [k for k in last if k != "step"]
        self.chart(names)
        rows = {f"student, step {last['step']}": last} if last else {}
        if self.past:
            best = min(self.past, key=lambda r: checkpoints.rank(r, self.best))
            rows = {f"best student, step {best['step']}": best} | rows
        rows |= self.baseline
        table = [[who, *(values.get(k) for k in names)] for who, values in rows.items()]
        self.record.log_event("table", "final", ["", *names], table)

    def upload_checkpoint(self) -> None:
        """The newest checkpoint as an artifact, if `log.artifacts`."""
        found = checkpoints.complete(self.folder / "checkpoints") if self.cfg.log.artifacts else []
        if found:
            self.record.log_event("artifact", "checkpoint", found[-1])

    # -- when to stop ------------------------------------------------------------------------------------------------

    @property
    def best(self) -> str:
        return best(self.cfg, self.tests)


def best(cfg: Any, tests: Any) -> str:
    """What the best is: "min fd", "max accuracy"."""
    return cfg.train.best or f"{'max' if table.higher(tests.headline) else 'min'} {tests.headline}"


def plateau(past: list[dict[str, float]], best: str, train: Any) -> str:
    """Why a run with these validations should stop; empty if it should not or `train.patience` is 0.

    It stops if none of the last `patience` validations improved on the best before them by more than `min_delta`.
    """
    if not train.patience:
        return ""
    scores = [(row["step"], checkpoints.rank(row, best)) for row in past]
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
        f"(train.patience={train.patience}); raise it and use --resume to continue."
    )
