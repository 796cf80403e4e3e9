"""Tables of the report as rows of text: results, cost, settings, hardware."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from distill import config
from distill.files import sample_counts
from distill.inspect.report.charts import TITLES, metrics_of
from distill.inspect.report.gather import RunSummary, finite
from distill.metrics import table

Rows = list[list[str]]
DIVERGED = 1000.0  # a solver's value above this multiple of the largest of teacher and student is no result


class Tile(NamedTuple):
    """A headline number with its label and the value it is compared with."""

    value: str
    what: str
    beside: str


def number(value: Any) -> str:
    """Three significant digits; an en dash for a missing value."""
    if not finite(value):
        return "–"
    if abs(value) >= 1e5:
        return f"{value:.1e}".replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """Seconds, minutes or hours."""
    if not finite(value):
        return "–"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def size(value: float | None) -> str:
    """Bytes in MiB or GiB."""
    if not finite(value):
        return "–"
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:.1f} GiB"


# -- results -------------------------------------------------------------------------------------------------------


def tiles(run: RunSummary) -> list[Tile]:
    """The headline numbers of a run."""
    metric = next(iter(metrics_of([run])), None)
    if metric is None:
        return []
    student, teacher, name, out = run.scores("student"), run.scores("teacher"), TITLES.get(metric, metric), []
    own, most = student.get(run.steps, {}).get(metric), max(teacher, default=None)
    if finite(own):
        best = teacher[most].get(metric) if most else None
        beside = f"teacher at {most}: {number(best)}" if finite(best) else ""
        out.append(Tile(number(own), f"{name}, student at {run.steps}", beside))
        if finite(best) and best > 0 and own > 0 and not table.higher(metric):
            fewer = f"with {most / run.steps:.3g}× fewer evaluations"
            out.append(Tile(f"{number(own / best)}×", f"the teacher's distance at {most}", fewer))
        if rival := _best_solver(run, metric):
            out.append(Tile(number(rival[1]), f"{rival[0]}, teacher at {run.steps}", f"student: {number(own)}"))
    timed = {(p["kind"], p["nfe"]): p["seconds"] for p in run.measured.get("points", [])}
    if finite(fast := timed.get(("student", run.steps))):
        slow = timed.get(("teacher", most))
        out.append(Tile(seconds(fast), "for 1,000 samples", f"teacher at {most}: {seconds(slow)}" if slow else ""))
    beside = f"{run.step:,} steps" + (f", {run.samples:,} samples" if run.samples else "")
    return [*out, Tile(seconds(run.seconds), "of training", beside)] if run.seconds else out


def _best_solver(run: RunSummary, metric: str) -> tuple[str, float] | None:
    """The best solver on the teacher at the student's evaluations, of distill or of diffusers, and its value."""
    rivals = [("best distill solver", run.scores("training_free").get(run.steps, {}).get(metric))]
    rivals += [("best diffusers solver", p["scores"].get(metric)) for p in _stock(run) if p["nfe"] <= run.steps]
    best = None
    for name, value in rivals:
        if finite(value) and (best is None or table.better(metric, value, best[1])):
            best = name, value
    return best


def _stock(run: RunSummary) -> list[dict[str, Any]]:
    return [point for point in run.measured.get("points", []) if point["kind"] == "stock"]


def results(run: RunSummary) -> list[dict[str, Any]]:
    """One table per metric: rows student, teacher and solvers of diffusers, columns evaluations; the best is marked."""
    seconds_of = {(p["who"], p["nfe"]): p["seconds"] for p in run.measured.get("points", [])}
    return [pivot for name in metrics_of([run]) if (pivot := _pivot(run, name, seconds_of))["rows"]]


def _pivot(run: RunSummary, metric: str, seconds_of: dict[tuple[str, int], float]) -> dict[str, Any]:
    values_at = {
        (kind, kind, nfe): values.get(metric)
        for kind in ("student", "teacher")
        for nfe, values in run.scores(kind).items()
    }
    values_at |= {("stock", p["who"], p["nfe"]): p["scores"].get(metric) for p in _stock(run)}
    limit = DIVERGED * max([abs(v) for (kind, *_), v in values_at.items() if kind != "stock" and finite(v)], default=1)
    diverged = {key for key, value in values_at.items() if key[0] == "stock" and finite(value) and abs(value) > limit}
    values_at = {key: value for key, value in values_at.items() if finite(value)}
    nfes = sorted({nfe for _, _, nfe in values_at})
    worst, way = (-float("inf"), -1) if table.higher(metric) else (float("inf"), 1)
    at_own = lambda kind, who: values_at.get((kind, who, run.steps), worst) * way
    order = lambda row: (
        ("student", "teacher", "stock").index(row[0]),
        at_own(*row) if row[0] == "stock" else 0,
        row[1],
    )
    rows = []
    for kind, who in sorted({key[:2] for key in values_at}, key=order):
        cells = []
        for nfe in nfes:
            value = values_at.get((kind, who, nfe))
            rivals = [v for key, v in values_at.items() if key[2] == nfe and key not in diverged]
            if (kind, who, nfe) in diverged:
                cells.append(("diverged", False))
            else:
                cells.append((number(value) if finite(value) else "", table.best(metric, value, rivals)))
        spent = seconds_of.get((who, run.steps))
        rows.append({"kind": kind, "who": who, "cells": cells, "seconds": number(spent) if finite(spent) else ""})
    return {"metric": metric, "head": _head(metric), "nfes": nfes, "rows": rows}


