"""Reference curves: ranges computed by hand, runs that are outside of them, and input that is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

from distill import config
from distill.cli import main
from distill.errors import BadInput
from distill.inspect import curves

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*/curves/*.json"))


def test_a_curve_is_the_median_of_a_twentieth():
    found = [
        {"step": s, "student/loss": float(s), "steps_per_second": 1.0, "student/skipped": 0.0} for s in range(1, 41)
    ]
    found += [{"step": 0, "validation/energy": 3.0, "validation/teacher@2/energy": 1.0}]
    got = curves.window_medians(found, 40)
    assert set(got) == {"student/loss", "validation/energy"} and got["validation/energy"] == {0: 3.0}
    assert got["student/loss"] == {2 * k: 2 * k - 0.5 for k in range(1, 21)}


def test_ranges_of_losses_are_in_logarithms_with_pooled_deviations():
    runs = [[1.0, 4.0], [2.0, 4.0], [4.0, 4.0]]  # of three seeds, two windows
    pooled = math.sqrt((math.log(2) ** 2 + 0) / 2)
    (low, high), (low2, high2) = curves._loss_ranges([list(c) for c in zip(*runs)])
    assert low == pytest.approx(2 / 2**4, rel=1e-3) and high == pytest.approx(2 * 2**4, rel=1e-3)  # 4 own deviations
    assert high2 == pytest.approx(4 * math.exp(4 * pooled), rel=1e-3) and low2 == pytest.approx(16 / high2, rel=1e-3)


def test_ranges_of_metrics_are_linear_and_at_least_a_quarter_wide():
    values = [0.01, 0.012, 0.014]
    [[low, high]] = curves._metric_ranges([values])
    half = 8 * statistics.stdev(values)
    assert (low, high) == pytest.approx((0.012 - half, 0.012 + half))
    assert curves._metric_ranges([[2.0, 2.0, 2.0]]) == [[1.5, 2.5]] and curves._metric_ranges(
        [[2.0, 2.0, 2.0]], least=0.7
    ) == [[1.3, 2.7]]
    assert curves._metric_ranges([[0.98] * 3], "accuracy") == [[0.955, 1.0]] and curves._metric_ranges(
        [[0.4] * 3], "recall"
    ) == [[0.3, 0.5]]


def test_a_departure_is_named_with_its_step_value_and_range():
    reference = {"student/loss": {"step": [2, 4, 6], "low": [1.0, 1.0, 1.0], "high": [2.0, 2.0, 2.0]}}
    assert curves.out_of_range({"student/loss": {2: 1.5, 4: 2.0}}, reference) == []
    [left] = curves.out_of_range({"student/loss": {2: 1.5, 4: 3.0, 6: math.nan}}, reference)
    assert str(left) == "student/loss at step 4: 3, above the range 1 to 2; outside in 2 of 3 windows"
    [left] = curves.out_of_range({"student/loss": {2: 0.5, 4: 0.5}}, reference)
    assert "0.5, below the range" in str(left)
    [left] = curves.out_of_range({"student/loss": {2: math.nan}}, reference)
    assert "not a number" in str(left)


@pytest.mark.parametrize("windows, spared", [(1, 1), (3, 1), (20, 2)])
def test_one_window_in_ten_may_lie_outside(windows, spared):
    ends = list(range(1, windows + 1))
    reference = {"student/loss": {"step": ends, "low": [1.0] * windows, "high": [2.0] * windows}}
    curve = lambda bad: {"student/loss": {end: 3.0 if end <= bad else 1.5 for end in ends}}
    assert curves.out_of_range(curve(spared), reference) == []
    assert [d.windows for d in curves.out_of_range(curve(spared + 1), reference)] == (
        [spared + 1] if spared < windows else []
    )


def test_of_a_metric_only_the_worse_side_counts():
    reference = {"energy": [0.01, 0.02], "recall": [0.4, 0.5], "nll_gap": [-0.1, 0.1]}
    good = {"energy": 0.001, "recall": 0.9, "nll_gap": 0.0}
    assert curves.metrics_out_of_range(good, reference, {}) == []
    names = lambda found, expect=(): [d.name for d in curves.metrics_out_of_range(found, reference, dict(expect))]
    assert names({"energy": 0.021, "recall": 0.39, "nll_gap": -0.2}) == ["energy", "recall", "nll_gap"]
    assert names(good, [("energy", 0.0005)]) == ["energy"] and names(good | {"energy": math.nan}) == ["energy"]
    assert [str(d) for d in curves.metrics_out_of_range({"map_error": 0.2}, {}, {"map_error": 0.1})] == [
        "map_error: 0.2, above the range -inf to 0.1"
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A small recipe, runs of three seeds, and its reference curves, by the command."""
    folder = tmp_path_factory.mktemp("recorded")
    recipe = folder / "small.yaml"
    cfg = tiny.recipe("train.steps=40", name="teacher")
    cfg.expect = {}  # it is too small for what the toy promises
    config.save(cfg, recipe)
    for seed in (1, 2, 3, 4):
        result = distill("train", recipe, f"seed={seed}", f"name=s{seed}", "--runs", folder, "--no-check")
        assert result.exit_code == 0, result.output
    result = distill("compare", "--record", *(folder / f"s{s}" for s in (1, 2, 3)), recipe)
    assert result.exit_code == 0, result.output
    return folder, recipe


