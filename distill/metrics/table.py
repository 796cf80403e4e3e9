"""The numbers of a run as one nested dict, on the terminal, in markdown and in metrics.json.

    {"teacher": {nfe: {metric: value}}, "training_free": ..., "student": ...,
     "solvers": {nfe: {metric: name}},
     "every_solver": {nfe: {name: {metric: value}}},
     "reference_vs_holdout": {metric: value}, "about": {"samples": ..., "reference": ..., "seed": ..., ...}}

"training_free" is the best of distill's ODE solvers on the teacher, for each metric, and "solvers" its name; nfe is a
string, network evaluations per sample, so that the dict is the same before and after JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.errors import BadInput, suggest
from distill.files import atomic_write, markdown_table, sample_counts

Scores = Mapping[int, Mapping[str, float]]  # {nfe: {metric: value}}

HIGHER = frozenset(
    {"precision", "recall", "accuracy", "reward"}
)  # higher is better for these, and for names with these endings:
SCORES = ("_score", "_reward")  # lower is better for all others
SIGNED = frozenset({"nll_gap"})  # best at zero
UNRANKED = frozenset({"mean", "std"})  # no better and no worse
ROWS = {"teacher": "teacher", "training_free": "best distill solver", "student": "student"}  # key -> title


def better(metric: str, a: float, b: float) -> bool:
    """Whether a is strictly better than b; any finite value is better than NaN or infinity."""
    if not math.isfinite(a) or not math.isfinite(b):
        return math.isfinite(a) and not math.isfinite(b)
    if metric in SIGNED:
        return abs(a) < abs(b)
    return metric not in UNRANKED and (a > b if higher(metric) else a < b)


def best(metric: str, value: float | None, rivals: Sequence[float | None]) -> bool:
    """Whether `value` is the best of `rivals`, which include it; False if all are equal or there is only one."""
    rivals = [v for v in rivals if v is not None and math.isfinite(v)]
    won = value is not None and math.isfinite(value) and len(rivals) > 1 and metric not in UNRANKED
    return won and not any(better(metric, v, value) for v in rivals)


def higher(metric: str) -> bool:
    """Whether more of it is better."""
    return metric in HIGHER or metric.endswith(SCORES)


def arrow(metric: str) -> str:
    """The direction that is better, as tables have it behind a metric's name."""
    return " ↑" if higher(metric) else " →0" if metric in SIGNED else "" if metric in UNRANKED else " ↓"


def build(teacher: Scores, training_free: Mapping[int, Mapping[str, Mapping[str, float]]], student: Scores) -> dict:
    """The nested dict of a run from `{nfe: {metric: value}}` of teacher and student and the scores of every solver.

    The row "training_free" has, for each NFE and each metric separately, the value of the best solver, so a single
    solver may be worse than this row. "solvers" names the best ones.
    """
    best: dict[str, dict[str, float]] = {}
    winners: dict[str, dict[str, str]] = {}
    for nfe, solvers in training_free.items():
        row, names = best.setdefault(str(nfe), {}), winners.setdefault(str(nfe), {})
        for name, scores in solvers.items():
            for metric, value in scores.items():
                if metric not in UNRANKED and (metric not in row or better(metric, value, row[metric])):
                    row[metric], names[metric] = value, name
    every = {str(nfe): dict(s) for nfe, s in training_free.items()}
    row = {"teacher": _keys(teacher), "training_free": best, "student": _keys(student)}
    return row | {"solvers": winners, "every_solver": every}


def rows(metrics: dict) -> dict[str, dict[str, dict[str, float]]]:
    """Title -> {nfe: {metric: value}} of the rows that `metrics` holds."""
    return {title: metrics[key] for key, title in ROWS.items() if key in metrics}


