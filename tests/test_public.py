"""`import distill`: what it offers, that its examples run, and what it costs."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distill
from distill.training import callbacks

HEAVY = ("torch", "numpy", "lightning", "diffusers", "transformers", "omegaconf", "matplotlib")


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory):
    """The examples run in one folder, in the order of a session: the package's own first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("public"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(callbacks, "PRINT_EVERY", float("inf"))  # a slow machine prints no line of progress
        threads = torch.get_num_threads()
        short = ("train.steps=5", "method.warm_start=0", "eval.evaluations=[2]", "eval.samples=200", "train.threads=1")
        distill.train("toy/tdm", *short, "log.wandb=disabled", runs="runs")
        yield
        torch.set_num_threads(threads)


def examples(text: str, name: str) -> doctest.TestResults:
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(text, {"distill": distill}, name, None, None)
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    runner.run(test, out=sys.stdout.write)
    return runner.summarize(verbose=False)


NAMES = [n for n in distill.__all__ if n != "__version__"]  # a string has no docstring
SLOW = ("export_run",)  # ONNX, the form of a student of points, takes five seconds


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def test_the_example_of_each_name_runs(name):
    value = getattr(distill, name)
    text = inspect.getdoc(value)
    assert ">>>" in text and "Traceback" not in text
    if name == "load":
        distill.load("tiny:sd15")  # libraries print when they are first imported
    found = examples(text, name)
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.slow
def test_the_examples_of_the_package_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = examples(distill.__doc__, "distill")
    assert found.attempted > 5 and found.failed == 0


def test_every_public_name_is_there_documented_and_in_the_stub():
    for name in distill.__all__:
        assert getattr(distill, name) is not None
        assert name == "__version__" or len(inspect.getdoc(getattr(distill, name))) > 20, name
    assert set(distill.__all__) <= set(dir(distill))
    stub = ast.parse(Path(distill.__file__).with_suffix(".pyi").read_text())
    named = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert named == set(distill.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="module 'distill' has no attribute 'tarin'"):
        _ = distill.tarin


@pytest.mark.parametrize("command", [["-c", "import distill"], ["-c", "import distill.cli"]], ids=["package", "cli"])
def test_importing_loads_nothing_heavy(command):
    code = f"{command[1]}; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_help_comes_at_once_and_imports_no_torch():
    def seconds(*arguments: str) -> float:
        code = (
            "import subprocess, sys, time; t = time.perf_counter(); subprocess.run(sys.argv[1:], check=True, stdout=-3)"
        )
        command = [sys.executable, "-c", f"{code}; print(time.perf_counter() - t)", sys.executable, *arguments]
        return min(float(subprocess.check_output(command)) for _ in range(5))

    assert seconds("-m", "distill.cli", "--help") - seconds("-c", "pass") <= 0.5
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "distill.cli", "train", "--help"], capture_output=True, text=True
    ).stderr
    assert "distill.cli.training" in trace and not any(f"| {m}\n" in trace.replace("|   ", "| ") for m in HEAVY)


def test_metrics_of_a_run_are_those_of_its_file(tmp_path):
    run = distill.open_run("runs/toy-tdm")
    assert torch.equal(run.sample(6, seed=3), run.sample(6, seed=3)) and repr(run) == "Run('runs/toy-tdm')"
    result = run.evaluate(samples=100)
    assert run.metrics["student"].keys() == result["student"].keys()
    (run.folder / "metrics.json").write_text("{")
    with pytest.raises(distill.BadInput, match="metrics.json is not JSON .*; write it again by `distill eval"):
        run.export(tmp_path / "out")
