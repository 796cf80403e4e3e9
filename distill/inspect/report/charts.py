"""Figures as plotly JSON: traces and axes; colours are CSS variable names that the page resolves by its theme."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from distill.inspect.report.gather import RunSummary, finite
from distill.metrics import table

Figure = dict[str, Any]
TITLES = {
    "fd": "Fréchet distance",
    "mmd": "MMD²",
    "precision": "Precision",
    "recall": "Recall",
    "accuracy": "Accuracy",
    "energy": "Energy distance",
    "nll_gap": "Gap of log-likelihood",
    "mode_kl": "KL of the mode masses",
}
COLOURS = ("student", "second", "third", "fourth", "fifth", "sixth")  # of runs, in the page's style
SHAPES = ("circle", "square", "diamond", "triangle-up", "x", "star")


def title(metric: str) -> str:
    """The title of a metric, with its better direction."""
    ends = {" ↑": ", higher is better", " →0": ", best at 0", "": "", " ↓": ", lower is better"}
    return TITLES.get(metric, metric) + ends[table.arrow(metric)]


def metrics_of(runs: Sequence[RunSummary]) -> list[str]:
    """Metrics that some student or teacher has, in the order measured."""
    rows = [values for run in runs for row in ("student", "teacher") for values in run.scores(row).values()]
    return list(dict.fromkeys(name for values in rows for name, value in values.items() if finite(value)))


# -- quality against cost ------------------------------------------------------------------------------------------


def quality(runs: Sequence[RunSummary], metric: str, cost: str) -> Figure:
    """A metric against "nfe" or "seconds" of students, teacher and the solvers of diffusers, the best of which form a line."""
    traces, solvers = [], {}
    for point in runs[0].measured.get("points", []):
        if point["kind"] == "stock":
            solvers.setdefault(point["who"], []).append((point[cost], point["scores"].get(metric), point["nfe"]))
    outside = _bound(runs, metric, [item[1] for points in solvers.values() for item in points])
    far = [
        f"{name} at {n}"
        for name, points in solvers.items()
        for _, value, n in points
        if finite(value) and outside(value)
    ]
    solvers = {
        name: [item for item in points if not (finite(item[1]) and outside(item[1]))]
        for name, points in solvers.items()
    }
    for name, points in solvers.items():
        traces.append(_line(name, points, "solver", width=1, size=5, group="solvers", opacity=0.75))
    best = _best_by_cost([item for points in solvers.values() for item in points], metric)
    if len(solvers) > 1:
        traces.append(_line("best diffusers solver", best, "solver", dash="dot", width=2, size=0, strong=True))
    for run, colour, shape in zip(runs, COLOURS * len(runs), SHAPES * len(runs)):
        rows, own = run.scores("teacher"), run is runs[0]
        if rows and (own or rows != runs[0].scores("teacher")):
            name = "teacher, DDIM" if own else f"teacher of {run.name}"
            traces.append(_line(name, _points(run, "teacher", metric, cost), "teacher", size=8))
        name = "student" if len(runs) == 1 else run.name
        own_points = _points(run, "student", metric, cost)
        traces.append(_line(name, own_points, colour, width=2.5, size=10, symbol=shape))
        traces[-1]["marker"]["size"] = [
            15 if nfe == run.steps else 8 for nfe in traces[-1]["customdata"]
        ]  # its own: large
    traces = [t for t in traces if t["x"]]
    x = "network evaluations per sample" if cost == "nfe" else "seconds for 1,000 samples"
    note = f"off the chart: {', '.join(far)}" if far else ""
    return {"data": traces, "layout": {"xaxis": _log(x), "yaxis": _scale(traces, title(metric)), "meta": note}}


def _bound(runs: Sequence[RunSummary], metric: str, solvers: Sequence[Any]) -> Callable[[float], bool]:
    """Whether a solver is left out because it would compress the axis: ten times worse than the others or the median."""
    if table.arrow(metric) != " ↓":
        return lambda value: False
    rows = [values.get(metric) for run in runs for row in ("teacher", "student") for values in run.scores(row).values()]
    known = [v for v in [*rows, statistics.median([v for v in solvers if finite(v)] or [0.0])] if finite(v)]
    return lambda value: value > 10 * max(known, default=math.inf)


def _points(run: RunSummary, row: str, metric: str, cost: str) -> list[tuple]:
    """(cost, value, nfe), with the seconds that were measured for this row at this number of evaluations.

    The teacher's row also takes stock DDIM, which is the same sampler, at further numbers of evaluations.
    """
    points, rows = run.measured.get("points", []), dict(run.scores(row))
    seconds = {p["nfe"]: p["seconds"] for p in points if p["kind"] == row}
    for point in points if row == "teacher" else ():
        if point["who"] in ("DDIM", "Flow Euler"):
            rows.setdefault(point["nfe"], point["scores"])
            seconds.setdefault(point["nfe"], point["seconds"])
    return [(nfe if cost == "nfe" else seconds.get(nfe), rows[nfe].get(metric), nfe) for nfe in sorted(rows)]


def _best_by_cost(points: list[tuple], metric: str) -> list[tuple]:
    """The points that are better than all cheaper ones."""
    out: list[tuple] = []
    for cost, value, nfe in sorted((f for f in points if finite(f[0]) and finite(f[1])), key=lambda f: (f[0], f[1])):
        if not out or table.better(metric, value, out[-1][1]):
            out = [*(out[:-1] if out and out[-1][0] == cost else out), (cost, value, nfe)]
    return out


def _line(
    name: str,
    points: list[tuple],
    colour: str,
    *,
    dash: str = "solid",
    width: float = 2,
    size: float = 7,
    symbol: str = "circle",
    group: str = "",
    opacity: float = 1.0,
    strong: bool = False,
) -> Figure:
    points = [(c, v, n) for c, v, n in points if finite(c) and finite(v)]
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if size else "lines",
        "name": name,
        "opacity": opacity,
        "x": [c for c, _, _ in points],
        "y": [v for _, v, _ in points],
        "customdata": [n for _, _, n in points],
        "line": {"color": f"var:{'solver-strong' if strong else colour}", "width": width, "dash": dash},
        "marker": {"color": f"var:{colour}", "size": size or 1, "symbol": symbol, "opacity": 1},
        "hovertemplate": f"<b>{name}</b><br>%{{customdata}} evaluations: %{{y:.4g}}<extra></extra>",
    }
    if not group:
        return trace
    return trace | {"legendgroup": group, "showlegend": False, "hoverlabel": {"namelength": -1}}


# -- curves --------------------------------------------------------------------------------------------------------


def validation(runs: Sequence[RunSummary], metric: str) -> Figure:
    """A metric by training step, with the teacher baseline and, of a single run, its recipe's range."""
    name, traces = f"validation/{metric}", []
    if len(runs) == 1:
        traces += _reference_range(runs[0], name)
    end = max((row["step"] for run in runs for row in run.rows), default=1)
    for who, value in _teacher(runs[0], metric).items():
        dash = "dash" if who == list(_teacher(runs[0], metric))[-1] else "dot"
        text = f"teacher at {who.partition('@')[2]} evaluations" if "@" in who else who
        trace = {"type": "scatter", "mode": "lines", "name": text, "x": [0, end], "y": [value, value]}
        hover = f"{text}: %{{y:.4g}}<extra></extra>"
        traces.append(trace | {"line": {"color": "var:teacher", "width": 1.5, "dash": dash}, "hovertemplate": hover})
    for run, colour, shape in zip(runs, COLOURS * len(runs), SHAPES * len(runs)):
        text = f"student at {run.steps}" if len(runs) == 1 else run.name
        traces.append(_curve(run, name, text, colour, "lines+markers", symbol=shape, width=2.5))
    traces = [t for t in traces if t["x"]]
    return {"data": traces, "layout": {"xaxis": {"title": "step"}, "yaxis": _scale(traces, title(metric))}}


