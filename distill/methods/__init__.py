"""One file a method. `distill.methods.NAME` finds each Method by its class name, importing its file only then.

Examples:
    >>> from distill import methods
    >>> issubclass(methods.TDM, methods.Method), "DMD2" in dir(methods)
    (True, True)
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path


@cache
def names() -> dict[str, str]:
    """Class name -> module of every Method in this folder, read from the sources: a new file needs no registration."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any(getattr(b, "id", None) == "Method" for b in node.bases):
                found[node.name] = f"{__name__}.{path.stem}"
    return found


def __getattr__(name: str):
    if name == "Method":
        return importlib.import_module(f"{__name__}.base").Method
    if name in names():
        return getattr(importlib.import_module(names()[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__():
    return ["Method", *names()]
