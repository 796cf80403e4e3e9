"""Measurements of the report beyond metrics.json: solvers of diffusers on the teacher, time, teacher baseline, pictures."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.inspect.measure import evaluation_of
from distill.inspect.report.gather import MEASURED, json_of
from distill.metrics import pictures, table
from distill.metrics.evaluate import FEW, Evaluation, Sampler
from distill.metrics.suite import Suite
from distill.training import run_folder
from distill.training.callbacks import console
from distill.training.experiment import Experiment

COLUMNS = 12  # samples per picture of data without classes
POINTS = 1000  # samples of a scatter plot
FEW_TIMED = 256  # samples of a timing without metrics

Point = dict[str, Any]  # who, kind, nfe, seconds, scores


def measure_stock(
    folder: Path,
    experiment: Experiment,
    evaluations: Sequence[int] | None = None,
    samples: int | None = None,
    stock: bool = True,
) -> dict[str, Any]:
    """Measure what report.json lacks for this checkpoint, and write it there.

    Args:
        evaluations: of the solvers of diffusers; those of `eval.evaluations` up to 16, and K, by default.
        samples: of each solver of diffusers; `eval.samples` by default. Seconds are those of the validation's samples.
        stock: False measures pictures and time only, without solvers of diffusers and metrics, which take most of the time.

    Returns:
        key: identifies checkpoint and settings; points: `[{who, kind, nfe, seconds, scores}]`, seconds a thousand samples;
        teacher_baseline: metrics of the teacher at K and the most evaluations on the validation's noise;
        pictures: `[{kind, nfe, png}]`.
    """
    cfg, method, suite = experiment.cfg, experiment.method, experiment.suite()
    nfes = sorted({*(evaluations or (n for n in cfg.eval.evaluations if n <= FEW)), method.grid.steps})
    config = run_folder.manifest_facts(cfg, experiment.data, folder)["config"]
    key = [config, method.step, samples or cfg.eval.samples, nfes, stock]
    if (stored := json_of(folder / MEASURED)).get("key") == key:
        return stored
    timed = evaluation_of(experiment, suite, cfg.eval.validation_samples if stock else FEW_TIMED)
    points, baseline = _teacher(timed, _teacher_nfes(experiment), cfg.eval.evaluations, score=stock)
    points += _student(timed, nfes)
    if stock and experiment.teacher is not None:
        points += _stock(evaluation_of(experiment, suite, samples), nfes)
    kind, rows = _pictures(experiment, suite, nfes)
    measured = {"key": key, "points": points, "teacher_baseline": baseline, "machine": _machine(experiment)}
    measured |= {"kind": kind, "pictures": rows}
    table.write(measured, folder / MEASURED)
    return measured


def _teacher_nfes(experiment: Experiment) -> list[int]:
    return sorted({*experiment.cfg.eval.evaluations, experiment.method.grid.steps})


def _machine(experiment: Experiment) -> str:
    device = next(experiment.method.student.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _teacher(
    timed: Evaluation, nfes: Sequence[int], evaluations: Sequence[int], score: bool
) -> tuple[list[Point], dict[str, dict[str, float]]]:
    """Seconds of the teacher by DDIM, and its metrics at K and at the most evaluations."""
    points, baseline = [], {}
    for nfe, sampler in _teacher_samplers(timed, nfes):
        x, seconds = timed.time(sampler)
        points.append(_point("teacher", "teacher", nfe, seconds))
        if score and nfe in (timed.grid.steps, max(evaluations)):
            baseline[f"teacher@{nfe}"] = timed.score(x, quick=True)
    return points, baseline


def _teacher_samplers(evaluation: Evaluation, nfes: Sequence[int]) -> Iterator[tuple[int, Sampler]]:
    """The teacher's sampler at each possible number of evaluations."""
    for nfe in nfes if evaluation.teacher is not None else ():
        if sampler := evaluation.teacher_sampler(nfe):
            yield nfe, sampler


def _student(timed: Evaluation, nfes: Sequence[int]) -> list[Point]:
    """Seconds of the student, on an even grid at a number of evaluations other than its own."""
    if timed.student is None:
        return []
    return [_point("student", "student", nfe, timed.time(timed.student_sampler(nfe))[1]) for nfe in nfes]


def _stock(evaluation: Evaluation, nfes: Sequence[int]) -> list[Point]:
    """Every solver of diffusers for the teacher's schedule, at its counted cost, from the same noise."""
    from distill.models import diffusers

    teacher, price, points = evaluation.teacher, evaluation.price, []
    device = next(evaluation.model.parameters()).device
    for name in diffusers.stock_solvers(teacher.schedule):
        costs = {diffusers.calls_used(name, teacher.schedule, int(nfe // price)) for nfe in nfes if nfe >= price} - {0}
        for calls in sorted(costs if name in ("DDIM", "Flow Euler") else costs - {1}):  # at one all are DDIM
            evaluation.progress(f"diffusers {name}, {round(calls * price)} evaluations")
            x, seconds = evaluation.time(_stock_sampler(teacher, name, calls, device))
            if torch.isfinite(x).all():
                scores = evaluation.score(x, quick=True)
                points.append(_point(name, "stock", round(calls * price), seconds, scores))
        console.print(f"diffusers {name}: measured", highlight=False)
    return points


def _stock_sampler(teacher: Any, name: str, calls: int, device: torch.device) -> Sampler:
    from distill.models import diffusers

    generator = torch.Generator(device).manual_seed(0)
    return lambda z, cond: diffusers.sample_stock(teacher, z, name, calls, generator, **cond)


def _point(who: str, kind: str, nfe: int, seconds: float, scores: dict[str, float] | None = None) -> Point:
    return {"who": who, "kind": kind, "nfe": nfe, "seconds": seconds, "scores": scores or {}}


# -- pictures ------------------------------------------------------------------------------------------------------


def _pictures(experiment: Experiment, suite: Suite, nfes: Sequence[int]) -> tuple[str, list[dict[str, Any]]]:
    """("images" | "points" | "none", one picture per row): teacher and student by evaluations, all from the same noises."""
    shape, classes = experiment.method.shape, experiment.data.info.classes or 0
    kind = "points" if suite.oracle is not None else "images" if len(shape) == 3 and shape[0] in (1, 3) else "none"
    if kind == "none" or (kind == "points" and len(shape) != 1):
        return "none", []
    columns = classes if 4 <= classes <= COLUMNS else COLUMNS
    evaluation = evaluation_of(experiment, suite, POINTS if kind == "points" else columns)
    rows = []
    for nfe, sampler in _teacher_samplers(evaluation, _teacher_nfes(experiment)):
        rows.append(("teacher", nfe, evaluation.draw(sampler)))
    for nfe in nfes if evaluation.student is not None else ():
        rows.append(("student", nfe, evaluation.draw(evaluation.student_sampler(nfe))))
    return kind, [{"kind": who, "nfe": nfe, "png": _data_uri(suite, kind, x)} for who, nfe, x in rows]


def _data_uri(suite: Suite, kind: str, x: Tensor) -> str:
    """Samples as a PNG in a data URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        if kind == "images":
            pictures.strip(x, path)
        else:
            suite.picture({"": x}, path)
        return png_uri(path)


def png_uri(path: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