def reference_vs_holdout(run: RunSummary) -> str:
    """The distances between the two real splits."""
    distances = ((run.metrics or {}).get("reference_vs_holdout") or {}).items()
    return ", ".join(f"{TITLES.get(k, k)} {number(v)}" for k, v in distances if finite(v))


def _head(metric: str) -> str:
    return TITLES.get(metric, metric) + table.arrow(metric)


def compared(runs: Sequence[RunSummary]) -> dict[str, Any] | None:
    """Several runs in one table, each student at its own number of evaluations; None for a single run."""
    if len(runs) == 1:
        return None
    names, rows = metrics_of(runs), []
    own = [run.scores("student").get(run.steps) or run.scores("teacher").get(run.steps, {}) for run in runs]
    for run, values in zip(runs, own):
        cells = [(number(values.get(n)), table.best(n, values.get(n), [v.get(n) for v in own])) for n in names]
        row = {"name": run.name, "method": run.method, "steps": run.steps, "cells": cells, "trained": f"{run.step:,}"}
        rows.append(row | {"time": seconds(run.seconds), "memory": size(run.cost.get("peak_bytes"))})
    return {"heads": [_head(n) for n in names], "rows": rows}


def notes(runs: Sequence[RunSummary]) -> list[str]:
    """One note per run, with its name if there are several."""
    return [note(run) if len(runs) == 1 else f"{run.name}: {note(run)}" for run in runs]


def note(run: RunSummary) -> str:
    """Samples, timing and checkpoint behind the numbers."""
    about, parts = (run.metrics or {}).get("about", {}), []
    if not run.metrics:
        return "Nothing is measured yet; run `distill report` without --quick."
    parts.append(sample_counts(about).removesuffix("."))
    parts.append(
        f"seconds on {run.measured['machine']}, the least of three timings" if run.measured.get("machine") else ""
    )
    parts.append(f"checkpoint of step {about['step']:,}" if "step" in about else "")
    return "; ".join(filter(None, parts)) + "."


# -- cost, settings, environment -----------------------------------------------------------------------------------


def costs(runs: Sequence[RunSummary]) -> Rows:
    """Cost of training: one row per quantity, one column per run."""
    facts = {
        "Training time": lambda r: seconds(r.seconds),
        "Steps": lambda r: f"{r.step:,} of {r.cfg.train.steps:,}",
        "Seconds per step": lambda r: number(r.seconds / r.step) if r.seconds and r.step else "–",
        "Samples seen": lambda r: f"{r.samples:,}" if r.samples else "–",
        "Processes": lambda r: str(r.manifest.get("world") or 1),
        "Peak memory": lambda r: (
            size(r.cost.get("peak_bytes")) + (f", {r.cost['memory']}, first process" if "memory" in r.cost else "")
        ),
    }
    return _by(facts, runs)


def settings(runs: Sequence[RunSummary]) -> Rows:
    """The main settings; the page shows the whole config below."""
    facts = {
        "Method": lambda r: r.method,
        "Student": lambda r: f"{r.steps} evaluations",
        "Guidance": lambda r: number(r.cfg.method.get("guidance", 1.0)),
        "Teacher": lambda r: _role(r, "teacher"),
        "Data": lambda r: ", ".join(filter(None, [_target(r.cfg.data), _tail(r.cfg.data.get("path"))])),
        "Batch size": lambda r: str(r.cfg.data.get("batch_size", "–")),
        "Optimizers": lambda r: (
            "; ".join(f"{role}: {o.name}, learning rate {o.lr:g}, {o.decay}" for role, o in r.cfg.optim.items())
            or "defaults"
        ),
        "Average": lambda r: number(r.cfg.method.get("ema", 0.999)),
        "Strategy, precision": lambda r: f"{r.cfg.engine.strategy}, {r.cfg.engine.precision}",
        "Seed": lambda r: str(r.cfg.seed),
    }
    return _by(facts, runs)


def environment(runs: Sequence[RunSummary]) -> Rows:
    """Hardware and versions."""
    facts = {
        "Device": lambda r: r.cost.get("device", "–"),
        "Measured on": lambda r: (r.metrics or {}).get("about", {}).get("machine", "–"),
        "Measured": lambda r: (r.metrics or {}).get("about", {}).get("date", "–"),
        "distill": lambda r: r.manifest.get("distill", "–"),
        "torch": lambda r: r.manifest.get("torch", "–"),
        "Config": lambda r: r.manifest.get("config", "–"),
        "Folder": lambda r: r.folder.name,
    }
    return _by(facts, runs)


def _by(facts: dict[str, Any], runs: Sequence[RunSummary]) -> Rows:
    return [[name, *(fact(run) for run in runs)] for name, fact in facts.items()]


def _target(node: Any) -> str:
    return str(node.get(config.TARGET, "–")).rpartition(".")[2]


def _role(run: RunSummary, role: str) -> str:
    node = run.cfg.roles.get(role)
    if not node or isinstance(node, str):
        return "–"
    return _tail(node.get("path")) or ".".join(str(node.get(config.TARGET, "–")).split(".")[-2:])


def _tail(path: Any) -> str:
    """The last two parts of a path."""
    return "/".join(str(path).split("/")[-2:]) if path else ""
