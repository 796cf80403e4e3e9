"""`distill demo`: trains, measures and exports a four-step student of the digits teacher that comes with the package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from distill import config
from distill.config.recipes import CHECKPOINTS
from distill.data import prepare
from distill.export.verify import verify
from distill.inspect.measure import measure
from distill.inspect.results import write_export
from distill.metrics import table
from distill.training.callbacks import console
from distill.training.experiment import Experiment
from distill.training.run import train
from distill.training.run_folder import CONFIG, METRICS
from distill.training.signals import REQUEUE

TEACHER_STEPS, STUDENT_STEPS = 50, 4


def demo(out: Path, steps: int | None = None) -> int:
    """Distil, measure and export the digits teacher into `out`: data/, run/, student/ and report.html.

    Args:
        out: the folder; an unfinished one is completed.
        steps: training steps; those of the recipe by default.

    Returns:
        The exit code: 0 if all `requirements` hold, else 1; 85 or 130 if training was interrupted.
    """
    started, run, student = time.monotonic(), out / "run", out / "student"
    cfg = recipe(out / "data", steps)
    experiment = train(cfg, run, resume=(run / CONFIG).exists())
    if experiment.method.step < cfg.train.steps:
        console.print("Interrupted: repeat the command to continue.", highlight=False)
        return REQUEUE if experiment.preempted else 130
    console.print(f"trained in {time.monotonic() - started:.0f} s; measuring {cfg.eval.samples} samples per row")
    result, panels = measure(experiment, evaluations=(STUDENT_STEPS, TEACHER_STEPS), every_solver=(STUDENT_STEPS,))
    table.write(result, run / METRICS)
    experiment.suite().picture(panels, run / "samples.png")
    if not student.exists():
        write_export(experiment, student, result)
    checks = requirements(result, verify(student))
    table.show(result)
    _print_checks(checks, result)
    page = _write_report(out, run, experiment, result)
    console.print(f"{time.monotonic() - started:.0f} s in all; open {page}, load {student}")
    return 0 if all(holds for *_, holds in checks) else 1


def recipe(data: Path, steps: int | None = None) -> Any:
    """The config of digits/tdm with its data in the folder `data`, which is written if it is missing."""
    if not data.exists():
        prepare.digits(data)
    overrides = [
        "log.to=[csv]",  # no account
        f"data.path={data / 'train'}",
        f"eval.reference.path={data / 'test'}",
        f"roles.teacher.path={CHECKPOINTS / 'digits-teacher'}",
    ]
    return config.load(["digits/tdm"], overrides + ([f"train.steps={steps}"] if steps else []))


def requirements(result: dict[str, Any], difference: float) -> list[tuple[str, str, bool]]:
    """The demo's requirements, as stated in the README.

    Args:
        result: metrics.json of the run.
        difference: of the export's samples to the trainer's, from `verify`.

    Returns:
        For each requirement its text, the measured value and whether it holds.
    """
    student = result["student"][str(STUDENT_STEPS)]
    of_teacher = student["fd"] / result["teacher"][str(TEACHER_STEPS)]["fd"]
    of_solvers = student["fd"] / result["training_free"][str(STUDENT_STEPS)]["fd"]
    return [
        (
            f"FD of the student at {STUDENT_STEPS} evaluations <= 0.9 x teacher at {TEACHER_STEPS}",
            f"{of_teacher:.2f}",
            of_teacher <= 0.9,
        ),
        (
            f"FD of the student <= 0.5 x the best distill solver on the teacher at {STUDENT_STEPS} evaluations",
            f"{of_solvers:.2f}",
            of_solvers <= 0.5,
        ),
        ("accuracy of the student >= 0.97", f"{student['accuracy']:.3f}", student["accuracy"] >= 0.97),
        ("stock diffusers draws the same samples, difference <= 1e-4", f"{difference:.1e}", difference <= 1e-4),
    ]


def _print_checks(checks: list[tuple[str, str, bool]], result: dict[str, Any]) -> None:
    distance = result["reference_vs_holdout"]["fd"]
    console.print(f"for scale, FD of the training split against the held-out one: {distance:.3f}", highlight=False)
    for text, value, holds in checks:
        console.print(f"{'ok    ' if holds else 'FAILED'} {text}: {value}", highlight=False)


def _write_report(out: Path, run: Path, experiment: Experiment, result: dict[str, Any]) -> Path:
    """Write the run's report, and print the best solver of diffusers at the student's evaluations."""
    from distill.inspect.report import report
    from distill.inspect.report.measure import measure_stock

    points = measure_stock(run, experiment, (STUDENT_STEPS,))["points"]
    solvers = {p["who"]: p["scores"]["fd"] for p in points if p["kind"] == "stock" and p["nfe"] == STUDENT_STEPS}
    page = report([run], out / "report.html", quick=True)
    if solvers:
        name = min(solvers, key=solvers.get)
        student = result["student"][str(STUDENT_STEPS)]["fd"]
        console.print(
            f"best diffusers solver at {STUDENT_STEPS} evaluations: {name}, FD {solvers[name]:.3f}; the "
            f"student has {student / solvers[name]:.2f} x that.",
            highlight=False,
        )
    return page
