"""What the page says is what was measured; a folder's files are read with care; nothing of another kind is overwritten."""

from __future__ import annotations

import base64
import copy
import csv
import json
import re

import pytest
import tiny

from distill import config
from distill.cli import main
from distill.errors import BadInput
from distill.inspect.report import charts, gather, page, report, tables
from distill.metrics import table

SCORES = {
    "teacher": {"2": {"energy": 0.4, "nll_gap": -0.3}, "50": {"energy": 0.02, "nll_gap": 0.1}},
    "training_free": {"2": {"energy": 0.3}},
    "student": {"2": {"energy": 0.01, "nll_gap": 0.2}},
    "solvers": {},
    "every_solver": {},
    "reference_vs_holdout": {"energy": 0.001},
    "about": {"samples": 4000, "step": 40, "machine": "a machine", "date": "2026-11-20"},
}


def point(who, kind, nfe, seconds, energy=None):
    return {"who": who, "kind": kind, "nfe": nfe, "seconds": seconds, "scores": {"energy": energy} if energy else {}}


POINTS = [
    point("teacher", "teacher", 2, 0.2),
    point("teacher", "teacher", 50, 5.0),
    point("student", "student", 2, 0.1),
    point("UniPC", "stock", 2, 0.3, 0.35),
    point("UniPC", "stock", 4, 0.5, 0.2),
    point("Heun", "stock", 3, 0.4, 0.9),
]


