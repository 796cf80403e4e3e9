"""Where a run's numbers are kept in its folder: rows in `metrics.csv`, alarms in `alarms.jsonl`.

A sink has `write(row, step)` and what it can of `back(step)`, `picture(name, path, step, caption)`, `alarm(alarm)`,
`chart(name, steps, series)`, `table(name, columns, rows)`, `close()`.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CSV:
    """`metrics.csv`: rows with their step, appended; a new column rewrites the file with the union of columns.

    `until`: the step from which a run goes on; rows of later steps, done in vain by a process that died, are dropped.
    """

    def __init__(self, path: str | Path, until: int = -1):
        self.path = Path(path)
        self.columns: list[str] = []
        self.back(until)

    def back(self, until: int) -> None:
        """Drop the rows of later steps."""
        if self.path.exists():
            with open(self.path, newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or [])
                rows = [r for r in reader if str(r["step"]).isdigit() and int(r["step"]) <= until]
            self._rewrite(rows)

    def write(self, row: dict[str, Any], step: int) -> None:
        row = {"step": step, **row}
        new = [c for c in row if c not in self.columns]
        if new:
            self._widen(new)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _widen(self, new: list[str]) -> None:
        rows = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = list(csv.DictReader(file))
        self.columns = [*self.columns, *new]
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        def write(file):
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)

        replace(self.path, write)


class Alarms:
    """`alarms.jsonl`: one object an alarm, appended; absent while there was none. `until` as of CSV."""

    def __init__(self, path: str | Path, until: int = -1):
        self.path = Path(path)
        self.back(until)

    def back(self, until: int) -> None:
        """Drop the alarms of later steps."""
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines(True) if _step(line) <= until]
            replace(self.path, lambda file: file.writelines(kept))

    def write(self, row: dict[str, Any], step: int) -> None:
        """Rows are the CSV's."""

    def alarm(self, alarm: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(alarm._asdict()) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the process died while it wrote this line
        return math.inf


def replace(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file beside its place, then put it there: all of it, or nothing."""
    staging = path.with_suffix(".writing")
    with open(staging, "w", newline="") as file:
        write(file)
    os.replace(staging, path)


def history(folder: Path, until: float = math.inf) -> list[dict[str, float]]:
    """The validations in a run's `metrics.csv`, step by step: what each measured, without the prefix `validation/`."""
    path, found = folder / "metrics.csv", []
    if not path.exists():
        return found
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            values = {k.removeprefix("validation/"): float(v) for k, v in row.items()
                      if k and k.startswith("validation/") and v}  # fmt: skip
            if values and str(row["step"]).isdigit() and int(row["step"]) <= until:
                found.append({"step": int(row["step"])} | values)
    return found