def write(metrics: dict, path: str | os.PathLike) -> Path:
    """Write metrics.json whole or not at all: an interrupted or failed write leaves the old file. NaN becomes null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(metrics), indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


def read(path: str | os.PathLike) -> dict:
    """The dict of a metrics.json; `BadInput` when the file is missing, is not JSON or holds no rows."""
    try:
        metrics = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as metrics ({error}); run the evaluation again.") from None
    if not isinstance(metrics, dict) or not rows(metrics):
        raise BadInput(f"{path} holds no row of a model; it is not a metrics.json of an evaluation.")
    if "floor" in metrics:  # its name in files of version 0.1.0
        metrics["reference_vs_holdout"] = metrics.pop("floor")
    return metrics


def show(metrics: dict, names: Sequence[str] | None = None, console=None, title: str | None = None) -> None:
    """Print a table by rich, with the best value at each number of evaluations in bold, and the number of samples below.

    Rows are models and columns NFE x metric. If that is wider than the console, rows are models x NFE and columns
    metrics, in as many tables as needed.

    Args:
        names: metrics to print; by default all that have a better direction.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()

    def wide(names: Sequence[str], title: str | None) -> Table:
        out = Table(title=title, title_justify="left")
        out.add_column("")
        for metric, nfe in _columns(metrics, names):
            out.add_column(f"{metric}{arrow(metric)}\n{nfe} NFE", justify="right")
        for row, cells in _cells(metrics, names).items():
            out.add_row(row, *(_bold(*cell) for cell in cells))
        return out

    def tall(names: Sequence[str], title: str | None) -> Table:
        out, columns = Table(title=title, title_justify="left"), _columns(metrics, names)
        for head in ("", "NFE", *(f"{metric}{arrow(metric)}" for metric in names)):
            out.add_column(head, justify="right" if head else "left", no_wrap=True)
        cells = {row: dict(zip(columns, values)) for row, values in _cells(metrics, names).items()}
        for nfe in sorted({nfe for _, nfe in columns}, key=int):
            for row, values in rows(metrics).items():
                if nfe in values:
                    out.add_row(row, nfe, *(_bold(*cells[row].get((metric, nfe), ("–", False))) for metric in names))
        return out

    def fits(table: Table) -> bool:
        unbounded = console.options.update(max_width=10_000)
        return console.measure(table, options=unbounded).maximum <= console.width

    names = _names(metrics, names or _ranked(metrics))
    if fits(wide(names, title)):
        console.print(wide(names, title))
        names = []
    while names:
        count = next((n for n in range(len(names), 1, -1) if fits(tall(names[:n], title))), 1)
        console.print(tall(names[:count], title))
        names, title = names[count:], None
    if counts := sample_counts(metrics.get("about", {})):
        console.print(counts, highlight=False)


def _ranked(metrics: dict) -> list[str]:
    """The measured metrics that have a better direction; all of them if none has."""
    seen = _names(metrics, None)
    return [name for name in seen if name not in UNRANKED] or seen


def _bold(text: str, top: bool) -> str:
    return f"[bold]{text}[/bold]" if top else text


def markdown(metrics: dict, names: Sequence[str] | None = None) -> str:
    """The table in Markdown, with the best of each column in bold; below it the best solvers and the sample counts."""
    names = _names(metrics, names)
    columns = _columns(metrics, names)
    head = ["", *(f"{metric}{arrow(metric)}, {nfe} NFE" for metric, nfe in columns)]
    body = []
    for row, cells in _cells(metrics, names).items():
        body.append([row, *(f"**{text}**" if top else text for text, top in cells)])
    text = markdown_table(head, body, "l" + "r" * len(columns))
    won = [
        f"{metric} at {nfe} NFE {metrics['solvers'][nfe][metric]}"
        for metric, nfe in columns
        if metric in metrics.get("solvers", {}).get(nfe, {})
    ]
    text += f"\nBest distill solver: {'; '.join(won)}.\n" if won else ""
    counts = sample_counts(metrics.get("about", {}))
    return text + (f"\n{counts}\n" if counts else "")


def _keys(scores: Scores) -> dict[str, dict[str, float]]:
    return {str(nfe): dict(values) for nfe, values in scores.items()}


def _names(metrics: dict, names: Sequence[str] | None) -> list[str]:
    """Metrics to show, in the order in which rows have them; `BadInput` for a metric that no row has."""
    seen = list(dict.fromkeys(m for row in rows(metrics).values() for values in row.values() for m in values))
    for name in names or ():
        if name not in seen:
            raise BadInput(f"metric '{name}' was not measured; there are {', '.join(seen)}.{suggest(name, seen)}")
    return list(names or seen)


def _columns(metrics: dict, names: Sequence[str]) -> list[tuple[str, str]]:
    """(metric, nfe) pairs that at least one row has, metric by metric, NFE ascending."""
    found = rows(metrics).values()
    counts = sorted({nfe for row in found for nfe in row}, key=int)
    return [(m, n) for m in names for n in counts if any(m in row.get(n, {}) for row in found)]


def _cells(metrics: dict, names: Sequence[str]) -> dict[str, list[tuple[str, bool]]]:
    """Text of each cell, and whether it is the best of its column; with a single value none is."""
    out: dict[str, list[tuple[str, bool]]] = {row: [] for row in rows(metrics)}
    for metric, nfe in _columns(metrics, names):
        column = {row: values.get(nfe, {}).get(metric, math.nan) for row, values in rows(metrics).items()}
        column = {row: math.nan if value is None else value for row, value in column.items()}
        for row, value in column.items():
            top = best(metric, value, list(column.values()))
            out[row].append((f"{value:.3g}" if math.isfinite(value) else "–", top))
    return out


def _finite(value):
    """NaN and infinity as null, since JSON cannot represent them."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
