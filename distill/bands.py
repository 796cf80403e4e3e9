r"""The band of a recipe: where its curves and metrics lie over several seeds, and where a run leaves it.

A curve is read in windows of a twentieth of the run, by the median of the rows in each. Over the recorded seeds

    band = mean +- max(REACH s, margin)      s = the larger of the window's own and the curve's pooled deviation

For losses and gradient norms in logarithms, where all are positive, with REACH 4 and a margin of 10 %; for validation and
the metrics of the finished run as they are, relative deviations pooled, with REACH 8 and 25 % of the mean, because a metric
has no windows to pool over. Shares of samples (accuracy, precision, recall) have a margin of 25 % of what they are from 0
or 1, distances to a toy's law not less than two draws of it have between them. Of metrics only the worse side counts. Three
seeds say little of a tail, so the bands are wide, and one window in ten (one at least) may lie outside, as in every second run of
a fourth seed. Bands are for runs that went wrong, not for the second digit.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill import config, run
from distill.engine import home
from distill.errors import BadInput
from distill.eval import table
from distill.schema import Optim
from distill.session import Session

WINDOWS, LEAST = 20, 3  # of a curve; seeds
CURVES, METRICS = (4.0, 0.10), (8.0, 0.25)  # (REACH, margin)
SPARED = 10  # one window in so many may lie outside
LOGGED, VALIDATION = ("/loss", "/grad_norm"), "validation/"
Curve = dict[int, float]  # last step of a window -> median


@dataclass(frozen=True)
class Departure:
    """Where a run leaves the band first, and how often."""

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
        return f"{self.name}{where}: {self.value:.4g}, {side} the band {self.low:.4g} to {self.high:.4g}{often}"


def path_of(recipe: Path) -> Path:
    """The file that keeps a recipe's band: `bands/NAME.json` beside it."""
    return Path(recipe).parent / "bands" / f"{Path(recipe).stem}.json"


def read(recipe: Path) -> dict[str, Any] | None:
    """A recipe's band, None where none was recorded.

    Raises:
        BadInput: the file is damaged, or the recipe has changed since.
    """
    path = path_of(recipe)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        found["recipe"], found["curves"], found["metrics"]  # noqa: B018
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is no band ({error}); record it again by distill compare --record.") from None
    if found["recipe"] != fingerprint(config.load([recipe])):
        raise BadInput(f"{path} was recorded for another version of {recipe}; record it again by distill compare --record.")
    return found


def fingerprint(cfg: Any) -> str:
    """Names what decides a recipe's curves: roles, method, data, optimisers, steps; no path, name or seed."""
    return config.fingerprint(OmegaConf.create(_essence(cfg)))


def _essence(cfg: Any) -> dict[str, Any]:
    whole = OmegaConf.to_container(cfg)
    default = vars(Optim())  # left out, so that a key that optimisers gain later changes no recipe
    optim = {role: {k: v for k, v in o.items() if v != default.get(k)} for role, o in whole["optim"].items()}
    flat = dict(_leaves({k: whole[k] for k in ("roles", "method", "data")} | {"optim": optim}))
    return flat | {"train.steps": whole["train"]["steps"], "engine.accumulate": whole["engine"]["accumulate"]}


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for name, inner in node.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif key.rpartition(".")[2] != "path":
        yield key, node


# -- what a run shows ----------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, float]]:
    """metrics.csv as numbers, without its empty cells."""
    path = Path(folder) / "metrics.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(file)]


def curves(found: Sequence[Mapping[str, float]], steps: int) -> dict[str, Curve]:
    """Name -> {last step of a window: median of its rows} of losses, gradient norms and validation; step 0 by itself."""
    width, cells = max(math.ceil(steps / WINDOWS), 1), {}
    for row in found:
        end = math.ceil(row["step"] / width) * width
        for name, value in row.items():
            if name.endswith(LOGGED) or (name.startswith(VALIDATION) and name.count("/") == 1):
                cells.setdefault(name, {}).setdefault(min(end, steps), []).append(value)
    return {name: {end: statistics.median(some) for end, some in cell.items()} for name, cell in cells.items()}


def scores(session: Session, folder: Path) -> dict[str, float]:
    """The metrics of a finished run: a toy's exact ones; of images those of the student at its own K, measured if
    metrics.json does not have them."""
    if hasattr(session.suite(), "oracle"):
        return run.toy_scores(session)
    steps, file = session.method.grid.steps, Path(folder) / home.METRICS
    found = table.read(file) if file.exists() else run.measure(session, evaluations=(steps,), training_free=())[0]
    row = found.get("student") or found["teacher"]
    if str(steps) not in row:
        raise BadInput(f"{file} has no row at {steps} evaluations; measure the run again by distill eval {folder}.")
    return {k: v for k, v in row[str(steps)].items() if v is not None}


# -- record --------------------------------------------------------------------------------------------------------


