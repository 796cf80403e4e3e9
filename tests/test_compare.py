from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from distill import config
from distill.errors import BadInput
from distill.inspect import compare as module
from distill.inspect.compare import compare_recipes

ROOT = Path(__file__).parents[1]
TOYS = [ROOT / "configs" / "toy" / f"{name}.yaml" for name in ("mmd", "tdm")]
SMALL = ["eval.samples=64", "eval.validation_samples=16", "data.batch_size=8", "method.warm_start=0", "train.threads=1"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out, compare_recipes(TOYS, out, 1.0, SMALL)


def test_every_recipe_gets_the_same_processor_time(compared):
    out, _ = compared
    rows = {name: json.loads((out / "rows" / f"toy-{name}.seed-0.json").read_text()) for name in ("mmd", "tdm")}
    for row in rows.values():
        assert row["seconds_a_step"] == row["seconds"] / row["steps"] and row["steps"] > 1
        assert row["seconds"] == 1.0 and 0.3 < row["spent"] < 6  # with the set-up of the run
        assert set(row["student"]) >= {"1", "2", "4"}
    assert (rows["mmd"]["seconds_a_step"] > rows["tdm"]["seconds_a_step"]) == (
        rows["mmd"]["steps"] < rows["tdm"]["steps"]
    )


def test_the_table_has_every_row_and_is_made_of_what_was_measured(compared):
    out, text = compared
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert (out / "table.md").read_text() == text and len({line.count("|") for line in lines}) == 1
    assert re.search(r"\n[\d,]+ samples per row, against [\d,]+ reference samples\.\n$", text)
    assert [line.split(" | ")[0] for line in lines[2:]][-3:] == [
        "| teacher, DDIM",
        "| best distill solver",
        "| teacher at 50",
    ]
    assert {line.split(" | ")[0] for line in lines[2:4]} == {"| toy-mmd", "| toy-tdm"}


def test_rows_are_kept_and_budgets_never_mixed(compared, monkeypatch):
    out, text = compared
    monkeypatch.setattr(module, "train", lambda *a, **kw: pytest.fail("trained again"))
    assert compare_recipes(TOYS, out, 1.0, SMALL) == text
    assert compare_recipes(TOYS[:1], out, 1.0, [*SMALL, "expect.energy=0.001"]) == text, "what a recipe should reach"
    with pytest.raises(BadInput, match="toy-mmd.seed-0.json was made with 1 seconds"):
        compare_recipes(TOYS, out, 2.0, SMALL)
    with pytest.raises(BadInput, match="Two recipes are named toy-mmd"):
        compare_recipes([TOYS[0], TOYS[0]], out, 1.0, SMALL)


class Trained(Exception):
    pass


def test_a_changed_recipe_or_method_is_measured_again(compared, monkeypatch):
    out, _ = compared

    def trained(cfg, folder, **kw):
        raise Trained(folder.name)

    monkeypatch.setattr(module, "train", trained)
    folders = set()
    with pytest.raises(Trained) as recipe:
        compare_recipes(TOYS[:1], out, 1.0, [*SMALL, "optim.student.lr=1e-5"])
    monkeypatch.setattr(module, "method_digest", lambda method: "another")
    with pytest.raises(Trained) as code:
        compare_recipes(TOYS[:1], out, 1.0, SMALL)
    folders = {str(recipe.value), str(code.value)}
    assert len(folders) == 2 and not any((out / folder).exists() for folder in folders), "a run would be overwritten"


def test_an_interrupted_run_makes_no_row_and_continues_with_its_steps(tmp_path, monkeypatch):
    inner, calls = module.train, []

    def train(cfg, folder, resume=False, allow=()):
        calls.append((cfg.train.steps, resume))
        if not resume:
            from distill.methods import MMD

            before = MMD.turns

            def turns_then_signal(self, step):
                if step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return before(self, step)

            with monkeypatch.context() as patch:
                patch.setattr(MMD, "turns", turns_then_signal)
                return inner(cfg, folder, resume=resume, allow=allow)
        return inner(cfg, folder, resume=resume, allow=allow)

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(KeyboardInterrupt):
        compare_recipes(TOYS[:1], tmp_path, 1.0, SMALL)
    assert not list((tmp_path / "rows").iterdir())
    monkeypatch.setattr(module, "seconds_a_step", lambda *a: pytest.fail("the steps were chosen already"))
    compare_recipes(TOYS[:1], tmp_path, 1.0, SMALL)
    row = json.loads((tmp_path / "rows" / "toy-mmd.seed-0.json").read_text())
    assert [resume for _, resume in calls] == [False, True]
    assert calls[0][0] == calls[1][0] == row["steps"] > 3


def test_recipes_that_state_what_they_reach_get_the_seeds(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(module, "measure_recipe", lambda cfg, *a: measured.append((cfg.name, cfg.seed)))
    monkeypatch.setattr(module, "comparison_table", lambda out: "")
    other = tmp_path / "other.yaml"
    text = TOYS[1].read_text()
    other.write_text(text[: text.index("expect:")].replace("name: toy-tdm", "name: other"))
    compare_recipes([TOYS[0], other], tmp_path / "out", 1.0, ["seed=5"], seeds=3)
    assert measured == [("toy-mmd", 5), ("toy-mmd", 6), ("toy-mmd", 7), ("other", 5)]


def test_a_line_has_the_mean_over_seeds(tmp_path):
    (tmp_path / "rows").mkdir()
    for seed, fd in enumerate((0.1, 0.2, 0.6)):
        student = {str(n): {"fd": fd * n, "recall": None if seed == 1 else 0.5} for n in (1, 2, 4)}
        row = {"name": "r", "seed": seed, "method": "M", "trained_for": 4, "seconds_a_step": 0.1, "steps": 10}
        (tmp_path / "rows" / f"r.seed-{seed}.json").write_text(json.dumps(row | {"student": student}))
    line = module.comparison_table(tmp_path).splitlines()[2]
    assert line == "| r | `M` | 4 | 0.100 | 10 | 3 | 0.3 / 0.6 / 1.2 |  /  /  |"


def test_the_digest_is_that_of_the_code_of_a_method(tmp_path, monkeypatch):
    tdm = module.method_sources(config.load([TOYS[1]]).method)
    assert {"distill.methods.tdm", "distill.methods.base", "distill.losses.matching", "distill.noise"} <= set(tdm)
    assert not {"distill.methods.mmd", "distill.errors", "distill.config"} & set(tdm)
    monkeypatch.syspath_prepend(tmp_path)
    file, digests = tmp_path / "mine_of_compare.py", []
    for text in (
        "class Mine:\n    a = 1\n",
        '"""Doc."""\nclass Mine:\n    """Doc."""\n\n    a = 1  # comment\n',
        "class Mine:\n    a = 2\n",
        "import distill.losses.mmd\nclass Mine:\n    a = 1\n",
    ):
        file.write_text(text)
        sys.modules.pop("mine_of_compare", None)
        digests.append(module.method_digest({"_target_": "mine_of_compare.Mine"}))
    assert digests[0] == digests[1] and len(set(digests)) == 3
    nested = {"_target_": "mine_of_compare.Mine", "terms": [{"method": {"_target_": "distill.methods.MMD"}}]}
    assert "distill.methods.mmd" in module.method_sources(nested)
