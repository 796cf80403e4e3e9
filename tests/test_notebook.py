"""The example notebook runs from top to bottom, its student beats the teacher at equal steps, and no outputs are stored."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_student.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_stored_without_outputs(cells):
    code = [c for c in cells if c["cell_type"] == "code"]
    assert code and all(c["outputs"] == [] and c["execution_count"] is None for c in code)


def test_the_notebook_runs_and_its_student_beats_the_teacher_at_equal_steps(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict = {"__name__": "__notebook__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}[{number}]", "exec"), names)
    energy = names["energy"]
    assert energy["student, 4 steps"] < 0.5 * energy["teacher, 4 steps"]
    assert (tmp_path / "pictures" / "first_student.png").stat().st_size > 10_000
