"""Each method has a page in docs/methods whose tables and configs agree with the class and the shipped recipes."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml
from torch import nn

from distill import config, methods
from distill.config.objects import signature
from distill.config.recipes import find
from distill.denoise import Denoiser, Gaussian
from distill.models.small import MLP
from distill.noise import RectifiedFlow
from distill.times import LogitNormal, Uniform

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "methods"
SECTIONS = ["Loss", "Algorithm", "Config", "Options", "Pitfalls", "Measured results", "Source"]
BASE = {"grid", "guidance", "ema", "warm_start"}  # options of every method, which a page may repeat
NAMES = sorted(methods.names())
SAMPLERS = {"CTM": "flow map", "MeanFlow": "flow map", "AYF": "flow map"}  # of the README's table
OPTIONAL = {"DMD2", "Curation"}  # arguments decide whether these need samples


def page_of(name: str) -> str:
    return (PAGES / f"{methods.names()[name].rsplit('.', 1)[1]}.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def table(text: str) -> list[list[str]]:
    """The rows of the first table in `text`, without its header; `\\|` is not a border."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def own_options(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments that a class adds to those of Method, or whose default it changes."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p for p in parameters if p.kind == p.KEYWORD_ONLY}


def as_yaml(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", NAMES)
def test_a_page_names_its_class_and_has_the_common_sections(name):
    text = page_of(name)
    assert re.match(rf"# .*\(`{name}`\)\n", text)
    found = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert found == SECTIONS
    assert "Choose it" in text or f"Choose {name}" in text or "Choose ECT" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_roles_agrees_with_the_class(name):
    cls = getattr(methods, name)
    ((trains, frozen, data, sampler),) = table(page_of(name))
    roles = lambda cell: re.findall(r"`(\w+)`", cell)
    assert sorted(roles(trains)) == sorted(cls.trainable)
    assert sorted(roles(frozen)) == sorted(cls.frozen)
    assert data == ("samples" if cls.needs_data else "conditions only")
    built = {"CTM": "GammaSampler", "AYF": "FlowMap"}  # these set their sampler when they are built
    assert sampler == f"`{built.get(name, type(cls.sampler).__name__)}`"


@pytest.mark.parametrize(
    "row", table(section((ROOT / "README.md").read_text(), "Methods")), ids=lambda row: row[0][:20]
)
def test_the_table_of_the_readme_agrees_with_the_classes(row):
    """Sampler and kind of data of every method that a row links."""
    links, sampler, data, _ = row
    for link in re.findall(r"docs/methods/(\w+)\.md", links):
        name = next(n for n, path in methods.names().items() if path.rsplit(".", 1)[1] == link)
        cls = getattr(methods, name)
        if name == "Diffusion":
            assert sampler == "trains a teacher"
        elif name in SAMPLERS:
            assert sampler.startswith(SAMPLERS[name])
        else:
            assert sampler.startswith({"DDIM": "ODE", "Renoise": "multistep consistency"}[type(cls.sampler).__name__])
        assert data.startswith("samples" if cls.needs_data and name not in OPTIONAL else "prompts or labels"), name


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_options_has_every_option_with_its_default(name):
    cls = getattr(methods, name)
    rows = {
        re.fullmatch(r"`(\w+)`", option)[1]: default for option, default, _ in table(section(page_of(name), "Options"))
    }
    schema = signature(cls)
    assert set(own_options(cls)) - BASE <= set(rows), "options without a row"
    assert set(rows) <= set(own_options(cls)) | BASE, "rows without an option"
    for option, cell in rows.items():
        expected = schema[option].default
        if expected is inspect.Parameter.empty:
            assert cell == "required", option
        else:
            assert yaml.safe_load(cell.strip("`")) == as_yaml(expected), option


LAWS = {"uniform": Uniform, "logit-normal": LogitNormal}
STATED = re.compile(r"`null`: (uniform|logit-normal)(?: on )?(?:\((\S+), (\S+)\))?")
DENSITIES = [
    (name, option, STATED.search(text))
    for name in NAMES
    for option, default, text in table(section(page_of(name), "Options"))
    if option in ("`density`", "`distance`") and default == "`null`"
]


@pytest.mark.parametrize(("name", "option", "stated"), DENSITIES, ids=[name for name, *_ in DENSITIES])
def test_the_law_of_times_without_a_density_is_the_stated_one(name, option, stated):
    cls = getattr(methods, name)
    roles = {"student": Denoiser(MLP(2, 8, 1, flow_map=True, guided=True), RectifiedFlow())}
    if "teacher" in cls.frozen:
        roles["teacher"] = Gaussian([0.0, 0.0], 0.5, RectifiedFlow())
    roles |= {role: roles["student"] for role in cls.trainable if role not in ("student", "balance", "head")}
    if cls.judged:
        roles["head"] = nn.Linear(2, 1)
    required = {k for k, p in own_options(cls).items() if p.default is inspect.Parameter.empty}
    assert required <= {"metric"}
    made = cls(roles, **{k: lambda x, **_: x.sum(1) for k in required})
    law, *numbers = stated.groups()
    expected = LAWS[law](*(float(n) for n in numbers if n))
    assert getattr(made, option.strip("`")) == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_that_of_the_recipe_beside_it(name):
    text = section(page_of(name), "Config")
    recipe = yaml.safe_load((ROOT / re.search(r"\.\./\.\./(configs/[\w/.-]+\.yaml)", text)[1]).read_text())
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert shown["method"]["_target_"] == f"distill.methods.{name}"
    for key, value in shown.items():
        assert recipe[key] == value, key


@pytest.mark.parametrize("page", sorted(p.name for p in PAGES.glob("*.md")))
def test_commands_that_train_name_a_recipe_and_keys_that_exist(page):
    text = (PAGES / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"(?:`|^)distill train ([^`\n]+)", text, re.MULTILINE)
    for command in commands:
        words = shlex.split(command)
        cfg = config.load([find(words[0])], words[1:])
        assert cfg.method["_target_"]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_links_every_paper_of_its_module(name):
    module = importlib.import_module(methods.names()[name])
    for url in re.findall(r"https?://arxiv\.org/abs/[\d.]+\d", module.__doc__):
        assert url in page_of(name), url


def test_the_index_lists_every_method_and_the_options_of_all():
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    assert sorted(row[1].strip("`") for row in table(text)) == NAMES
    schema = signature(methods.Method)
    rows = {
        option.strip("`"): default.strip("`") for option, default, _ in table(section(text, "Options of every method"))
    }
    assert set(rows) == BASE
    for option, default in rows.items():
        assert yaml.safe_load(default) == schema[option].default, option
