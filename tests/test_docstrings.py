"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

from distill.models.diffusers import tiny

PACKAGES = ("distill.denoise", "distill.losses", "distill.solvers")
MODULES = ("distill.models.diffusers.loading", "distill.models.small", "distill.noise", "distill.times")
REQUIRED = {  # objects whose docstring must have an example
    "distill.denoise.denoiser": ("Denoiser", "Guided"),
    "distill.denoise.exact": ("Gaussian", "GaussianMixture"),
    "distill.models.diffusers.loading": ("load",),
    "distill.noise": ("RectifiedFlow",),
    "distill.solvers.onestep": ("DDIM",),
    "distill.solvers.solve": ("solve",),
    "distill.times": ("Grid",),
}


def modules() -> list[str]:
    names = list(MODULES)
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        names += [package, *(f"{package}.{module.name}" for module in pkgutil.iter_modules(path))]
    return sorted(names)


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    if name.startswith("distill.models.diffusers"):
        tiny.folder("sd15")  # what other libraries print while it is first written is not the example's output
    torch.manual_seed(0)
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


@pytest.mark.parametrize("name, objects", REQUIRED.items())
def test_main_objects_have_examples(name, objects):
    finder = doctest.DocTestFinder(exclude_empty=True)
    with_examples = {test.name for test in finder.find(importlib.import_module(name)) if test.examples}
    assert {f"{name}.{item}" for item in objects} <= with_examples


def test_public_functions_and_classes_have_docstrings():
    """Those of a module's top level."""
    root = Path(importlib.import_module("distill").__file__).parent
    missing = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(root)}::{node.name}")
    assert not missing
