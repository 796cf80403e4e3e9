"""MkDocs hook: marks code blocks that hold a framed table, whose lines must not wrap (extra.css)."""

import re

BLOCK = re.compile(r'(<div class="[^"]*\bhighlight)("><pre>(?:(?!</pre>).)*?[┏┌╭])', re.DOTALL)


def on_page_content(content, page, config, files):
    return BLOCK.sub(r"\1 framed\2", content)
