r"""Reference curves of a recipe: the range of each curve and metric over several seeds, and where a run falls outside.

A curve is the median of its rows in each of 20 windows of the run. Over the recorded seeds

    range = mean +- max(REACH s, margin)      s = the larger of the window's and the curve's pooled standard deviation

Losses and gradient norms: in logarithms if all values are positive, REACH 4, margin 10 %. Validation metrics and metrics
of the finished run: relative deviations pooled, REACH 8, margin 25 % of the mean, because a metric has no windows to pool
over. Shares of samples (accuracy, precision, recall): margin 25 % of their distance from 0 or 1. Distances to the
distribution of a toy: margin at least the distance of two draws of it. For metrics only the worse side counts.

Three seeds do not determine a tail, so the ranges are wide, and one window in ten (at least one) may be outside; without
this tolerance every second run with a fourth seed would be outside. The ranges detect failed runs, not differences of a
few per cent.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import config
from distill.config import recipes
from distill.config.schema import Optim
from distill.errors import BadInput
from distill.files import read_json, write_text
from distill.inspect.measure import measure, toy_scores
from distill.metrics import table
from distill.training import run_folder
from distill.training.experiment import Experiment
from distill.training.load import load_experiment
from distill.training.records import read_metrics

FOLDER = "curves"  # beside the recipes
WINDOWS, LEAST = 20, 3  # of a curve; seeds
CURVES, METRICS = (4.0, 0.10), (8.0, 0.25)  # (REACH, margin)
SPARED = 10  # one window in so many may lie outside
LOGGED, VALIDATION = ("/loss", "/grad_norm"), "validation/"
Curve = dict[int, float]  # last step of a window -> median


@dataclass(frozen=True)
class Departure:
    """The first place where a run is outside a range, and the number of windows outside."""

    name: str
    step: int | None  # None: a metric of the finished run
    value: float
    low: float
    high: float
    windows: int = 1
    of: int = 1

    def __str__(self) -> str:
        side = "above" if self.value > self.high else "below" if self.value < self.low else "not a number, outside"
        where = f" at step {self.step}" if self.step is not None else ""
        often = f"; outside in {self.windows} of {self.of} windows" if self.of > 1 else ""
        return f"{self.name}{where}: {self.value:.4g}, {side} the range {self.low:.4g} to {self.high:.4g}{often}"


def curves_path(recipe: Path) -> Path:
    """The file of a recipe's reference curves: `curves/NAME.json` beside it."""
    return Path(recipe).parent / FOLDER / f"{Path(recipe).stem}.json"


def read_reference(recipe: Path) -> dict[str, Any] | None:
    """A recipe's reference curves; None if none were recorded.

    Raises:
        BadInput: the file is damaged, or the recipe has changed since.
    """
    path, again = curves_path(recipe), "record it again by `distill compare --record`"
    if not path.exists():
        return None
    reference = read_json(path, again)
    missing = {"recipe", "seeds", "curves", "metrics"} - set(reference if isinstance(reference, dict) else ())
    if missing:
        raise BadInput(f"{path} holds no reference curves ({', '.join(sorted(missing))} missing); {again}.")
    if reference["recipe"] != recipe_fingerprint(config.load([recipe])):
        raise BadInput(f"{path} was recorded for another version of {recipes.shown(recipe)}; {again}.")
    return reference


def recipe_fingerprint(cfg: Any) -> str:
    """A digest of the settings that determine a recipe's curves: roles, method, data, optimizers, steps."""
    return config.fingerprint(_deciding(cfg))


