from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from distill.errors import BadInput
from distill.inspect import compare as module
from distill.inspect.compare import compare

ROOT = Path(__file__).parents[1]
TOYS = [ROOT / "configs" / "toy" / f"{name}.yaml" for name in ("mmd", "tdm")]
SMALL = ["eval.samples=64", "eval.validation_samples=16", "data.batch_size=8", "method.warm_start=0", "train.threads=1"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out, compare(TOYS, out, 1.0, SMALL)


def test_every_recipe_gets_the_same_processor_time(compared):
    out, _ = compared
    rows = {name: json.loads((out / "rows" / f"toy-{name}.json").read_text()) for name in ("mmd", "tdm")}
    for row in rows.values():
        assert row["steps"] == max(int(row["seconds"] / row["seconds_a_step"]), 1)
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
        "| best training-free solver",
        "| teacher at 50",
    ]
    assert {line.split(" | ")[0] for line in lines[2:4]} == {"| toy-mmd", "| toy-tdm"}


def test_rows_are_kept_and_never_mixed(compared, monkeypatch):
    out, text = compared
    monkeypatch.setattr(module, "train", lambda *a, **kw: pytest.fail("trained again"))
    assert compare(TOYS, out, 1.0, SMALL) == text
    with pytest.raises(BadInput, match="another budget or recipe"):
        compare(TOYS, out, 2.0, SMALL)
    with pytest.raises(BadInput, match="Two recipes are named toy-mmd"):
        compare([TOYS[0], TOYS[0]], out, 1.0, SMALL)
