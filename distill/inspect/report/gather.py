"""Summaries of run folders for the report, read from their files without building any object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill import config
from distill.config.recipes import RECIPES
from distill.errors import BadInput
from distill.files import read_json
from distill.inspect import curves
from distill.metrics import table
from distill.training import checkpoints, run_folder
from distill.training.records import read_metrics

COST, ALARMS, MEASURED = "cost.json", "alarms.jsonl", "report.json"


@dataclass
class RunSummary:
    """What the report shows of a run."""

    folder: Path
    cfg: Any
    rows: list[dict[str, float]]  # metrics.csv
    manifest: Mapping[str, Any]
    metrics: dict[str, Any] | None = None  # metrics.json
    measured: dict[str, Any] = field(default_factory=dict)  # report.json
    cost: dict[str, Any] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    reference: dict[str, Any] | None = None  # curves of the recipe
    pictures: list[Path] = field(default_factory=list)  # PNG files, by `distill eval` and of the last validation

    @property
    def name(self) -> str:
        return str(self.folder.name if self.cfg.name == "run" else self.cfg.name)

    @property
    def method(self) -> str:
        return str(self.cfg.method[config.TARGET]).rpartition(".")[2]

    @property
    def steps(self) -> int:
        """The student's evaluations per sample."""
        grid = self.cfg.method.get("grid", 4)
        return len(grid) - 1 if hasattr(grid, "__len__") else int(grid)

    @property
    def step(self) -> int:
        """Training steps done."""
        return int(self.manifest.get("step") or max((row["step"] for row in self.rows), default=0))

    @property
    def seconds(self) -> float | None:
        """Seconds of training, from the logged rates; without validation and checkpoints."""
        logged = [(row["step"], row["steps_per_second"]) for row in self.rows if row.get("steps_per_second")]
        starts = [0, *(step for step, _ in logged)]
        return sum((step - start) / rate for start, (step, rate) in zip(starts, logged)) if logged else None

    @property
    def samples(self) -> int | None:
        """Samples seen in training, over all ranks."""
        size = self.cfg.data.get("batch_size")
        return size and self.step * int(size) * self.cfg.engine.accumulate * int(self.manifest.get("world") or 1)

    def scores(self, row: str) -> dict[int, dict[str, float]]:
        """{nfe: {metric: value}} of a row of metrics.json: teacher, student, training_free."""
        return {
            int(nfe): values
            for nfe, values in sorted((self.metrics or {}).get(row, {}).items(), key=lambda i: int(i[0]))
        }


def read(folder: Path) -> RunSummary:
    """The run in `folder`.

    Raises:
        BadInput: no run there, or a file of it is damaged.
    """
    folder = Path(folder)
    cfg, complete = run_folder.read_config(folder), checkpoints.complete(folder / run_folder.CHECKPOINTS)
    metrics = table.read(folder / run_folder.METRICS) if (folder / run_folder.METRICS).exists() else None
    return RunSummary(
        folder,
        cfg,
        read_metrics(folder),
        checkpoints.manifest(complete[-1]) if complete else {},
        metrics,
        json_of(folder / MEASURED),
        json_of(folder / COST),
        _alarms(folder / ALARMS),
        reference_of(cfg),
        pictures_of(folder),
    )


def json_of(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        return dict(read_json(path, "remove it; it is written again"))
    except (ValueError, TypeError):
        raise BadInput(f"{path} holds no JSON object; remove it; it is written again.") from None


def _alarms(path: Path) -> list[dict[str, Any]]:
    """The alarms of a file with one JSON object per line; an incomplete line of a killed run is skipped."""
    out = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            alarm = json.loads(line)
        except ValueError:
            continue
        if isinstance(alarm, dict) and {"step", "kind"} <= alarm.keys():
            message = alarm.get("message", alarm.get("said", ""))  # `said` in files of version 0.1.0
            out.append({key: value for key, value in alarm.items() if key != "said"} | {"message": message})
    return out


def reference_of(cfg: Any) -> dict[str, Any] | None:
    """The reference curves of the shipped recipe that a config follows; None if it follows none."""
    fingerprint = curves.recipe_fingerprint(cfg)
    for path in sorted(RECIPES.glob(f"*/{curves.FOLDER}/*.json")):
        reference = json_of(path)
        if reference.get("recipe") == fingerprint:
            return reference
    return None


def pictures_of(folder: Path) -> list[Path]:
    """The pictures in a run's folder: what `distill eval` drew, and the last validation's samples."""
    evaluated, validated = folder / "samples.png", sorted((folder / "samples").glob("step-*.png"))
    return [*([evaluated] if evaluated.exists() else []), *validated[-1:]]


def finite(value: Any) -> bool:
    """Whether a value is a number other than NaN and infinity."""
    return isinstance(value, (int, float)) and math.isfinite(value)
