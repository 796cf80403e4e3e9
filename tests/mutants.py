"""Mutation testing: single changes of arithmetic, comparisons, constants and signs, each against the module's own fast tests.

    python tests/mutants.py                     # all of distill/losses, and 400 of distill/methods drawn by a seed
    python tests/mutants.py distill/losses/snr.py

The mutants are those of cosmic-ray. They are never written to disk: a process that has imported torch is forked for each, and the
fork imports the changed module. Of the module's tests those run that execute the changed statement, the quickest first; for a
change outside functions, such as a default, all. A mutant is killed if a test fails, the module does not import, or the tests run
four times as long. Results are appended to `mutants.csv` and a second run continues; survivors and their reasons are in
tests/mutants.md.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gc
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = tuple(str(ROOT / "distill" / name) for name in ("losses", "methods"))
OPERATORS = [
    *(
        f"ReplaceBinaryOperator_{pair}"
        for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Div")
    ),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE")),
    *(
        f"ReplaceComparisonOperator_{pair}"
        for pair in ("GtE_Gt", "GtE_Lt", "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")
    ),
    "ReplaceUnaryOperator_USub_UAdd",
    "NumberReplacer",
]
PRELOADED = (
    "torch",
    "torch.utils.checkpoint",
    "lightning",
    "omegaconf",
    "numpy",
    "scipy.stats",
    "scipy.linalg",
    "pytest",
    "torch.testing",
    "torch._dynamo",
)
LAWS = ("ayf", "consistency", "ctm", "ect", "guidance", "meanflow", "pcm", "progressive", "scm")
UNUSED = ("cacheprovider", "xdist", "unraisableexception", "anyio", "terminalreporter")  # half of a short run's time
TESTS = {  # of modules whose tests are not in `tests/KIND/test_NAME.py` alone; none compares with a stored number
    "losses/flowmap": "losses/test_average_velocity",
    "methods/__init__": "test_public",
    "methods/base": "methods/test_method methods/test_module methods/test_laws methods/test_start_noise methods/test_rewards",
    "methods/diversity": "methods/test_diversity_rewarded",
    "methods/dmd2": "methods/test_critics methods/test_heads methods/test_dmd2",
    "methods/dpo": "methods/test_critics methods/test_dpo",
    "methods/ladd": "methods/test_heads methods/test_ladd",
    "methods/mmd": "methods/test_mmd_ddm",
    "methods/module": "methods/test_method methods/test_module methods/test_optimizers methods/test_rewards",
    "methods/nonfinite": "methods/test_method",
    "methods/optim": "methods/test_method methods/test_optimizers",
    "methods/placement": "methods/test_method methods/test_module methods/test_weights_in_float32",
    "methods/sid": "methods/test_critics methods/test_sid",
    "methods/tdm": "methods/test_critics methods/test_tdm",
    **{f"methods/{name}": f"methods/test_laws methods/test_{name}" for name in LAWS},
}
PAGES = "methods/test_pages"  # the defaults that a method's page states
SLOWER = {  # tests of mutants that the first tests do not notice
    "methods/base": "training/test_stock_trainer",
    "methods/module": "training/test_stock_trainer",
    "methods/nonfinite": "training/test_nonfinite",
    "methods/placement": "training/test_nonfinite training/test_stock_trainer",
}


@dataclass(frozen=True)
class Mutant:
    """One change: the operator's occurrence in a module, and the line before and after."""

    module: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str
    code: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.module, self.operator, str(self.occurrence), self.before


def mutants(path: Path) -> list[Mutant]:
    """All mutants of a module, without those of a bare `*` in a signature."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source, found = path.read_text(), []
    for name in OPERATORS:
        operator, occurrence = get_operator(f"core/{name}")(), 0
        while (code := mutate_code(source, operator, occurrence)) is not None:
            pairs = zip(source.splitlines(), code.splitlines())
            line, before, after = next((i, a, b) for i, (a, b) in enumerate(pairs, 1) if a != b)
            if before.strip() != "*,":
                module = str(path.resolve().relative_to(ROOT))
                found.append(Mutant(module, name, occurrence, line, before.strip(), after.strip(), code))
            occurrence += 1
    return found


class Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from other source text."""

    def __init__(self, path: Path, code: str):
        parts = path.relative_to(ROOT).with_suffix("").parts
        self.package = parts[-1] == "__init__"
        self.name, self.path, self.code = ".".join(parts[:-1] if self.package else parts), path, code

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(
            fullname,
            self.path,
            loader=self,
            submodule_search_locations=[str(self.path.parent)] if self.package else None,
        )

    def exec_module(self, module):
        exec(compile(self.code, str(self.path), "exec"), module.__dict__)  # noqa: S102


def tests_of(module: str) -> list[list[str]]:
    """Files of the tests of `distill/KIND/NAME.py`: its own ones, its page's, and slower ones of what these do not notice."""
    kind, name = Path(module).parts[1], Path(module).stem
    page, slower = PAGES if kind == "methods" else "", SLOWER.get(f"{kind}/{name}", "")
    stages = TESTS.get(f"{kind}/{name}", f"{kind}/test_{name}"), page, slower
    return [[f"tests/{name}.py" for name in stage.split()] for stage in stages if stage]


