"""The rules of the house: who may import whom, third parties' doors, sizes, names, what an import costs."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "distill").rglob("*.py"))

RANKS = [
    {"errors", "noise", "schema", "__init__"},
    {"config"},
    {"grid", "skips"},
    {"denoise"},
    {"place"},
    {"tangent", "solvers", "losses", "nets", "data"},
    {"methods", "eval", "export", "match"},
    {"engine"},
    {"session"},
    {"run"},
    {"bands"},
    {"report"},
    {"demo", "compare", "merge", "bench", "check", "encode", "audit", "score", "plan"},
    {"cli"},
]
DOORS = {
    "diffusers": {"nets/diffusers/", "export/"},
    "peft": {"nets/diffusers/", "export/"},
    "deepspeed": {"engine/strategy.py"},
    "wandb": {"engine/dashboards.py"},
    "tensorboard": {"engine/dashboards.py"},
    "omegaconf": {"config.py", "session.py", "run.py", "demo.py", "compare.py", "bench.py", "bands.py", "score.py", "report/",
                  "plan/"},
    "webdataset": {"data/"},
    "plotly": {"report/"},
    "jinja2": {"report/"},
    "lightning": {"methods/base.py", "engine/", "cli/", "compare.py", "bench.py"},
}


def imports(path: Path):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" if node.module == "distill" else node.module for a in node.names)


def room(path: Path) -> str:
    return path.relative_to(ROOT / "distill").parts[0].removesuffix(".py")


def rank(name: str) -> int:
    return next(i for i, names in enumerate(RANKS) if name in names)


def test_no_circle_of_imports():
    """Lazy ones count too. What is taken from a package's face is its file's where it is one of its files."""
    name = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")  # noqa: E731
    modules = {name(path): path for path in SOURCES}
    graph = {here: set() for here in modules}
    for here, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                graph[here] |= {f if (f := f"{node.module}.{a.name}") in modules else node.module for a in node.names}
            elif isinstance(node, ast.Import):
                graph[here] |= {alias.name for alias in node.names}
        graph[here] &= modules.keys() - {here}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room(path)
    for module in imports(path):
        if module.split(".")[0] == "distill" and module != "distill":
            there = module.split(".")[1]
            if there == here or there in ("__version__", "errors"):
                continue
            assert rank(there) < rank(here), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_third_parties_have_one_door(path):
    inside = str(path.relative_to(ROOT / "distill"))
    for module in imports(path):
        doors = DOORS.get(module.split(".")[0])
        assert doors is None or any(inside.startswith(d) for d in doors), f"{inside} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_and_well_named(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert path.stem not in ("utils", "common", "helpers", "manager", "core")
    assert not re.search(r"\b(TODO|FIXME)\b", text)


def test_importing_distill_costs_little_more_than_torch():
    def seconds(line: str) -> float:
        code = f"import time; t = time.perf_counter(); {line}; print(time.perf_counter() - t)"
        return min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))

    core = "import torch, distill, distill.noise, distill.grid, distill.denoise, distill.solvers, distill.losses"
    assert seconds(core) <= 1.5 * seconds("import torch")


def test_the_core_imports_neither_lightning_nor_diffusers():
    names = "distill, distill.noise, distill.denoise, distill.solvers, distill.losses, distill.nets, distill.cli"
    heavy = ("lightning", "diffusers", "wandb", "deepspeed")
    code = f"import sys, {names}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_shipped_recipe_resolves():
    from distill import config

    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        cfg = config.load([path])
        for where in ("method", "data", "roles"):
            for key, value in [(where, cfg[where]), *((f"{where}.{k}", v) for k, v in cfg[where].items())]:
                if isinstance(value, config.DictConfig) and value.get("_target_"):
                    target = config.resolve(value["_target_"])
                    unknown = set(value) - {"_target_"} - set(config.signature(target))
                    assert not unknown or config.open_ended(target), f"{path.name}: {key} has {unknown}"