def _teacher(run: RunSummary, metric: str) -> dict[str, float]:
    """The teacher baseline: as logged by the run, else as measured for the report, else from metrics.json."""
    logged = {
        name.split("/")[1]: row[name]
        for row in run.rows
        for name in row
        if name.startswith("validation/") and name.endswith(f"/{metric}") and name.count("/") == 2
    }
    stored = run.measured.get("teacher_baseline", run.measured.get("lines", {}))  # `lines` in files of older versions
    baseline = {who: values[metric] for who, values in stored.items() if finite(values.get(metric))}
    rows = {f"teacher@{n}": v[metric] for n, v in run.scores("teacher").items() if finite(v.get(metric))}
    last = {who: rows[who] for who in [f"teacher@{run.steps}", *list(rows)[-1:]] if who in rows}
    return logged or baseline or last


def training(runs: Sequence[RunSummary], ending: str, text: str) -> Figure:
    """What each role logs under `ending` (loss, grad_norm), by step."""
    traces = []
    for run, colour in zip(runs, COLOURS * len(runs)):
        names = list(
            dict.fromkeys(n for row in run.rows for n in row if n.endswith(f"/{ending}") and n.count("/") == 1)
        )
        for i, name in enumerate(sorted(names, key=lambda n: not n.startswith("student"))):
            role = name.partition("/")[0]
            shown = colour if len(runs) > 1 else COLOURS[i % len(COLOURS)]
            traces += _reference_range(run, name, shown) if len(runs) == 1 else []
            label = role if len(runs) == 1 else f"{run.name}, {role}"
            traces.append(_curve(run, name, label, shown, "lines", dash=("solid", "dash", "dot")[i % 3], width=1.8))
    traces = [t for t in traces if t["x"]]
    return {"data": traces, "layout": {"xaxis": {"title": "step"}, "yaxis": _scale(traces, text)}}


