"""Options that recipes need: each keyword of a method is set by some recipe, or is one of the settings listed here."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from distill import config, methods
from distill.methods.base import Method

ROOT = Path(__file__).parents[2]
BASE = set(inspect.signature(Method.__init__).parameters)

# Numbers, laws and solvers that the recipes leave at the papers' values; the tests of each method pass others.
# Switches choose other code and need a recipe: flags, names except NAMES, averaged targets and a drawn guidance.
DEFAULTS = {
    "AYF": "c distance gamma share_max",
    "CTM": "denoise density solver",
    "Curation": "density",
    "Diffusion": "density drop_label",
    "DiffusionDPO": "density pair_steps",
    "DistillationDPO": "density normalise student_every",
    "Guidance": "density",
    "LADD": "r1_step",
    "MeanFlow": "c",
    "PCM": "solver",
    "Progressive": "rung_steps",
    "Reflow": "density",
    "SCM": "c sigma_data",
    "SiD": "density student_every",
    "TDM": "margin snr_max student_every",
}
NAMES = {"solver", "normalise"}  # of code that recipes of other methods run


def is_switch(option: inspect.Parameter) -> bool:
    """By its annotation: a flag, or a name; `float | str` is a number with the value `auto`."""
    types = set(re.findall(r"\w+", str(option.annotation)))
    named = "str" in types and not types & {"float", "int"} and option.name not in NAMES
    return "bool" in types or named or option.name.endswith("_ema") or option.name == "guidance_range"


def settings(node) -> list[dict]:
    """Every mapping with a `_target_` within a config."""
    if isinstance(node, dict):
        inner = [found for value in node.values() for found in settings(value)]
        return [node, *inner] if config.TARGET in node else inner
    return [found for value in node for found in settings(value)] if isinstance(node, list) else []


@pytest.fixture(scope="module")
def used() -> dict[str, set[str]]:
    """Method -> the keywords that some recipe under configs/ sets."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        for node in settings(OmegaConf.to_container(config.load([path]), resolve=False)):
            found.setdefault(str(node[config.TARGET]).rsplit(".", 1)[1], set()).update(node)
    return found


@pytest.mark.parametrize("name", methods.names())
def test_each_option_is_set_by_a_recipe_or_is_a_listed_default(name, used):
    signature = inspect.signature(getattr(methods, name).__init__).parameters
    keywords = set(signature) - BASE - {"base"}
    listed = set(DEFAULTS.get(name, "").split())
    assert listed <= keywords, f"{name} has no option {', '.join(listed - keywords)}: use DEFAULTS"
    stale = listed & used[name]
    assert not stale, f"a recipe sets {', '.join(sorted(stale))} of {name}: take it out of DEFAULTS"
    switches = sorted(option for option in listed if is_switch(signature[option]))
    assert not switches, (
        f"{', '.join(switches)} of {name} chooses other code: write a recipe that needs it, or delete it"
    )
    unused = keywords - used[name] - listed
    assert not unused, (
        f"no recipe sets {', '.join(sorted(unused))} of {name}: write one that needs it, or delete the option"
    )


def test_flags_names_averages_and_drawn_guidance_are_switches():
    def options(
        flag: bool = False,
        flag_or_name: bool | str = False,
        name: str | None = None,
        target_ema: float = 0.0,
        guidance_range: list[float] | None = None,
        solver: str = "heun",
        number: float = 1.0,
        number_or_auto: float | str | None = "auto",
        density: Any = None,
    ): ...

    found = {name for name, option in inspect.signature(options).parameters.items() if is_switch(option)}
    assert found == {"flag", "flag_or_name", "name", "target_ema", "guidance_range"}
