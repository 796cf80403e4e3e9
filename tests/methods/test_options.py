"""Options that recipes need: each keyword of a method is set by some recipe, or is one of the settings listed here."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distill import config, methods
from distill.methods.base import Method

ROOT = Path(__file__).parents[2]
BASE = set(inspect.signature(Method.__init__).parameters)

# Numbers, laws and solvers that the recipes leave at the papers' values; the tests of each method pass others.
DEFAULTS = {
    "AYF": "c distance gamma guidance_range jvp share_max",
    "CTM": "denoise density gamma solver weighted",
    "ConsistencyTraining": "target_ema weigh",
    "Curation": "density temperature",
    "Diffusion": "density drop_label",
    "DiffusionDPO": "density pair_steps",
    "DistillationDPO": "density normalise student_every",
    "Guidance": "density",
    "LADD": "balance distillation r1_step",
    "MeanFlow": "c jvp",
    "PCM": "guidance_range solver",
    "Progressive": "rung_steps",
    "Reflow": "density",
    "SCM": "c jvp sigma_data",
    "SiD": "density student_every",
    "TDM": "critic_weight margin separate snr_max student_every",
}


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
    keywords = set(inspect.signature(getattr(methods, name).__init__).parameters) - BASE - {"base"}
    listed = set(DEFAULTS.get(name, "").split())
    assert listed <= keywords, f"{name} has no option {', '.join(listed - keywords)}: use DEFAULTS"
    unused = keywords - used[name] - listed
    assert not unused, (
        f"no recipe sets {', '.join(sorted(unused))} of {name}: write one that needs it, or delete the option"
    )
