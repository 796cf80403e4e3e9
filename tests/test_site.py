"""The hooks of the documentation site: equations as MathML."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("latex2mathml")
spec = importlib.util.spec_from_file_location("site_math", ROOT / "docs" / "site" / "math.py")
site_math = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_math)
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_a_displayed_formula_is_split_at_its_wide_spaces():
    formula = r'<div class="arithmatex">\[ a = b, \qquad c = \big\lVert d \big\rVert \]</div>'
    found = site_math.on_page_content(formula, None, None, None)
    assert found.count("<math") == 2 and "\\" not in found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_latex_is_left_in_a_displayed_formula(page):
    for latex in re.findall(r"\$\$\n(.*?)\$\$", page.read_text(), flags=re.DOTALL):
        found = site_math.on_page_content(f'<div class="arithmatex">\\[{latex}\\]</div>', None, None, None)
        assert not re.search(r"\\[a-zA-Z]", found), latex


def test_a_framed_table_is_marked_and_other_code_is_not():
    spec = importlib.util.spec_from_file_location("site_code", ROOT / "docs" / "site" / "code.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    block = '<div class="language-text highlight"><pre><span></span><code>{}\n</code></pre></div>'
    page = block.format("plain") + block.format("┏━┓")
    assert module.on_page_content(page, None, None, None) == block.format("plain") + block.format("┏━┓").replace(
        "highlight", "highlight framed"
    )