def _deciding(cfg: Any) -> dict[str, Any]:
    """The settings that determine a recipe's curves, by dotted key; without paths, names and seeds."""
    whole = config.plain(cfg)
    default = vars(Optim())  # left out, so that a key that optimizers gain later changes no recipe
    optim = {}
    for role, settings in whole["optim"].items():
        optim[role] = {k: v for k, v in settings.items() if v != default.get(k)}
    flat = dict(_leaves({k: whole[k] for k in ("roles", "method", "data")} | {"optim": optim}))
    return flat | {"train.steps": whole["train"]["steps"], "engine.accumulate": whole["engine"]["accumulate"]}


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for name, inner in node.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif key.rpartition(".")[2] == config.TARGET and str(node).startswith("distill."):
        yield key, str(node).rpartition(".")[2]  # a class is the same wherever its module lies
    elif key.rpartition(".")[2] != "path":
        yield key, node


# -- curves of a run -----------------------------------------------------------------------------------------------


def window_medians(rows: Sequence[Mapping[str, float]], steps: int) -> dict[str, Curve]:
    """Name -> {last step of a window: median of its rows} of losses, gradient norms and validation; step 0 by itself."""
    width, cells = max(math.ceil(steps / WINDOWS), 1), {}
    for row in rows:
        end = math.ceil(row["step"] / width) * width
        for name, value in row.items():
            if name.endswith(LOGGED) or (name.startswith(VALIDATION) and name.count("/") == 1):
                cells.setdefault(name, {}).setdefault(min(end, steps), []).append(value)
    return {name: {end: statistics.median(v) for end, v in windows.items()} for name, windows in cells.items()}


def final_metrics(experiment: Experiment, folder: Path) -> dict[str, float]:
    """The metrics of a finished run: a toy's exact ones; of images those of the student at its own K, measured if
    metrics.json does not have them."""
    if experiment.suite().oracle is not None:
        return toy_scores(experiment)
    steps, file = experiment.method.grid.steps, Path(folder) / run_folder.METRICS
    metrics = table.read(file) if file.exists() else measure(experiment, evaluations=(steps,), every_solver=())[0]
    row = metrics.get("student") or metrics["teacher"]
    if str(steps) not in row:
        raise BadInput(f"{file} has no row at {steps} evaluations; measure the run again by `distill eval {folder}`.")
    return {k: v for k, v in row[str(steps)].items() if v is not None}


# -- record --------------------------------------------------------------------------------------------------------


def record_curves(folders: Sequence[Path], recipe: Path, allow: tuple[str, ...] = ()) -> Path:
    """Write the reference curves of `recipe` from finished runs of it with different seeds.

    Raises:
        BadInput: fewer than three runs, a seed twice, a run that is not finished or not of this recipe.
    """
    cfg, folders = config.load([recipe]), [Path(f) for f in folders]
    seeds = _seeds(folders, recipe, cfg)
    medians, metrics, floor = [], [], {}
    for folder in folders:
        experiment = load_experiment(folder, allow)
        if experiment.method.step < cfg.train.steps:
            raise BadInput(
                f"{folder} has done {experiment.method.step} of {cfg.train.steps} steps; finish it by --resume."
            )
        suite = experiment.suite()
        floor = (
            suite.reference_vs_holdout() if suite.oracle is not None else {}
        )  # two small splits of real data may lie far apart
        names = {suite.headline, *cfg.expect, *table.HIGHER}  # the collapse indicators are left to the alarms
        medians.append(_chosen(window_medians(read_metrics(folder), cfg.train.steps), names))
        metrics.append({k: v for k, v in final_metrics(experiment, folder).items() if k in names})
    shared = [k for k in metrics[0] if all(k in m for m in metrics)]
    reference = {
        "recipe": recipe_fingerprint(cfg),
        "steps": cfg.train.steps,
        "seeds": seeds,
        "curves": _curve_ranges(medians, floor),
        "metrics": {k: _metric_ranges([[m[k] for m in metrics]], k, floor.get(k, 0.0))[0] for k in shared},
    }
    path = curves_path(recipe)
    path.parent.mkdir(exist_ok=True)
    write_text(path, _compact(reference))
    return path