@pytest.fixture
def folder(tmp_path):
    """A run's folder as a run leaves it, but for the checkpoint."""
    where = tmp_path / "toy"
    where.mkdir()
    config.save(tiny.recipe(name="tdm"), where / "config.yaml")
    rows = [
        {"step": s, "student/loss": 1 / s, "critic/loss": 2 / s, "student/grad_norm": 0.5, "steps_per_second": 4.0}
        for s in (10, 20, 30, 40)
    ]
    rows.append({"step": 40, "validation/energy": 0.03, "validation/teacher@2/energy": 0.41})
    with open(where / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    table.write(SCORES, where / "metrics.json")
    table.write(
        {"points": POINTS, "teacher_baseline": {}, "machine": "CPU", "pictures": [], "kind": "none"},
        where / "report.json",
    )
    return where


def test_a_folder_is_read_as_numbers(folder):
    run = gather.read(folder)
    assert run.seconds == pytest.approx(40 / 4) and run.step == 40 and run.samples == 40 * 16
    assert run.scores("student") == {2: {"energy": 0.01, "nll_gap": 0.2}} and run.method == "TDM" and run.steps == 2


def test_the_tiles_say_what_was_measured(folder):
    found = tables.tiles(gather.read(folder))
    assert found[0] == ("0.01", "Energy distance, student at 2", "teacher at 50: 0.02")
    assert found[1].value == "0.5×" and "25× fewer" in found[1].beside
    assert found[1].what == "the teacher's distance at 50"
    assert found[2][:2] == (
        "0.3",
        "best distill solver, teacher at 2",
    )  # the best of ours at two evaluations is below UniPC's 0.35; Heun costs three
    assert found[3].value == "0.1 s" and found[3].beside == "teacher at 50: 5 s"
    assert found[4].value == "10 s"


def test_the_tables_have_every_number_and_mark_the_best(folder):
    energy, gap = tables.results(gather.read(folder))
    assert energy["nfes"] == [2, 3, 4, 50] and [row["who"] for row in energy["rows"]] == [
        "student",
        "teacher",
        "UniPC",
        "Heun",
    ]
    rows = {row["who"]: row for row in energy["rows"]}
    assert rows["student"]["cells"] == [("0.01", True), ("", False), ("", False), ("", False)]
    assert rows["UniPC"]["cells"] == [("0.35", False), ("", False), ("0.2", False), ("", False)]
    assert rows["student"]["seconds"] == "0.1" and rows["Heun"]["seconds"] == ""
    signed = {row["who"]: row["cells"][0] for row in gap["rows"]}
    assert signed == {"student": ("0.2", True), "teacher": ("-0.3", False)}  # nearer to zero


def test_a_diverged_solver_is_named_so_and_the_only_value_beside_it_is_not_the_best(folder):
    run = gather.read(folder)
    run.measured["points"].append(point("DPM2", "stock", 3, 0.4, 3.1e6))
    energy = tables.results(run)[0]
    rows = {row["who"]: row["cells"] for row in energy["rows"]}
    at = energy["nfes"].index(3)
    assert rows["DPM2"][at] == ("diverged", False) and rows["Heun"][at] == ("0.9", False)
    run.measured["points"][-1]["scores"]["energy"] = 2.36
    rows = {row["who"]: row["cells"] for row in tables.results(run)[0]["rows"]}
    assert rows["DPM2"][at] == ("2.36", False) and rows["Heun"][at] == ("0.9", True)


@pytest.mark.parametrize("metric, wanted", [("energy", [(1, 0.5), (3, 0.2)]), ("recall", [(1, 0.6), (2, 0.9)])])
def test_the_best_by_cost_are_better_than_all_cheaper_ones(metric, wanted):
    found = [(2, 0.9, 2), (1, 0.5, 1), (3, 0.2, 3), (4, 0.3, 4), (1, 0.6, 1), (5, None, 5)]
    assert [item[:2] for item in charts._best_by_cost(found, metric)] == wanted


def plain(figure):
    """Without the colours that only the page knows."""
    return json.loads(
        json.dumps(figure)
        .replace('"var:', '"')
        .replace("student-pale", "red")
        .replace("solver-strong", "red")
        .replace('"color": "student"', '"color": "red"')
        .replace('"color": "teacher"', '"color": "red"')
        .replace('"color": "solver"', '"color": "red"')
        .replace('"color": "second"', '"color": "red"')
    )


def test_every_figure_is_one_of_plotly(folder):
    from plotly.graph_objects import Figure

    run = gather.read(folder)
    run.reference = {
        "seeds": [1, 2, 3],
        "curves": {"student/loss": {"step": [20, 40], "low": [0.01, 0.01], "high": [1, 1]}},
    }
    figures = page._figures([run])
    assert list(figures) == ["quality-nfe", "quality-seconds", "validation-energy", "loss", "grad-norm"]
    for found in figures.values():
        for figure in found.values():
            Figure(plain(figure))  # raises on a key or value that plotly does not have
    names = [trace.get("name") for trace in figures["quality-nfe"]["energy"]["data"]]
    assert names == ["UniPC", "Heun", "best diffusers solver", "teacher, DDIM", "student"]
    student = figures["quality-seconds"]["energy"]["data"][-1]
    assert (student["x"], student["y"]) == ([0.1], [0.01])
    assert "range of the recipe, 3 seeds" in [trace.get("name") for trace in figures["loss"][""]["data"]]


def test_a_solver_that_would_hide_the_rest_is_named_instead(folder):
    run = gather.read(folder)
    run.measured["points"].append(point("DPM2", "stock", 3, 0.4, 31.0))
    figure = charts.quality([run], "energy", "nfe")
    assert figure["layout"]["meta"] == "off the chart: DPM2 at 3" and max(y for t in figure["data"] for y in t["y"]) < 1


def test_the_teacher_baseline_is_the_runs_own_where_it_logged_one(folder):
    run = gather.read(folder)
    assert charts._teacher(run, "energy") == {"teacher@2": 0.41}
    run.rows = [row for row in run.rows if "validation/energy" not in row]
    assert charts._teacher(run, "energy") == {"teacher@2": 0.4, "teacher@50": 0.02}
    run.measured["teacher_baseline"] = {"teacher@50": {"energy": 0.05}}
    assert charts._teacher(run, "energy") == {"teacher@50": 0.05}
    run.measured["lines"] = run.measured.pop("teacher_baseline")  # as older versions wrote it
    assert charts._teacher(run, "energy") == {"teacher@50": 0.05}


def test_several_runs_share_their_charts_and_a_table(folder, tmp_path):
    one, two = gather.read(folder), gather.read(folder)
    two.cfg, two.metrics = copy.deepcopy(two.cfg), copy.deepcopy(two.metrics)
    two.cfg.name, two.metrics["student"]["2"]["energy"] = "other", 0.008
    found = tables.compared([one, two])
    assert [(row["name"], row["cells"][0]) for row in found["rows"]] == [
        ("toy-tdm", ("0.01", False)),
        ("other", ("0.008", True)),
    ]
    names = [trace["name"] for trace in charts.quality([one, two], "energy", "nfe")["data"]]
    assert names[-2:] == ["toy-tdm", "other"] and names.count("teacher, DDIM") == 1
    assert {t["name"] for t in charts.training([one, two], "loss", "")["data"]} >= {"toy-tdm, student", "other, critic"}


@pytest.mark.parametrize("key", ["message", "said"])  # the second in files of version 0.1.0
def test_an_alarm_is_text_and_never_markup(folder, key):
    alarm = {"step": 20, "kind": "collapse", key: "</script><script>alert(1)</script>"}
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + '\n{"step": 30, "ki')
    text = page.html([gather.read(folder)])
    assert "<b>collapse</b> at step 20: &lt;/script&gt;" in text and "<script>alert" not in text
    assert text.count("</script>") == 3


