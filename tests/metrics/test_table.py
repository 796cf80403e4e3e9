from __future__ import annotations

import io
import json
import math
import os
import stat

import pytest
from rich.console import Console

from distill.errors import BadInput
from distill.metrics import table

TEACHER = {50: {"fd": 0.5, "recall": 0.9, "nll_gap": 0.01}}
FREE = {
    4: {
        "ddim/uniform": {"fd": 9.0, "recall": 0.7, "nll_gap": -0.3},
        "dpmpp_2m/karras": {"fd": 4.0, "recall": 0.6, "nll_gap": 0.2},
        "heun/uniform": {"fd": math.nan, "recall": math.nan},
    },
    1: {"ddim/uniform": {"fd": 40.0, "recall": 0.0}},
    2: {},
}
STUDENT = {4: {"fd": 1.23456, "recall": 0.65, "nll_gap": 0.1}}


@pytest.fixture
def run():
    return table.build(TEACHER, FREE, STUDENT)


def show(run, width, **kw):
    out = io.StringIO()
    table.show(run, console=Console(file=out, width=width, force_terminal=False), **kw)
    return out.getvalue()


def test_the_best_training_free_solver_is_chosen_metric_by_metric(run):
    assert run["training_free"]["4"] == {"fd": 4.0, "recall": 0.7, "nll_gap": 0.2}
    assert run["solvers"]["4"] == {"fd": "dpmpp_2m/karras", "recall": "ddim/uniform", "nll_gap": "dpmpp_2m/karras"}
    assert run["training_free"]["2"] == {}
    assert run["every_solver"]["4"]["ddim/uniform"]["fd"] == 9.0
    assert run["teacher"] == {"50": TEACHER[50]} and run["student"] == {"4": STUDENT[4]}


@pytest.mark.parametrize("names", [("heun/uniform", "ddim/uniform"), ("ddim/uniform", "heun/uniform")])
def test_a_solver_that_diverged_never_wins_in_any_order(names):
    run = table.build({}, {4: {name: FREE[4][name] for name in names}}, {})
    assert run["solvers"]["4"]["fd"] == "ddim/uniform"


def test_what_is_better():
    assert table.better("fd", 1.0, 2.0) and not table.better("fd", 1.0, 1.0)
    assert table.better("accuracy", 0.9, 0.8) and not table.better("recall", 0.1, 0.2)
    assert table.better("nll_gap", -0.1, 0.2) and table.better("nll_gap", 0.1, -0.2)
    assert table.better("fd", 1e9, math.nan) and table.better("recall", 0.0, math.inf)
    assert not table.better("fd", math.nan, math.nan) and not table.better("fd", -math.inf, 0.0)
    assert [table.arrow(m) for m in ("clip_score", "nll_gap", "std", "fd")] == [" ↑", " →0", "", " ↓"]


def test_what_only_describes_wins_nothing():
    run = table.build(
        {4: {"mean": 0.1, "fd": 1.0}}, {4: {"ddim": {"mean": 0.2, "fd": 2.0}}}, {4: {"mean": 0.3, "fd": 3.0}}
    )
    assert run["training_free"] == {"4": {"fd": 2.0}}
    assert "| mean, 4 NFE | fd ↓, 4 NFE |" in table.markdown(run) and "0.1 | **1** |" in table.markdown(run)


def test_markdown(run):
    text = """\
|  | fd ↓, 1 NFE | fd ↓, 4 NFE | fd ↓, 50 NFE | recall ↑, 1 NFE | recall ↑, 4 NFE | recall ↑, 50 NFE |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| teacher | – | – | 0.5 | – | – | 0.9 |
| best distill solver | 40 | 4 | – | 0 | **0.7** | – |
| student | – | **1.23** | – | – | 0.65 | – |

Best distill solver: fd at 1 NFE ddim/uniform; fd at 4 NFE dpmpp_2m/karras; recall at 1 NFE ddim/uniform; \
recall at 4 NFE ddim/uniform.
"""
    assert table.markdown(run, ["fd", "recall"]) == text


def test_columns_are_in_order_of_cost():
    run = table.build({50: {"fd": 1.0}, 8: {"fd": 2.0}}, {}, {1: {"fd": 3.0}})
    assert table.markdown(run).splitlines()[0] == "|  | fd ↓, 1 NFE | fd ↓, 8 NFE | fd ↓, 50 NFE |"