class Measured:
    """A pytest plugin that writes, of each test, its seconds and the lines of the package that it executes."""

    def __init__(self, out: Path):
        self.out, self.found = out, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        lines: dict[str, set[int]] = {}

        def local(frame, event, arg):
            lines[frame.f_code.co_filename].add(frame.f_lineno)
            return local

        def trace(frame, event, arg):
            name = frame.f_code.co_filename
            if not name.startswith(FOLDERS):
                return None
            lines.setdefault(name, set())
            return local(frame, event, arg)

        started = time.monotonic()
        sys.settrace(trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            seconds = time.monotonic() - started
            self.found[item.nodeid] = seconds, {str(Path(k).relative_to(ROOT)): [*v] for k, v in lines.items()}

    def pytest_sessionfinish(self):
        self.out.write_text(json.dumps(self.found))


class Chosen:
    """A pytest plugin that runs these tests in this order."""

    def __init__(self, tests: list[str]):
        self.order = {name: i for i, name in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])


def statement_of(mutant: Mutant) -> range | None:
    """The lines of the innermost statement that changes; None outside functions, and for their defaults."""
    functions = [n for n in ast.walk(ast.parse((ROOT / mutant.module).read_text())) if isinstance(n, ast.FunctionDef)]
    inner = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.stmt) and n is not f]
    lines = [range(n.lineno, n.end_lineno + 1) for n in inner if n.lineno <= mutant.line <= n.end_lineno]
    return min(lines, key=len, default=None)


def outcome_of(mutant: Mutant, measured: dict[str, dict[str, Any]]) -> str:
    """ "killed" or "survived". `measured`: what `Measured` found of each file of tests, filled as needed."""
    lines = statement_of(mutant)
    stages = tests_of(mutant.module)
    if lines is None:
        stages.sort(key=lambda files: PAGES not in files[0])  # a page states the defaults
    for files in stages:
        for file in files:
            if file not in measured:
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "tests.json"
                    if run_tests([file], None, 1800, Measured(out)) != "passed":
                        sys.exit(f"The tests of {mutant.module} fail without a mutant: pytest {file}")
                    measured[file] = json.loads(out.read_text())
        tests = {name: found for file in files for name, found in measured[file].items()}
        if lines:
            tests = {k: v for k, v in tests.items() if set(lines) & set(v[1].get(mutant.module, ()))}
        order = sorted(tests, key=lambda name: tests[name][0])
        limit = 20 + 4 * sum(seconds for seconds, _ in tests.values())
        used = [file for file in files if any(name.startswith(f"{file}::") for name in order)]
        if order and run_tests(used, mutant, limit, Chosen(order)) != "passed":
            return "killed"
    return "survived"


def run_tests(files: list[str], mutant: Mutant | None, limit: float, *plugins: Any) -> str:
    """ "passed", "failed" or "timeout" of the files in a fork that sees the mutant."""
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.setsid()
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 1
        try:
            if mutant:
                sys.meta_path.insert(0, Replaced(ROOT / mutant.module, mutant.code))
            quiet = ["-x", "-q", *(f"-pno:{plugin}" for plugin in UNUSED), "-oaddopts=", "-mnot slow"]
            code = int(pytest.main([*quiet, *files], plugins=[*plugins]))
        finally:
            os._exit(code)
    while time.monotonic() - started < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", type=Path, help="all of losses and a draw of methods by default")
    parser.add_argument("--draw", type=int, default=400, help="mutants of methods, default 400")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--part", default="1/1", help="I/N: the I-th of N parts, for several processes with results of their own"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "mutants.csv")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

    if options.modules:
        chosen = [m for path in options.modules for m in mutants(path)]
    else:
        chosen = [m for path in sorted((ROOT / "distill/losses").glob("*.py")) for m in mutants(path)]
        of_methods = [m for path in sorted((ROOT / "distill/methods").glob("*.py")) for m in mutants(path)]
        chosen += random.Random(options.seed).sample(of_methods, min(options.draw, len(of_methods)))
    part, parts = map(int, options.part.split("/"))
    chosen = chosen[len(chosen) * (part - 1) // parts : len(chosen) * part // parts]
    known = {}
    if options.results.exists():
        with options.results.open() as file:
            known = {tuple(row[:4]): row[6] for row in csv.reader(file)}
    for name in PRELOADED:
        importlib.import_module(name)

    gc.freeze()  # or the first collection of each fork copies all pages
    measured: dict[str, dict[str, Any]] = {}
    counts: dict[str, list[int]] = {}
    for mutant in chosen:
        outcome = known.get(mutant.key)
        if outcome is None:
            outcome = outcome_of(mutant, measured)
            with options.results.open("a") as file:
                csv.writer(file).writerow([*mutant.key, mutant.after, mutant.line, outcome])
            if outcome == "survived":
                print(f"{mutant.module}:{mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
        count = counts.setdefault(mutant.module, [0, 0])
        count[0] += outcome == "killed"
        count[1] += 1
    for module, (killed, total) in counts.items():
        print(f"{module:40} {killed:4} of {total:4} killed")
    killed, total = (sum(count[i] for count in counts.values()) for i in (0, 1))
    print(f"{'all':40} {killed:4} of {total:4} killed, {100 * killed / max(total, 1):.1f} %")


if __name__ == "__main__":
    main()
