"""Packages outside distill whose objects a config may name: installed plugins, and those allowed on the command line.

A package announces itself by an entry point in the group `distill.plugins` of its own pyproject.toml:

    [project.entry-points."distill.plugins"]
    mypackage = "mypackage"
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from distill.config.schema import TARGET
from distill.errors import BadInput

GROUP = "distill.plugins"


def installed() -> frozenset[str]:
    """Top-level packages of all installed entry points of the group `distill.plugins`."""
    return _installed(tuple(sys.path))


@cache
def _installed(path: tuple[str, ...]) -> frozenset[str]:
    points = importlib.metadata.entry_points(group=GROUP)
    return frozenset(point.value.partition(":")[0].strip().split(".")[0] for point in points)


def may_name(package: str, allow: Sequence[str] = ()) -> bool:
    """Whether configs may name objects of a package outside distill."""
    return package in allow or package in installed()


def named(cfg: Mapping[str, Any]) -> list[str]:
    """Top-level packages outside distill that a config names under `_target_`, sorted."""
    targets = (value for value in _targets(cfg) if isinstance(value, str))
    return sorted({target.split(".")[0] for target in targets} - {"distill"})


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from [value] if key == TARGET else _targets(value)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            yield from _targets(value)


def record(cfg: Mapping[str, Any], allow: Sequence[str] = ()) -> list[str]:
    """The value of `allow` in a run's saved config: packages allowed on the command line, and plugins that it names."""
    return sorted({*allow, *named(cfg)})


def confirm(cfg: Mapping[str, Any], allow: Sequence[str], where: str | Path) -> None:
    """Check that every package named in a run's config is an installed plugin or is allowed again.

    A run folder may come from somebody else, so the `allow` in its config grants nothing.

    Raises:
        BadInput: a package is neither; names the option.
    """
    for package in named(cfg):
        if not may_name(package, allow):
            raise BadInput(
                f"{where} was trained with objects of the package '{package}', which this command would import and run; "
                f"if you trust it, add --allow {package} again."
            )
