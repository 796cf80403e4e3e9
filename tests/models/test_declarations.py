"""Each family is one file with one declaration, and nothing else names a family."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import diffusers
import pytest
import torch

from distill.models.families.registry import families

PACKAGE = Path(__file__).parents[2] / "distill"
FILES = {Path(PACKAGE.parent, *f.origin.split(".")).with_suffix(".py"): f for f in families()}
DECLARATION, OWN_CODE = 60, 200  # lines at most, without docstrings
# Names that a module outside `models/families` may hold, and why.
ALLOWED = {
    "models/diffusers/__init__.py": {"DiT": "public name of an adapter", "UNet2D": "public name of an adapter"},
}


def names() -> list[str]:
    """Class names of stock networks, of adapters and of pipelines, and what they begin with."""
    found = set()
    for family in families():
        found |= {family.network, re.sub(r"(Video)?(Transformer\dD|Condition|DiT)?Model$", "", family.network)}
        found |= {re.sub("Pipeline$", "", model.pipeline) for model in family.published.values()}
        found |= {family.adapter.__name__} if family.adapter else set()
    return sorted(found)


def code_lines(tree: ast.AST, text: str) -> set[int]:
    """Numbers of the lines that are neither empty, nor a comment, nor in a docstring."""
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_every_family_has_a_file_of_its_own():
    assert len(FILES) == len(families()) and all(path.is_file() for path in FILES)
    shared = {"__init__.py", "family.py", "registry.py", "refusals.py"}
    assert {p.name for p in (PACKAGE / "models" / "families").glob("*.py")} == shared | {p.name for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_declaration_and_its_code_are_short(path):
    text = path.read_text()
    tree = ast.parse(text)
    declared = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "FAMILY"]
    lines = code_lines(tree, text)
    declaration = lines & set(range(declared[0].lineno, declared[0].end_lineno + 1))
    print(f"{path.stem}: {len(declaration)} + {len(lines - declaration)}")
    assert len(declared) == 1 and len(declaration) <= DECLARATION
    assert len(lines - declaration) <= OWN_CODE


def test_no_other_module_names_a_family():
    """Neither in code nor in a docstring or comment; what is allowed is there, so that the list only shrinks."""
    pattern = re.compile(rf"(?<![A-Za-z])({'|'.join(map(re.escape, names()))})(?![a-z])")
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if (PACKAGE / "models" / "families") not in path.parents and (named := set(pattern.findall(path.read_text()))):
            found[str(path.relative_to(PACKAGE))] = named
    assert {"Flux", "Wan", "CogVideoX", "LTX", "PixArt", "Sana", "SD3", "StableDiffusion", "DiT"} <= set(names())
    assert found == {path: set(allowed) for path, allowed in ALLOWED.items()}


def test_the_twins_have_no_zero_weights():
    """A layer of zeros would hide what is fed to it from the parity tests."""
    for family in families():
        for name, twin in family.twins.items():
            if name != "stable_audio":  # whose scheduler needs a package
                network = twin.build().components[family.part]
                zero = [key for key, p in network.named_parameters() if not p.any()]
                assert not zero, (name, zero)


@pytest.mark.parametrize("name", [name for family in families() for name in family.published])
def test_a_published_model_is_supported_and_of_its_size(name):
    family = next(family for family in families() if name in family.published)
    model = family.published[name]
    with torch.device("meta"):
        network = getattr(diffusers, family.network).from_config(dict(model.network))
    family.check_supported(network)
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(model.parameters, rel=5e-3)
    assert set(family.variant(network).get("conditions", family.conditions)) == set(model.conditions)
    assert len(family.default_shape(network.config)) == len(model.shape)


def test_names_of_twins_and_of_published_models_are_unique():
    for field in ("twins", "published"):
        listed = [name for family in families() for name in vars(family)[field]]
        assert len(listed) == len(set(listed))
