"""The page in a real browser: nothing fails there, every chart is drawn, nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny

from distill.cli import main
from distill.inspect.report import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=10000")


def browse(path: Path) -> tuple[str, list[str]]:
    """The page's elements after its scripts have run, and what it wrote on the console."""
    done = subprocess.run(
        [CHROMIUM, *FLAGS, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=240
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two small runs of a toy and their page, by the command."""
    from click.testing import CliRunner

    folder = tmp_path_factory.mktemp("made")
    few = ("method.warm_start=0", "eval.evaluations=[2,4]", "roles.student.net.depth=1", "train.log_every=2")
    for name in ("one", "two"):
        tiny.train(folder / name, *few, f"name={name}", name="tdm")
    for runs, out in ((["one"], "one.html"), (["one", "two"], "both.html")):
        result = CliRunner().invoke(main, ["report", *(str(folder / r) for r in runs), "-o", str(folder / out)])
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("name, figures", [("one", 5), ("both", 5)])
def test_every_chart_is_drawn_without_an_error(made, name, figures):
    dom, console = browse(made / f"{name}.html")
    assert console == []
    places = re.findall(r'<div class="chart[^"]*js-plotly-plot" id="([^"]+)"|<div class="chart[^"]*" id="([^"]+)"', dom)
    drawn = re.search(r'data-drawn="(\d+)"', dom)
    assert len(places) == figures and drawn and int(drawn[1]) >= figures
    traces = dom.count('class="trace scatter')
    assert traces >= 5 + 5 + 2 + 2, "solvers, teacher, student, roles"


def test_the_page_fetches_nothing(made):
    text = (made / "one.html").read_text()
    own = text.replace(page.pkgutil.get_data("plotly", "package_data/plotly.min.js").decode(), "")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import""", own)


def test_a_script_that_fails_is_seen(made):
    broken = made / "broken.html"
    broken.write_text((made / "one.html").read_text().replace("const dark =", "nowhere(); const dark ="))
    _, console = browse(broken)
    assert any("nowhere is not defined" in line for line in console)
