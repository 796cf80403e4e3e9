"""MkDocs hook: links from a page to files outside docs/, such as `../distill/methods/tdm.py`.

A module becomes a link to its API page, and README.md one to the front page. Other files become links into the repository
if `repo_url` is set, and plain text otherwise. A link to a file that does not exist is a warning, which fails a strict
build.
"""

import logging
import posixpath
import re
from pathlib import Path

log = logging.getLogger("mkdocs.hooks.links")
ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")
SITE_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
EXTERNAL = re.compile(r"^([a-z]+:|#|/)")


def on_page_markdown(markdown, page, config, files):
    def replace(match):
        image, text, target = match.groups()
        path, anchor = split_anchor(target)
        if image or EXTERNAL.match(target) or not path:
            return match.group(0)
        in_repository = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), path))
        if in_repository.startswith("docs/"):
            return match.group(0)
        if not (ROOT / in_repository).exists():
            log.warning("%s links to %s, which does not exist.", page.file.src_uri, in_repository)
        on_site = SITE_PAGES.get(in_repository) or api_page(in_repository)
        if files.get_file_from_path(on_site):
            return f"[{text}]({relative(on_site, page.file.src_uri)}{anchor})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{in_repository}{anchor})"
        return text if "`" in text else f"`{text}`"

    return outside_code(markdown, lambda line: LINK.sub(replace, line))


def outside_code(markdown, change):
    """Applies `change` to every line that is not inside a fenced code block."""
    lines, fenced = [], False
    for line in markdown.split("\n"):
        fence = line.lstrip().startswith("```")
        fenced = fenced != fence
        lines.append(line if fenced or fence else change(line))
    return "\n".join(lines)


def split_anchor(target):
    path, hash_sign, anchor = target.partition("#")
    return path, hash_sign + anchor


def api_page(path):
    """`distill/methods/tdm.py` -> `reference/api/distill/methods/tdm.md`; a package's own page is the index of its folder."""
    folder, _, name = path.removesuffix(".py").rpartition("/")
    name = {"__init__": "index", "index": "index_"}.get(name, name)  # a module may be called index, too
    return f"reference/api/{folder}/{name}.md"


def relative(target, page):
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