def test_the_printed_table_holds_all_numbers_at_every_width(run):
    whole, narrow, small = (show(run, width, title="Digits") for width in (200, 60, 48))
    for text in (whole, narrow, small):
        assert text.startswith("Digits")
        for cell in (
            "teacher",
            "best distill solver",
            "student",
            "1.23",
            "0.65",
            "fd ↓",
            "recall ↑",
            "nll_gap →0",
            "50",
        ):
            assert cell in text
        assert "…" not in text
    assert "50 NFE" in whole and whole.count("student") == 1
    assert narrow.count("student") == 1 and max(map(len, narrow.splitlines())) <= 60  # one row of its 4 evaluations
    assert small.count("student") == 2 and max(map(len, small.splitlines())) <= 48  # two tables
    assert "recall" not in show(run, 200, names=["fd"])


def test_the_table_of_a_run_with_many_metrics_is_whole_in_80_columns():
    names = ("fd", "accuracy", "mmd", "precision", "recall", "clip_score", "fd_dinov2")
    scores = {nfe: {name: 1.2345 + nfe for name in names} for nfe in (1, 2, 4, 8, 16, 50)}
    text = show(table.build(scores, {}, scores), 80)
    assert "…" not in text and text.count("51.2") == 2 * len(names) and max(map(len, text.splitlines())) <= 80


def test_what_no_better_is_known_of_is_printed_only_when_it_is_named():
    run = table.build({4: {"mean": 0.1, "std": 1.0, "latent_fd": 2.0}}, {}, {})
    assert "mean" not in show(run, 80) and "latent_fd" in show(run, 80)
    assert "mean" in show(run, 80, names=["mean"]) and "mean" in show(table.build({4: {"mean": 0.1}}, {}, {}), 80)


def test_the_best_of_a_column_is_bold_on_a_terminal(run):
    out = io.StringIO()
    table.show(run, ["fd"], Console(file=out, width=200, force_terminal=True))
    assert "\x1b[1m1.23\x1b[0m" in out.getvalue() and "\x1b[1m0.5\x1b[0m" not in out.getvalue()


def test_an_empty_run_prints(run):
    assert "teacher" in show(table.build({}, {}, {}), 80) and "| student |" in table.markdown(table.build({}, {}, {}))


def test_a_metric_that_was_not_measured_is_refused(run):
    with pytest.raises(BadInput, match="Did you mean 'recall'"):
        table.markdown(run, ["recal"])


def test_metrics_json_comes_back_equal_with_nan_as_null(run, tmp_path):
    path = table.write(run, tmp_path / "new" / "metrics.json")
    text = path.read_text()
    assert "NaN" not in text and stat.S_IMODE(path.stat().st_mode) == 0o644
    back = table.read(path)
    assert back["every_solver"]["4"]["heun/uniform"]["fd"] is None
    assert table.rows(back) == table.rows(run) and back["solvers"] == run["solvers"]
    assert table.markdown(back) == table.markdown(run) and show(back, 80) == show(run, 80)
    odd = table.write({"student": {}, "extra": [math.inf, 1.0, "x"]}, tmp_path / "odd.json")
    assert table.read(odd)["extra"] == [None, 1.0, "x"]
    assert table.markdown({"student": {"4": {"fd": None}}}).splitlines()[2] == "| student | – |"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(run, tmp_path, monkeypatch, broken):
    path = table.write({"student": {}}, tmp_path / "metrics.json")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space"):
        table.write(run, path)
    assert json.loads(path.read_text()) == {"student": {}}
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_read_refuses_what_is_no_metrics_file(tmp_path):
    for text in (None, "{", "[]", "{}"):
        path = tmp_path / "metrics.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(BadInput, match="metrics.json"):
            table.read(path)


def test_tables_state_the_number_of_samples(run):
    """On the console, in Markdown, and for an evaluation of an older version without the reference's size."""
    about = {"samples": 4000, "reference": 360}
    assert "4,000 samples per row, against 360 reference samples." in show(run | {"about": about}, 200)
    assert "4,000 samples per row.\n" in table.markdown(run | {"about": {"samples": 4000}})
    assert "samples per row" not in show(run, 200) + table.markdown(run)


def test_the_old_name_of_the_distance_of_two_splits_is_read(run, tmp_path):
    table.write(run | {"floor": {"fd": 0.1}}, tmp_path / "metrics.json")
    assert table.read(tmp_path / "metrics.json")["reference_vs_holdout"] == {"fd": 0.1}
