"""The demo meets the requirements that the README states, and fails with an exit code otherwise."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from distill.cli import main
from distill.cli.demo import requirements


def ran(out, *more) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["demo", "--out", str(out), *more])
    return result.exit_code, result.output


def test_requirements():
    """Of a student at 0.122, a teacher at 0.148 and the best distill solver at 0.511, and of ones a little worse."""

    def kept(fd, accuracy, difference):
        rows = {"teacher": {"50": {"fd": 0.148}}, "training_free": {"4": {"fd": 0.511}}}
        return [
            holds for *_, holds in requirements(rows | {"student": {"4": {"fd": fd, "accuracy": accuracy}}}, difference)
        ]

    assert kept(0.122, 0.979, 1e-6) == [True] * 4
    assert kept(0.135, 0.979, 1e-6) == [False, True, True, True]
    assert kept(0.26, 0.96, 1e-3) == [False] * 4


@pytest.mark.slow
def test_the_demo_meets_its_requirements(tmp_path):
    code, said = ran(tmp_path / "demo")
    assert code == 0 and said.count("ok    ") == 4 and "FAILED" not in said, said
    assert "4,000 samples per row" in said
    points = json.loads((tmp_path / "demo" / "run" / "report.json").read_text())["points"]
    stock = {p["who"]: p["scores"]["fd"] for p in points if p["kind"] == "stock" and p["nfe"] == 4}
    best = min(stock, key=stock.get)
    assert len(stock) > 5 and f"{best}, FD {stock[best]:.3f}" in said.replace("\n", " ")
    assert (tmp_path / "demo" / "report.html").stat().st_size > 1e6
