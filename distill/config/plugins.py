"""Packages outside distill whose objects a config may name: installed plugins, and those allowed on the command line.

A package announces itself by an entry point in the group `distill.plugins` of its own pyproject.toml:

    [project.entry-points."distill.plugins"]
    mypackage = "mypackage"

The module that it names is imported before a command gives up on a network without a family, so that it may register one
(`distill.models.diffusers.register_family`); a package named by --allow is imported when the command starts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from distill.config.schema import TARGET
from distill.errors import BadInput

GROUP = "distill.plugins"
imported: list[str] = []  # packages that --allow named, for the processes that this one starts


def installed() -> frozenset[str]:
    """Top-level packages of all installed entry points of the group `distill.plugins`."""
    return _installed(tuple(sys.path))


@cache
def _installed(path: tuple[str, ...]) -> frozenset[str]:
    points = importlib.metadata.entry_points(group=GROUP)
    return frozenset(point.value.partition(":")[0].strip().split(".")[0] for point in points)


def import_installed() -> None:
    """Import the modules of all installed entry points of the group `distill.plugins`, for what they register.

    Raises:
        BadInput: a plugin cannot be imported.
    """
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            importlib.import_module(point.module)
        except ImportError as error:
            raise BadInput(
                f"the installed plugin '{point.module}' cannot be imported ({error}); mend or uninstall it."
            ) from error


def import_allowed(allow: Sequence[str]) -> None:
    """Import the packages named by --allow, for what they register.

    Raises:
        BadInput: a package is not installed.
    """
    for package in allow:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise BadInput(f"--allow {package}: {not_installed(package)}, or correct the name.") from error
        if package not in imported:
            imported.append(package)


def not_installed(package: str) -> str:
    """The sentence about a package that cannot be imported, without its end."""
    local = Path(package).is_dir() or Path(f"{package}.py").is_file()
    mend = "put PYTHONPATH=. before the command, or install it" if local else "install it"
    return f"the package '{package}' is not installed; {mend}"


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
