"""The run folder's own logs: rows in `metrics.csv`, alarms in `alarms.jsonl`.

A logger has `write(row, step)`, and optionally `back(step)`, `picture(name, path, step, caption)`, `alarm(alarm)`,
`chart(name, steps, series)`, `table(name, columns, rows)`, `close()`.
"""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

from distill.errors import BadInput
from distill.files import read_csv, write_csv, write_text


class MetricsFile:
    """`metrics.csv`: rows are appended; a row with a new column rewrites the file with all columns.

    `until`: the step from which a run continues; rows of later steps, of a process that died, are dropped.
    Rows that the disk refuses are written with the next one.
    """

    def __init__(self, path: str | Path, until: int = -1):
        self.path = Path(path)
        self.columns: list[str] = []
        self.waiting: list[dict[str, Any]] = []
        self.back(until)

    def back(self, until: int) -> None:
        """Drop the rows of later steps."""
        self.waiting = [row for row in self.waiting if row["step"] <= until]
        if self.path.exists():
            rows = [r for r in read_csv(self.path) if str(r.get("step")).isdigit() and int(r["step"]) <= until]
            with open(self.path, newline="", encoding="utf-8") as file:
                self.columns = next(csv.reader(file), [])
            write_csv(self.path, self.columns, rows)

    def write(self, row: dict[str, Any], step: int) -> None:
        self.waiting.append({"step": step, **row})
        if new := [c for c in dict.fromkeys(c for row in self.waiting for c in row) if c not in self.columns]:
            self._widen(new)
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, restval="").writerows(self.waiting)
        except OSError:
            os.truncate(self.path, size)  # of half a row
            raise
        self.waiting = []

    def _widen(self, new: list[str]) -> None:
        columns = [*self.columns, *new]
        write_csv(self.path, columns, read_csv(self.path))
        self.columns = columns


class AlarmFile:
    """`alarms.jsonl`: one JSON object per alarm, appended; created at the first alarm. `until` as in MetricsFile."""

    def __init__(self, path: str | Path, until: int = -1):
        self.path = Path(path)
        self.back(until)

    def back(self, until: int) -> None:
        """Drop the alarms of later steps."""
        if self.path.exists():
            text = self.path.read_text(errors="replace")
            kept = [line for line in text.splitlines(True) if _step(line) <= until]
            write_text(self.path, "".join(kept))

    def write(self, row: dict[str, Any], step: int) -> None:
        """Ignored: rows are in metrics.csv."""

    def alarm(self, alarm: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(alarm._asdict()) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):  # damaged, or the process died while it wrote this line
        return math.inf


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's `metrics.csv` as numbers, including `step`, without empty cells; no rows if there is no file.

    Raises:
        BadInput: a cell is not a number.
    """
    path, rows = folder / "metrics.csv", []
    for line, row in enumerate(read_csv(path), start=2):
        try:
            values = {name: float(cell) for name, cell in row.items() if name and cell}
        except ValueError as error:
            raise BadInput(f"{path}: line {line} is damaged ({error}); remove that line.") from None
        if "step" in values:
            rows.append(values | {"step": int(values["step"])})
    return rows


def history(folder: Path, until: float = math.inf) -> list[dict[str, float]]:
    """The validations in a run's `metrics.csv` in order of steps, with names without the prefix `validation/`."""
    found = []
    for row in read_metrics(folder):
        values = {k.removeprefix("validation/"): v for k, v in row.items() if k.startswith("validation/")}
        if values and row["step"] <= until:
            found.append({"step": row["step"]} | values)
    return found
