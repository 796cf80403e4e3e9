"""Tiny pipelines of each family: stock classes with small random networks, tokenizers and encoders, created offline.

`folder("sdxl")` is the path of one, and `load("tiny:sdxl")` its Denoiser, with the classes, conditions and conventions
of the published models in a few hundred kilobytes. The families declare them (`Family.twins`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distill.config import plugins
from distill.errors import BadInput, suggest
from distill.files import atomic_folder
from distill.models.diffusers import tiny_parts
from distill.models.families.registry import families


def builders() -> dict[str, Callable[[], Any]]:
    """The tiny pipelines by name, in the order of the families."""
    return {name: twin.build for family in families() for name, twin in family.twins.items()}


def folder(family: str) -> Path:
    """The folder of a family's tiny pipeline in the user's cache ($XDG_CACHE_HOME/distill), created on first use.

    Args:
        family: a name of `builders`.

    Raises:
        BadInput: for another name.
    """
    known = builders()
    if family not in known:
        plugins.import_installed()
        known = builders()
    if family not in known:
        raise BadInput(f"'tiny:{family}' is not a tiny pipeline.{suggest(family, known)} There are {', '.join(known)}.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distill" / "tiny"
    out = cache / f"{family}-{_version(known[family])}"
    if not out.exists():
        try:
            with torch.random.fork_rng(devices=[]), atomic_folder(out) as staging:  # draws do not depend on the cache
                known[family]().save_pretrained(staging)
        except (OSError, BadInput):
            if not out.exists():  # otherwise another process created it first
                raise
    return out


def _version(build: Callable[[], Any]) -> str:
    """A digest of what a twin is made from: the sources of the pieces and of its family, and the libraries."""
    function = build.func if isinstance(build, partial) else build
    digest = hashlib.sha256()
    for file in (tiny_parts.__file__, sys.modules[function.__module__].__file__):
        digest.update(Path(str(file)).read_bytes())
    digest.update(f"{metadata.version('diffusers')} {metadata.version('transformers')}".encode())
    return digest.hexdigest()[:12]
