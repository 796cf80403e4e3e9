r"""MkDocs hook: turns `\(...\)` and `\[...\]` into MathML at build time, which browsers draw without JavaScript."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content, page, config, files):
    return FORMULA.sub(_mathml, content)


def _mathml(match):
    tag, bracket, latex = match.groups()
    display = "block" if bracket == "[" else "inline"
    return f'<{tag} class="math">{convert(html.unescape(latex).strip(), display=display)}</{tag}>'
