"""The network protocol, and that wrappers forward all of it."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.denoise import PROTOCOL, Denoiser, Guided, Network, network_of
from distill.errors import BadInput
from distill.models import Transformer
from distill.models.diffusers import load
from distill.models.diffusers.prompts import encode
from distill.models.diffusers.tiny import builders
from distill.models.heads import FeatureExtractor
from distill.models.lora import LoRAAdapter, SharedBase, apply_layout
from distill.noise import RectifiedFlow

SOURCES = sorted((Path(__file__).parents[2] / "distill").rglob("*.py"))
PROMPTS = ["a cat", "the dog runs"]
OWN = {"base", "merged"}  # not forwarded by wrappers


def protocol_values(net: nn.Module) -> dict:
    return {name: getattr(net, name) for name in PROTOCOL if name not in OWN}


NO_NULL = {
    "stable_audio": "needs a package for its scheduler",
    "adm": "no null class",
}  # image-to-video: test_first_frames.py
TEXT = [f for f in builders() if "i2v" not in f and f not in NO_NULL]


@pytest.mark.parametrize("family", TEXT)
def test_guidance_is_the_same_with_adapters(family):
    """The guided teacher, its null condition and all protocol values, in both layouts."""
    path = f"tiny:{family}"
    size = {"size": (2, 4, 4)} if family == "wan" else {}
    whole, base = load(path, **size), load(path, **size)
    net, cond = whole.net, encode(path, PROMPTS)
    x = torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(1))
    t = torch.full((2,), 0.6)
    roles = {"teacher": base}
    apply_layout(roles, "shared_base", {"rank": 2})
    student = copy.deepcopy(base)
    assert isinstance(student.net, LoRAAdapter)
    with torch.no_grad():
        plain, guided = whole(x, t, **cond), Guided(whole, 5.0)(x, t, **cond)
        assert (guided - plain).abs().max() > 1e-3 * plain.abs().max(), "the null condition changes nothing"
        for role in (base, student):
            torch.testing.assert_close(Guided(role, 5.0)(x, t, **cond), guided)
            null = role.null(cond)
            for key, value in whole.null(cond).items():
                assert torch.equal(null[key], value), key
            for name, value in protocol_values(net).items():
                assert callable(value) or protocol_values(role.net)[name] == value, name


class Everything(Network):
    """A network with values for the whole protocol that differ from the defaults."""

    shape, classes, null_class, guided, flow_map = (3, 4), 7, False, True, True
    conditions, optional_conditions, null_keeps, timesteps, part, folder, source = (
        ("a",),
        ("b",),
        ("a",),
        9,
        "unet",
        "here",
        ("there", None),
    )
    scheduler_settings = {"shift": 5.0}
    needs_null = True

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def null(self, cond):
        return {"null": 1}

    def set_null(self, null):
        self.remembered = null
        return self


def test_wrappers_pass_on_the_whole_protocol():
    net, plain = Everything(), Network()
    shared = SharedBase(net, 1)
    for wrapper in (shared, copy.deepcopy(shared), copy.deepcopy(copy.deepcopy(shared))):
        for name in PROTOCOL:
            if name not in OWN:
                value = getattr(wrapper, name)
                assert value == getattr(net, name) and value != getattr(plain, name), name
        assert wrapper.base is net and wrapper.null({}) == {"null": 1}
        wrapper.set_null(3)
        assert net.remembered == 3


def test_a_plain_module_is_read_by_the_same_names():
    net = nn.Linear(2, 2)
    net.shape, net.guided = (2,), True
    found = network_of(Guided(Denoiser(net, RectifiedFlow()), 2.0))
    assert (found.shape, found.guided, found.flow_map, found.classes) == ((2,), True, False, 0)
    assert found.base is net and torch.equal(found.null({"label": torch.tensor([3])})["label"], torch.tensor([-1]))
    assert not list(found.parameters()), "the view holds no weights of its own"


def test_unknown_layer_is_reported_by_its_name_in_the_base():
    """Not by a name inside the wrapper of the shared base."""
    roles = {"teacher": Denoiser(Transformer(size=4, width=16, depth=2, heads=2), RectifiedFlow())}
    apply_layout(roles, "shared_base", {"rank": 1})
    with pytest.raises(BadInput, match=r"Did you mean 'blocks\.0\.qkv'"):
        FeatureExtractor(roles["teacher"], "blocks.0.qk")


def probes(tree: ast.AST):
    """hasattr and getattr with a constant name of the protocol, and getattr(..., "net")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            of = ast.unparse(node.args[0])
            if name in {*PROTOCOL, "net", "body"} and not of.endswith(("data", "score")):
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_no_code_probes_a_network(path):
    """Only `Foreign` reads attributes that a module may lack."""
    assert not list(probes(ast.parse(path.read_text())))
