"""metrics.csv widens and forgets steps that were undone; alarms.jsonl too; validations are read back."""

from __future__ import annotations

import csv
import json

from distill.training import records
from distill.training.alarms import Alarm


def read(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_new_columns_widen_the_file_and_keep_the_rows(tmp_path):
    out = records.MetricsFile(tmp_path / "m.csv")
    out.write({"a": 1.5}, 1)
    out.write({"b": 2.5}, 2)
    out.write({"a": 3.5, "b": 4.5}, 3)
    assert read(tmp_path / "m.csv") == [
        {"step": "1", "a": "1.5", "b": ""},
        {"step": "2", "a": "", "b": "2.5"},
        {"step": "3", "a": "3.5", "b": "4.5"},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["m.csv"]


def test_a_resumed_file_goes_on_and_drops_what_was_done_in_vain(tmp_path):
    path = tmp_path / "m.csv"
    out = records.MetricsFile(path)
    for step in range(5):
        out.write({"a": step}, step)
    with open(path, "a") as file:
        file.write("7")  # the process died while it wrote this row
    again = records.MetricsFile(path, until=3)
    again.write({"a": 40, "b": 1}, 4)
    assert [(r["step"], r["a"]) for r in read(path)] == [("0", "0"), ("1", "1"), ("2", "2"), ("3", "3"), ("4", "40")]
    assert (
        records.MetricsFile(path).columns == ["step", "a", "b"] and read(path) == []
    )  # started anew: from before step 0


def test_alarms_are_lines_and_those_of_undone_steps_go(tmp_path):
    path = tmp_path / "alarms.jsonl"
    out = records.AlarmFile(path)
    assert not path.exists()
    for step in (2, 4, 6):
        out.alarm(Alarm(step, "collapse", "it does"))
    with open(path, "a") as file:
        file.write('{"step": 7')  # the process died here
    records.AlarmFile(path, until=4)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": s, "kind": "collapse", "message": "it does"} for s in (2, 4)
    ]
    out.back(2)
    assert len(path.read_text().splitlines()) == 1


def test_history_has_the_validations_alone(tmp_path):
    out = records.MetricsFile(tmp_path / "metrics.csv")
    assert records.history(tmp_path / "none") == []
    out.write({"validation/fd": 0.1 + 0.2, "validation/teacher@4/fd": 1.0}, 0)
    out.write({"student/loss": 3.0}, 1)
    out.write({"validation/fd": 0.2}, 2)
    assert records.history(tmp_path) == [{"step": 0, "fd": 0.1 + 0.2, "teacher@4/fd": 1.0}, {"step": 2, "fd": 0.2}]
    assert records.history(tmp_path, until=1)[-1]["step"] == 0