def test_the_page_is_only_written_over_a_page(folder, tmp_path):
    out = tmp_path / "page.html"
    assert report([folder], out, quick=True) == out
    first = out.read_text()
    assert report([folder], out, quick=True) == out and out.read_text() == first
    out.write_text("<html>mine</html>")
    with pytest.raises(BadInput, match="page.html exists and is not a report"):
        report([folder], out, quick=True)
    assert out.read_text() == "<html>mine</html>" and not list(tmp_path.glob("*.writing"))


@pytest.mark.parametrize(
    "folders, out, says",
    [
        (["toy"], "page.txt", "must end in .html"),
        (["toy"], "no/page.html", "is not a folder"),
        (["toy", "toy"], "page.html", "named twice"),
        (["nothing"], "page.html", "nothing is not a run folder"),
    ],
)
def test_bad_input_is_named(folder, tmp_path, folders, out, says):
    with pytest.raises(BadInput, match=says):
        report([tmp_path / f for f in folders], tmp_path / out, quick=True)


def test_quick_measures_nothing_and_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_complete", lambda *a: pytest.fail("measured"))
    (folder / "metrics.json").unlink()
    report([folder], tmp_path / "page.html", quick=True)
    assert "Nothing is measured yet; run `distill report` without --quick." == tables.note(gather.read(folder))
    assert "quality-nfe" not in page._figures([gather.read(folder)])


def test_quick_shows_the_pictures_that_a_run_has(folder, tmp_path):
    assert '<img src="data:image' not in page.html([gather.read(folder)])
    (folder / "samples").mkdir()
    for path, text in (
        ("samples.png", b"eval"),
        ("samples/step-00000020.png", b"old"),
        ("samples/step-00000040.png", b"new"),
    ):
        (folder / path).write_bytes(text)
    report([folder], tmp_path / "page.html", quick=True)
    text = (tmp_path / "page.html").read_text()
    shown = [base64.b64decode(png) for png in re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)]
    assert shown == [b"eval", b"new"] and "step-00000040.png" in text
    run = gather.read(folder)
    run.measured["pictures"] = [{"kind": "student", "nfe": 2, "png": "data:image/png;base64,AAAA"}]
    assert page._stored_pictures([run]) == []  # the measured ones show more


def test_what_is_missing_is_measured_once(tmp_path, monkeypatch):
    from click.testing import CliRunner

    few = ("method.warm_start=0", "eval.evaluations=[2,4]", "eval.samples=60")
    tiny.train(tmp_path / "run", *few, name="tdm")
    asked = ["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html"), "--evaluations", "2"]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    kinds = {(p["kind"], p["nfe"]) for p in found["points"]}
    assert kinds == {("teacher", 2), ("teacher", 4), ("student", 2), ("stock", 2)}
    assert all(p["seconds"] > 0 for p in found["points"]) and set(found["teacher_baseline"]) == {
        "teacher@2",
        "teacher@4",
    }
    assert [(p["kind"], p["nfe"]) for p in found["pictures"]] == [("teacher", 2), ("teacher", 4), ("student", 2)]
    euler = next(p for p in found["points"] if p["who"] == "Flow Euler")
    plain = json.loads((tmp_path / "run" / "metrics.json").read_text())["teacher"]["2"]
    assert euler["scores"]["energy"] == pytest.approx(
        plain["energy"], rel=1e-3
    )  # the stock Euler is our teacher's DDIM
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    assert cost["memory"] in ("resident", "accelerator") and cost["peak_bytes"] > 2**25 and cost["processes"] == 1
    before = (tmp_path / "run" / "report.json").stat().st_mtime_ns
    monkeypatch.setattr(page, "measure", lambda *a: pytest.fail("measured again"))
    assert CliRunner().invoke(main, asked).exit_code == 0
    assert (tmp_path / "run" / "report.json").stat().st_mtime_ns == before
