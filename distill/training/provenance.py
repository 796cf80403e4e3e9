"""Records the code of a run: version, git commit and uncommitted changes, digest of the sources."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from distill import __version__
from distill.files import write_json, write_text

PACKAGE = Path(__file__).parents[1]
STATE = "code.json"


def state() -> tuple[dict[str, Any], str]:
    """(version, SHA-256 of all sources, commit and whether the tree has changes; the last two None outside git), diff."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    inside = (
        _git("ls-files", "--error-unmatch", str(PACKAGE / "__init__.py")) is not None
    )  # not a virtual environment inside some repository
    commit, diff = (_git("rev-parse", "HEAD"), _git("diff", "HEAD", "--", str(PACKAGE))) if inside else (None, None)
    about = {
        "version": __version__,
        "sha256": digest.hexdigest(),
        "commit": commit and commit.strip(),
        "changed": None if diff is None else bool(diff),
    }
    return about, diff or ""


def _git(*words: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # no git
        return None
    return found.stdout if found.returncode == 0 else None


def record_provenance(folder: Path, step: int) -> tuple[dict[str, Any], list[Path]]:
    """Append the state of the code to `code.json`, if it has changed, and write its diff to `code-STEP.diff`.

    Returns the state and the files.
    """
    about, diff = state()
    path = folder / STATE
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = []
    if not isinstance(before, list) or not all(isinstance(entry, dict) for entry in before):
        before = []  # damaged
    if not before or {k: v for k, v in before[-1].items() if k != "step"} != about:
        write_json(path, [*before, {"step": step} | about])
        if diff:
            write_text(folder / f"code-{step}.diff", diff)
    return about, [path, *sorted(folder.glob("code-*.diff"))]
