"""Recipes, reference curves and checkpoints that come with the package, found by name from any folder."""

from __future__ import annotations

import difflib
import fnmatch
import glob
from collections.abc import Sequence
from pathlib import Path

from distill.errors import NEAR, BadInput, near_path, suggest

PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "shipped_configs"  # as a wheel installs them
CHECKPOINTS = PACKAGE / "shipped_checkpoints"
if not RECIPES.is_dir():  # a clone, or an editable install of one
    RECIPES, CHECKPOINTS = PACKAGE.parent / "configs", PACKAGE.parent / "checkpoints"


def names() -> list[str]:
    """Names of all recipes, such as `toy/tdm`, without files that are only a `base:` of others."""
    paths = (path.relative_to(RECIPES).with_suffix("") for path in sorted(RECIPES.glob("*/*.yaml")))
    return [str(path) for path in paths if path.name != "base"]


def about(name: str) -> str:
    """The first sentence of a recipe's leading comment."""
    text_lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = []
    for line in text_lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".") + "." if comment else ""


def find(path: str | Path) -> Path:
    """The config file at `path`; else the shipped recipe of that name, with or without `configs/` and `.yaml`.

    Raises:
        BadInput: there is neither; suggests the nearest name.
    """
    path = Path(path)
    if path.is_file():
        return path
    if shipped := _shipped(path):
        return shipped
    name = str(path).removesuffix(".yaml").removeprefix("configs/")
    near = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    hint = suggest(path.name, near) or suggest(name, names())
    raise BadInput(f"Config file {path} does not exist.{hint} `distill recipes` lists those that come with distill.")


def expand(paths: Sequence[str]) -> list[str]:
    """`paths` with each pattern replaced by the files that it matches, else by the shipped recipes, `base` left out.

    Raises:
        BadInput: a pattern that matches neither.
    """
    found: list[str] = []
    for path in paths:
        matches = [path] if not glob.has_magic(path) or Path(path).is_file() else sorted(glob.glob(path))
        pattern = path.removesuffix(".yaml").removeprefix("configs/")
        matches = matches or sorted(fnmatch.filter(names(), pattern))
        if not matches:
            hint = suggest(pattern.partition("/")[0], {name.partition("/")[0] for name in names()})
            raise BadInput(f"{path} matches no file and no recipe.{hint} `distill recipes` lists the recipes.")
        found += matches
    return found


def shown(path: str | Path) -> str:
    """A config file as messages name it: a recipe of the package by its name."""
    file = Path(path)
    inside = file.is_absolute() and file.is_relative_to(RECIPES) and file.suffix == ".yaml"
    return str(file.relative_to(RECIPES).with_suffix("")) if inside else str(path)


def text(name: str) -> str:
    """The text of a recipe for any folder: a relative `base:` is replaced by the name of the shipped recipe."""
    file = find(name)
    text_lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    for i, line in enumerate(text_lines):
        key, _, base = line.partition(":")
        path = (file.parent / base.strip()).resolve()
        if key == "base" and path.is_relative_to(RECIPES.resolve()) and path.is_file():
            text_lines[i] = f"base: {path.relative_to(RECIPES.resolve()).with_suffix('')}\n"
    return "".join(text_lines)


def beside(file: Path, base: str) -> Path:
    """The base of a config file: a path relative to that file, else the shipped recipe of that name."""
    path = file.parent / base
    return path if path.is_file() else _shipped(base) or path


def _shipped(path: str | Path) -> Path | None:
    """The shipped recipe of that name, with or without `configs/` and `.yaml`."""
    path = Path(path)
    name = str(path.with_suffix("") if path.suffix == ".yaml" else path).removeprefix("configs/")
    file = RECIPES / f"{name}.yaml"
    return file if not path.is_absolute() and file.is_file() else None


def checkpoint(path: str | Path) -> Path:
    """`path`; if it does not exist and the package has a checkpoint of that name, the folder of that checkpoint."""
    name = str(path).removeprefix("checkpoints/")
    shipped = CHECKPOINTS / name
    if not Path(path).exists() and not Path(path).is_absolute() and name and shipped.is_dir():
        return shipped
    return Path(path)


def near_checkpoint(path: str | Path) -> str:
    """`" Did you mean 'x'?"` for a folder, or a checkpoint of the package, whose name is near; or an empty string."""
    name = str(path).removeprefix("checkpoints/")
    shipped = difflib.get_close_matches(name, [p.name for p in CHECKPOINTS.glob("*")], n=1, cutoff=NEAR)
    return near_path(path) or (f" Did you mean 'checkpoints/{shipped[0]}'?" if shipped else "")
