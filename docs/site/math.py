r"""MkDocs hook: turns `\(...\)` and `\[...\]` into MathML at build time, which browsers draw without JavaScript.

A displayed formula is split at `\qquad`: its parts stand side by side where they fit, and below each other elsewhere.
"""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
SIZE = re.compile(r"\\[bB]igg?[lr]?(?=\\)")  # size of a delimiter: MathML stretches these by itself


def on_page_content(content, page, config, files):
    return FORMULA.sub(_mathml, content)


def _mathml(match):
    tag, bracket, latex = match.groups()
    latex = SIZE.sub("", html.unescape(latex).strip())
    display = "block" if bracket == "[" else "inline"
    parts = latex.split(r"\qquad") if display == "block" and r"\begin" not in latex else [latex]
    return f'<{tag} class="math">{"".join(convert(part.strip(), display=display) for part in parts)}</{tag}>'