def _curve(
    run: RunSummary,
    name: str,
    label: str,
    colour: str,
    mode: str,
    *,
    symbol: str = "circle",
    dash: str = "solid",
    width: float = 2,
) -> Figure:
    points = [(row["step"], row[name]) for row in run.rows if finite(row.get(name))]
    return {
        "type": "scatter",
        "mode": mode,
        "name": label,
        "x": [s for s, _ in points],
        "y": [v for _, v in points],
        "line": {"color": f"var:{colour}", "width": width, "dash": dash},
        "marker": {"size": 8, "symbol": symbol},
        "hovertemplate": f"<b>{label}</b><br>step %{{x}}: %{{y:.4g}}<extra></extra>",
    }


def _reference_range(run: RunSummary, name: str, colour: str = "student") -> list[Figure]:
    """The range of the recipe's reference curves as an area."""
    curve = (run.reference or {}).get("curves", {}).get(name)
    if not curve:
        return []
    logged = [row[name] for row in run.rows if finite(row.get(name)) and row[name] > 0]
    floor = min([*logged, min(curve["high"])]) / 2  # a range may reach below 0, where a logarithmic axis has no place
    low = [max(v, floor) if floor > 0 and min(curve["low"]) <= 0 else v for v in curve["low"]]
    edge = {"type": "scatter", "mode": "lines", "x": curve["step"], "line": {"width": 0}, "hoverinfo": "skip"}
    area = {
        "fill": "tonexty",
        "fillcolor": f"var:{colour}-pale",
        "name": f"range of the recipe, {len(run.reference['seeds'])} seeds",
    }
    first = name.startswith("validation/") or name.startswith("student/")
    return [edge | {"y": low, "showlegend": False}, edge | {"y": curve["high"], "showlegend": first} | area]


# -- axes ----------------------------------------------------------------------------------------------------------


def _log(text: str) -> Figure:
    return {"type": "log", "title": text, "dtick": "D1" if text.startswith("seconds") else None}


def _scale(traces: Sequence[Figure], text: str) -> Figure:
    """A logarithmic axis where all values are positive and span more than a factor of three."""
    values = [v for trace in traces for v in trace["y"] if finite(v)]
    log = bool(values) and min(values) > 0 and max(values) > 3 * min(values)
    return {"title": text, "type": "log"} if log else {"title": text, "type": "linear"}