def record(folders: Sequence[Path], recipe: Path, allow: tuple[str, ...] = ()) -> Path:
    """Write the band of `recipe` from finished runs of it with different seeds.

    Raises:
        BadInput: fewer than three runs, a seed twice, a run that is not finished or not of this recipe.
    """
    cfg, folders = config.load([recipe]), [Path(f) for f in folders]
    if len(folders) < LEAST:
        raise BadInput(f"{len(folders)} runs are too few for a band; record at least {LEAST}, each with its own seed.")
    seeds: list[int] = []
    for folder in folders:
        own = home.config_of(folder)
        if differing := differences(own, cfg):
            raise BadInput(f"{folder} is not a run of {recipe}: {differing[0]}; record runs that change nothing but seed.")
        if own.seed in seeds:
            raise BadInput(f"{folder} has seed {own.seed}, as another run has; give each run its own seed.")
        seeds.append(own.seed)
    found, metrics, floor = [], [], {}
    for folder in folders:
        session = run.open_run(folder, allow)
        if session.method.step < cfg.train.steps:
            raise BadInput(f"{folder} has done {session.method.step} of {cfg.train.steps} steps; finish it by --resume.")
        tests = session.suite()
        floor = tests.floor() if hasattr(tests, "oracle") else {}  # two small splits of real data may lie far apart
        kept = {tests.headline, *cfg.expect, *table.HIGHER}  # what a run looks like besides is for its alarms
        drawn = curves(rows(folder), cfg.train.steps)
        found.append({n: c for n, c in drawn.items() if not n.startswith(VALIDATION) or n.removeprefix(VALIDATION) in kept})
        metrics.append({k: v for k, v in scores(session, folder).items() if k in kept})
    path = path_of(recipe)
    path.parent.mkdir(exist_ok=True)
    whole = {"recipe": fingerprint(cfg), "steps": cfg.train.steps, "seeds": seeds, "curves": _bands(found, floor)}
    shared = [k for k in metrics[0] if all(k in m for m in metrics)]
    whole["metrics"] = {k: _measured([[m[k] for m in metrics]], k, floor.get(k, 0.0))[0] for k in shared}
    staging = path.with_suffix(".writing")
    staging.write_text(_compact(whole))
    os.replace(staging, path)
    return path


def _bands(found: Sequence[Mapping[str, Curve]], floor: Mapping[str, float]) -> dict[str, dict[str, list[float]]]:
    out = {}
    for name in (n for n in found[0] if all(n in some for some in found)):
        ends = sorted(set.intersection(*(set(some[name]) for some in found)))
        columns = [[some[name][end] for some in found] for end in ends]
        metric = name.removeprefix(VALIDATION)
        least = 2 * floor.get(metric, 0.0)  # validation has fewer samples, and so more noise
        bands = _measured(columns, metric, least) if name.startswith(VALIDATION) else _logged(columns)
        out[name] = {"step": ends, "low": [low for low, _ in bands], "high": [high for _, high in bands]}
    return out


def _logged(columns: Sequence[Sequence[float]]) -> list[list[float]]:
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


def _measured(columns: Sequence[Sequence[float]], metric: str = "", least: float = 0.0) -> list[list[float]]:
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
    """JSON with one line a list, so that a change of a band can be read."""
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


def compare(folder: Path, recipe: Path, allow: tuple[str, ...] = (), found: Mapping[str, float] | None = None
            ) -> tuple[list[Departure], list[str]]:  # fmt: skip
    """Where the run in `folder` leaves what `recipe` promises, and remarks on what was compared.

    Args:
        found: the run's metrics, if they are known; a finished run is measured otherwise.

    Raises:
        BadInput: no run, no recipe, or a recipe with neither a band nor `expect`.
    """
    folder, cfg, band = Path(folder), config.load([recipe]), read(recipe)
    if band is None and not cfg.expect:
        raise BadInput(f"{recipe} has neither a band ({path_of(recipe)}) nor `expect`; record one by distill compare --record.")
    notes = [f"differs from the recipe: {text}" for text in differences(home.config_of(folder), cfg)]
    logged = rows(folder)
    done = int(max((row["step"] for row in logged), default=0))
    left = outside(curves(logged, cfg.train.steps), band["curves"]) if band else []
    notes += [] if band else [f"no curves of {recipe} are recorded: only what it expects is compared"]
    if done < cfg.train.steps:
        return left, [*notes, f"{done} of {cfg.train.steps} steps: metrics are compared when the run is finished"]
    found = scores(run.open_run(folder, allow), folder) if found is None else found
    return left + beyond(found, band["metrics"] if band else {}, cfg.expect), notes


def outside(found: Mapping[str, Curve], bands: Mapping[str, Mapping[str, list[float]]]) -> list[Departure]:
    """One departure a curve that leaves its band, in more than one window in ten; windows that the run has not reached or not
    logged do not count."""
    out = []
    for name, band in bands.items():
        seen = [(e, found[name][e], low, high) for e, low, high in zip(band["step"], band["low"], band["high"])
                if e in found.get(name, {})]  # fmt: skip
        bad = [item for item in seen if not _within(name, *item[1:])]
        if len(bad) > max(1, len(seen) // SPARED) or any(not math.isfinite(item[1]) for item in bad):
            out.append(Departure(name, *bad[0], windows=len(bad), of=len(seen)))
    return out


def beyond(found: Mapping[str, float], bands: Mapping[str, Sequence[float]], expect: Mapping[str, float]) -> list[Departure]:
    """Metrics on the worse side of their band or of what the recipe expects."""
    out = []
    for name in dict.fromkeys([*bands, *expect]):
        low, high = bands.get(name, (-math.inf, math.inf))
        if name in expect:
            low, high = (max(low, expect[name]), high) if table.higher(name) else (low, min(high, expect[name]))
        value = found.get(name, math.nan)
        if not _within(VALIDATION + name, value, low, high):
            out.append(Departure(name, None, value, low, high))
    return out


def _within(name: str, value: float, low: float, high: float) -> bool:
    """Both sides count of what is logged, the worse side of what is measured."""
    metric = name.removeprefix(VALIDATION)
    if metric == name or metric in table.SIGNED:
        return low <= value <= high
    return low <= value if table.higher(metric) else value <= high


def differences(cfg: Any, recipe: Any) -> list[str]:
    """Keys that decide the curves and differ between a run's config and a recipe."""
    a, b = _essence(cfg), _essence(recipe)
    return [f"{k} is {a.get(k)}, there {b.get(k)}" for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