def _seeds(folders: Sequence[Path], recipe: Path, cfg: Any) -> list[int]:
    """The seeds of the runs to record, which must be runs of the recipe with different seeds."""
    if len(folders) < LEAST:
        raise BadInput(f"{len(folders)} runs are too few to record; give at least {LEAST}, each with its own seed.")
    seeds: list[int] = []
    for folder in folders:
        run = run_folder.read_config(folder)
        if differing := differences(run, cfg):
            raise BadInput(
                f"{folder} is not a run of {recipes.shown(recipe)}: {differing[0]}; record runs that change nothing but seed."
            )
        if run.seed in seeds:
            raise BadInput(f"{folder} has seed {run.seed}, as another run has; give each run its own seed.")
        seeds.append(run.seed)
    return seeds


def _chosen(medians: Mapping[str, Curve], metrics: set[str]) -> dict[str, Curve]:
    """Losses and gradient norms, and of validation the named metrics."""
    chosen = {}
    for name, curve in medians.items():
        if not name.startswith(VALIDATION) or name.removeprefix(VALIDATION) in metrics:
            chosen[name] = curve
    return chosen


def _curve_ranges(
    medians: Sequence[Mapping[str, Curve]], floor: Mapping[str, float]
) -> dict[str, dict[str, list[float]]]:
    """The range of every curve that all seeds have, in the windows that all seeds have."""
    out = {}
    for name in (n for n in medians[0] if all(n in run for run in medians)):
        ends = sorted(set.intersection(*(set(run[name]) for run in medians)))
        columns = [[run[name][end] for run in medians] for end in ends]
        metric = name.removeprefix(VALIDATION)
        least = 2 * floor.get(metric, 0.0)  # validation has fewer samples, and so more noise
        measured = name.startswith(VALIDATION)
        ranges = _metric_ranges(columns, metric, least) if measured else _loss_ranges(columns)
        out[name] = {"step": ends, "low": [low for low, _ in ranges], "high": [high for _, high in ranges]}
    return out