def distill(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_run_of_another_seed_stays_within(recorded):
    folder, recipe = recorded
    reference = json.loads((folder / "curves" / "small.json").read_text())
    assert reference["seeds"] == [1, 2, 3] and len(reference["curves"]["student/loss"]["step"]) == 20
    assert set(reference["metrics"]) == {"energy"}  # what a suite mainly measures, and what a recipe expects
    result = distill("compare", folder / "s4", recipe)
    assert result.exit_code == 0 and f"{folder / 's4'}: within the reference curves of {recipe}." in result.output, (
        result.output
    )


def test_a_run_that_went_wrong_is_outside_at_a_named_step(recorded):
    folder, recipe = recorded
    result = distill("train", recipe, "optim.student.lr=0.2", "name=wrong", "--runs", folder, "--no-check")
    assert result.exit_code == 0, result.output
    result = distill("compare", folder / "wrong", recipe)
    assert result.exit_code == 1
    assert "note   differs from the recipe: optim.student.lr is 0.2, there 0.002" in result.output
    assert "OUTSIDE student/" in result.output and "above the range" in result.output


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--record", "s1", "s2"], "2 runs are too few to record"),
        (["--record", "s1", "s2", "s1"], "has seed 1, as another run has"),
        (["s1", "s2"], "Usage: `distill compare RUN RECIPE`"),
        (["--record"], "Usage: `distill compare RUN RECIPE`"),
    ],
)
def test_wrong_arguments_are_refused(recorded, arguments, says):
    folder, recipe = recorded
    flags = [a for a in arguments if a.startswith("--")]
    result = distill("compare", *flags, *(folder / a for a in arguments if a not in flags), recipe)
    assert result.exit_code == 2 and says in result.stderr, result.stderr


def test_a_changed_recipe_needs_new_reference_curves(recorded, tmp_path):
    folder, recipe = recorded
    other = tmp_path / "small.yaml"
    other.write_text(recipe.read_text().replace("steps: 40", "steps: 50"))
    (tmp_path / "curves").mkdir()
    (tmp_path / "curves" / "small.json").write_text((folder / "curves" / "small.json").read_text())
    with pytest.raises(BadInput, match="recorded for another version"):
        curves.read_reference(other)
    with pytest.raises(BadInput, match="s1 is not a run of .*train.steps is 40, there 50"):
        curves.record_curves([folder / "s1"] * 3, other)


def test_a_run_with_nothing_to_compare_is_refused(recorded, tmp_path):
    folder, recipe = recorded
    shutil.copytree(folder / "s1", tmp_path / "new")
    (tmp_path / "new" / "metrics.csv").unlink()
    result = distill("compare", tmp_path / "new", recipe)
    assert result.exit_code == 2 and "nothing to compare" in result.stderr and "0 of 40 steps" in result.stderr
    header, *rows = (folder / "s1" / "metrics.csv").read_text().splitlines(True)
    (tmp_path / "new" / "metrics.csv").write_text(header + "".join(rows[: len(rows) // 2]))  # under way
    result = distill("compare", tmp_path / "new", recipe)
    assert result.exit_code == 0 and "metrics are compared when the run is finished" in result.output


def test_where_files_lie_does_not_change_a_recipe():
    one = config.load([ROOT / "configs" / "digits" / "tdm.yaml"])
    two = copy.deepcopy(one)
    two.data.path, two.roles.teacher.path, two.seed, two.name = "/elsewhere/train", "/elsewhere/teacher", 7, "mine"
    assert curves.recipe_fingerprint(one) == curves.recipe_fingerprint(two) and not curves.differences(one, two)
    two.method._target_ = "distill.moved.TDM"
    assert curves.recipe_fingerprint(one) == curves.recipe_fingerprint(two)
    two.method._target_ = "distill.methods.DMD2"
    assert curves.differences(one, two) == ["method._target_ is TDM, there DMD2"]
    two.method._target_ = one.method._target_
    two.method.grid = 2
    assert curves.recipe_fingerprint(one) != curves.recipe_fingerprint(two)
    assert curves.differences(one, two) == ["method.grid is 4, there 2"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_shipped_reference_curves_are_of_their_recipe(path):
    reference = curves.read_reference(path.parents[1] / f"{path.stem}.yaml")
    assert len(set(reference["seeds"])) >= curves.LEAST and reference["metrics"] and reference["curves"]
    for curve in reference["curves"].values():
        assert all(low < high for low, high in zip(curve["low"], curve["high"]))
