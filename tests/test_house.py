"""The rules of the house: who may import whom, third parties' doors, sizes, names, what an import costs."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "distill").rglob("*.py"))

RANKS = [  # a room imports rooms above it only
    {"errors", "files", "__init__"},
    {"config"},
    {"noise", "times"},
    {"denoise"},
    {"tangent", "solvers", "losses"},
    {"models"},
    {"data", "methods"},
    {"metrics", "export"},
    {"training"},
    {"inspect"},
    {"cli"},
]
ROOT_FILES = {"__init__.py", "__init__.pyi", "py.typed", "errors.py", "files.py", "noise.py", "times.py", "tangent.py"}
# Words that named things here before the field's words did; value: what replaced them.
RETIRED = {
    "place": "placement",
    "skips": "nonfinite",
    "match": "compatibility",
    "session": "experiment",
    "home": "run_folder",
    "lines": "teacher baseline",
    "bands": "reference curves",
    "ship": "export, write",
    "walk": "sampler, sampling",
    "told": "conditions",
    "watch": "alarms, monitor",
    "see": "callbacks",
    "here": "what it is",
    "leads": "is_rank_zero",
    "let_go": "free_except",
    "said": "message",
    "asked": "options, metrics",
    "beat": "interval",
    "beats": "intervals",
    "tells": "takes_w",
    "speaks": "verbose",
    "promises": "requirements",
    "astray": "leaked",
    "front": "tradeoff",
}
FOREIGN = {
    ("Path", "home"),
    ("re", "match"),
    ("os", "walk"),
    ("ast", "walk"),
    ("wandb", "watch"),
}  # other libraries' names
DOORS = {  # third parties of few modules: the files or folders that import one, and what for
    "diffusers": {
        "models/diffusers/": "loads, encodes and makes stock pipelines",
        "models/families/": "calls stock networks",
        "export/": "writes stock pipelines and loads them again",
        "inspect/check/conventions.py": "compares with the stock DDIM",
    },
    "transformers": {
        "models/diffusers/prompts.py": "text encoders",
        "models/diffusers/tiny_parts.py": "tiny text encoders",
        "metrics/networks/vision.py": "networks that compute features",
    },
    "peft": {"export/stock.py": "loads an exported adapter as a stranger does"},
    "deepspeed": {"training/placement/deepspeed.py": "engines"},
    "wandb": {"training/loggers.py": "its dashboard"},
    "torch.utils.tensorboard": {"training/loggers.py": "its dashboard"},
    "omegaconf": {"config/": "configs; others use `config.plain`, `config.merge` and `config.DictConfig`"},
    "webdataset": {"data/shards/": "reads and writes shards"},
    "jinja2": {"inspect/report/": "pages"},
    "lightning": {
        "methods/module.py": "LightningModule",
        "training/": "the Trainer and its callbacks",
        "inspect/compare.py": "a callback that takes times",
        "inspect/bench.py": "a callback that takes times",
    },
}


LONG = {  # files over 400 lines, and why
    "noise.py": 420,  # one class a schedule
}


LONG_FUNCTIONS = {  # over 40 lines without the docstring, and why
    "pairs.write": 52,  # one loop that keeps its place in an interrupted file
    "write.export": 48,  # the order of the steps of an export
    "guidance._conditions": 49,  # one finding a case
    "compare.measure_recipe": 45,  # a row and its keys
    "run._build_callbacks": 45,  # the list of callbacks
    "updates.learns_conditions": 42,  # one finding a case
    "conventions.denoises": 42,  # one finding a case
    "unet2d.__init__": 43,  # one attribute an argument
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
def test_modules_import_public_names_alone(path):
    """Nor do they read a private name of an imported module of the package."""
    tree, modules = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distill":
            folder = ROOT.joinpath(*node.module.split("."))
            for name, known_as in ((a.name, a.asname or a.name) for a in node.names):
                assert name.startswith("__") or not name.startswith("_"), f"{path.name} imports {node.module}.{name}"
                if (folder / f"{name}.py").exists() or (folder / name).is_dir():
                    modules.add(known_as)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert node.attr.startswith("__") or not node.attr.startswith("_"), f"{path.name}: {ast.unparse(node)}"


def test_third_parties_are_imported_at_their_doors_alone():
    """And each door is one: a file or folder that no longer imports the package is taken off the list."""
    used = {package: set() for package in DOORS}
    for path in SOURCES:
        inside = str(path.relative_to(ROOT / "distill"))
        for module in imports(path):
            for package in (p for p in DOORS if f"{module}.".startswith(f"{p}.")):
                doors = {d for d in DOORS[package] if inside == d or d.endswith("/") and inside.startswith(d)}
                assert doors, f"{inside} imports {module}"
                used[package] |= doors
    assert used == {package: set(doors) for package, doors in DOORS.items()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_and_well_named(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONG.get(path.name, 400)
    assert path.stem not in ("utils", "common", "helpers", "manager", "core")
    assert not re.search(r"\b(TODO|FIXME)\b", text)


def test_functions_are_short():
    """At most 40 lines without the docstring, or what LONG_FUNCTIONS states, which holds no function that is short."""
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0] if ast.get_docstring(node) else None
                text = first.end_lineno - first.lineno + 1 if first else 0
                if (lines := node.end_lineno - node.lineno + 1 - text) > 40:
                    long[f"{path.stem}.{node.name}"] = lines
    assert long.keys() == LONG_FUNCTIONS.keys()
    assert not {name: lines for name, lines in long.items() if lines > LONG_FUNCTIONS[name]}


def test_importing_distill_costs_little_more_than_torch():
    def seconds(line: str) -> float:
        code = f"import time; t = time.perf_counter(); {line}; print(time.perf_counter() - t)"
        return min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5))

    core = "import torch, distill, distill.noise, distill.times, distill.denoise, distill.solvers, distill.losses"
    assert seconds(core) <= 1.5 * seconds("import torch")


def test_the_core_imports_neither_lightning_nor_diffusers():
    names = "distill, distill.noise, distill.denoise, distill.solvers, distill.losses, distill.models, distill.cli"
    heavy = ("lightning", "diffusers", "wandb", "deepspeed")
    code = f"import sys, {names}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_shipped_recipe_resolves():
    from omegaconf import DictConfig

    from distill import config

    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        cfg = config.load([path])
        for where in ("method", "data", "roles"):
            for key, value in [(where, cfg[where]), *((f"{where}.{k}", v) for k, v in cfg[where].items())]:
                if isinstance(value, DictConfig) and value.get("_target_"):
                    target = config.resolve(value["_target_"])
                    unknown = set(value) - {"_target_"} - set(config.signature(target))
                    assert not unknown or config.open_ended(target), f"{path.name}: {key} has {unknown}"


def test_the_root_holds_what_the_design_lists():
    files = {p.name for p in (ROOT / "distill").iterdir() if p.is_file()}
    folders = {p.name for p in (ROOT / "distill").iterdir() if p.is_dir() and p.name != "__pycache__"}
    rooms = {name for names in RANKS for name in names} - {"__init__"}
    assert files <= ROOT_FILES
    assert {f.removesuffix(".py") for f in files if f.endswith(".py")} - {"__init__"} | folders <= rooms


def test_no_two_classes_share_a_name():
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}


# Plain names that several modules once gave to different functions; a second one needs a name that says what it does.
UNIQUE = {"compare", "decoder", "fingerprint", "markdown", "mmd"}


def test_no_two_functions_share_one_of_the_unique_names():
    """Verbs of the command line, which call a function of the same task, are not counted."""
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body if room(path) != "cli" else ():
            if isinstance(node, ast.FunctionDef) and node.name in UNIQUE:
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}


def identifiers(tree: ast.AST):
    """Names that the code itself gives or uses: functions, classes, variables, arguments, attributes, modules."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (owner, node.attr) not in FOREIGN:
                yield node.attr
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.split(".")[-1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_retired_words_are_gone(path):
    names = {path.stem, *identifiers(ast.parse(path.read_text()))}
    retired = {name for name in names if name.strip("_").lower() in RETIRED}
    assert not retired, {name: RETIRED[name.strip("_").lower()] for name in retired}


def test_config_keys_and_options_use_no_retired_word():
    import click

    from distill.cli import main
    from distill.config import schema

    def options(command):
        yield from (name for p in command.params for name in (p.name, *p.opts))
        for child in getattr(command, "commands", {}).values():
            yield from (child.name, *options(child))

    keys = [
        f.name
        for c in (schema.RunConfig, schema.Train, schema.Engine, schema.Log, schema.Eval, schema.Optim)
        for f in c.__dataclass_fields__.values()
    ]
    assert isinstance(main, click.Group)
    words = {name.strip("-").replace("-", "_") for name in (*keys, *options(main))}
    assert not words & set(RETIRED)


def test_the_lowest_constraints_are_the_lower_bounds_of_pyproject():
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    listed = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(r for e in extras for r in e),
    ]
    needed = [r for r in map(Requirement, listed) if r.name != project["project"]["name"]]
    bounds = {r.name: Version(s.version) for r in needed for s in r.specifier if s.operator == ">="}
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = {name: Version(version) for name, _, version in (x.partition("==") for x in lines if x[:1] != "#")}
    assert pinned == bounds and len(bounds) == len({r.name for r in needed})


def test_names_of_tests_use_no_retired_word():
    """Those of RETIRED that are no plain English word in a sentence; `nets` is `models` now."""
    plain = {"place", "match", "home", "lines", "see", "here", "beats", "front", "watch"}
    retired = (set(RETIRED) | {"nets"}) - plain
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                words = set(node.name.split("_")) & retired
                assert not words, f"{path.name}::{node.name}: {words}"


def test_no_two_test_files_have_one_name():
    """Pytest imports them by their names alone."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