def _loss_ranges(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """[low, high] of each window of a loss or norm, given as the values of all seeds."""
    log = all(v > 0 for column in columns for v in column)
    columns = [[math.log(v) for v in c] for c in columns] if log else columns
    pooled, (reach, margin) = math.sqrt(statistics.fmean(map(statistics.variance, columns))), CURVES
    out = []
    for column in columns:
        mean, spread = statistics.fmean(column), max(statistics.stdev(column), pooled)
        half = max(reach * spread, math.log1p(margin) if log else margin * abs(mean))
        out.append([_short(math.exp(e) if log else e) for e in (mean - half, mean + half)])
    return out


def _metric_ranges(columns: Sequence[Sequence[float]], metric: str = "", least: float = 0.0) -> list[list[float]]:
    """[low, high] of each measurement of one metric, at least `least` around its mean."""
    relative = [statistics.variance(c) / statistics.fmean(c) ** 2 if statistics.fmean(c) else 0.0 for c in columns]
    pooled, (reach, margin) = math.sqrt(statistics.fmean(relative)), METRICS
    out = []
    for column in columns:
        mean, top = statistics.fmean(column), 1.0 if metric in table.HIGHER else math.inf
        room = min(abs(mean), max(top - mean, 0.1))
        half = max(reach * max(statistics.stdev(column), pooled * abs(mean)), margin * room, abs(least))
        out.append([_short(mean - half), _short(min(mean + half, top))])
    return out


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _compact(whole: dict[str, Any]) -> str:
    """JSON with one line a list, so that a change of a curve can be read."""
    lists: list[str] = []

    def hide(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: hide(v) for k, v in node.items()}
        if isinstance(node, list):
            lists.append(json.dumps(node))
            return f"@{len(lists) - 1}@"
        return node

    text = json.dumps(hide(whole), indent=2)
    for i, line in enumerate(lists):
        text = text.replace(f'"@{i}@"', line)
    return text + "\n"


# -- compare -------------------------------------------------------------------------------------------------------


def compare_run(
    folder: Path, recipe: Path, allow: tuple[str, ...] = (), metrics: Mapping[str, float] | None = None
) -> tuple[list[Departure], list[str]]:
    """Where the run in `folder` is outside the reference curves and metrics of `recipe`, and notes on the comparison.

    Args:
        metrics: the run's metrics, if they are known; a finished run is measured otherwise.

    Raises:
        BadInput: no run, no recipe, a recipe with neither reference curves nor `expect`, or a run that shares no curve
            with the recipe and is not finished, so that nothing can be compared.
    """
    folder, cfg, reference = Path(folder), config.load([recipe]), read_reference(recipe)
    if reference is None and not cfg.expect:
        raise BadInput(
            f"{recipes.shown(recipe)} has no reference curves and no `expect`. Record some from three "
            "runs with `distill compare --record`."
        )
    notes = [f"differs from the recipe: {text}" for text in differences(run_folder.read_config(folder), cfg)]
    rows, ranges = read_metrics(folder), reference["curves"] if reference else {}
    done = int(max((row["step"] for row in rows), default=0))
    medians = window_medians(rows, cfg.train.steps)
    departures = out_of_range(medians, ranges)
    if reference is None:
        notes.append(f"no curves of {recipes.shown(recipe)} are recorded: only what it expects is compared")
    finished, shared = (
        done >= cfg.train.steps,
        [n for n, c in ranges.items() if set(medians.get(n, ())) & set(c["step"])],
    )
    if not shared and not (finished and (cfg.expect or reference["metrics"])):
        raise BadInput(
            f"{folder} has nothing to compare with {recipes.shown(recipe)}: {done} of {cfg.train.steps} steps are logged, and "
            "none of the recipe's curves; finish the run by --resume, or wait for its first rows."
        )
    if not finished:
        return departures, [*notes, f"{done} of {cfg.train.steps} steps: metrics are compared when the run is finished"]
    metrics = final_metrics(load_experiment(folder, allow), folder) if metrics is None else metrics
    return departures + metrics_out_of_range(metrics, reference["metrics"] if reference else {}, cfg.expect), notes


def out_of_range(medians: Mapping[str, Curve], ranges: Mapping[str, Mapping[str, list[float]]]) -> list[Departure]:
    """One departure for each curve that is outside its range in more than one window in ten; windows that the run has
    not reached or not logged do not count."""
    departures = []
    for name, curve in ranges.items():
        run, windows = medians.get(name, {}), []
        for end, low, high in zip(curve["step"], curve["low"], curve["high"]):
            if end in run:
                windows.append((end, run[end], low, high))
        bad = [window for window in windows if not _within(name, *window[1:])]
        if len(bad) > max(1, len(windows) // SPARED) or any(not math.isfinite(window[1]) for window in bad):
            departures.append(Departure(name, *bad[0], windows=len(bad), of=len(windows)))
    return departures


def metrics_out_of_range(
    metrics: Mapping[str, float], ranges: Mapping[str, Sequence[float]], expect: Mapping[str, float]
) -> list[Departure]:
    """Metrics on the worse side of their range or of what the recipe expects."""
    departures = []
    for name in dict.fromkeys([*ranges, *expect]):
        low, high = ranges.get(name, (-math.inf, math.inf))
        if name in expect:
            low, high = (max(low, expect[name]), high) if table.higher(name) else (low, min(high, expect[name]))
        value = metrics.get(name, math.nan)
        if not _within(VALIDATION + name, value, low, high):
            departures.append(Departure(name, None, value, low, high))
    return departures


def _within(name: str, value: float, low: float, high: float) -> bool:
    """Both sides count of losses and gradient norms, the worse side of metrics."""
    metric = name.removeprefix(VALIDATION)
    if metric == name or metric in table.SIGNED:
        return low <= value <= high
    return low <= value if table.higher(metric) else value <= high


def differences(cfg: Any, recipe: Any) -> list[str]:
    """Keys that decide the curves and differ between a run's config and a recipe."""
    a, b = _deciding(cfg), _deciding(recipe)
    return [f"{k} is {a.get(k)}, there {b.get(k)}" for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
