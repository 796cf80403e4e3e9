"""Activation checkpointing of adapters on one base: equal gradients, less memory, and a plan that says so."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from distill import config
from distill.inspect.plan.meter import Meter
from distill.inspect.plan.skeleton import experiment_of
from distill.inspect.plan.trace import trace
from distill.models.diffusers import load
from distill.models.lora import SharedBase
from distill.training.placement.blocks import recompute

ROOT = Path(__file__).parents[2]


def adapters(family="sd15", count=1, **kw):
    """A teacher and adapters on it that do something."""
    torch.manual_seed(0)
    teacher = load(f"tiny:{family}", null=None, **kw)
    teacher.net = SharedBase(teacher.net.requires_grad_(False), rank=4)
    students = [copy.deepcopy(teacher).train().requires_grad_(True) for _ in range(count)]
    for student in students:
        for up in student.net.up:
            torch.nn.init.normal_(up, std=0.1)
    return teacher, *students


def call(student):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return student(draw(4, 4, 32, 32), torch.rand(4, generator=generator), text=draw(4, 12, 16))


def once(student):
    """Gradients, peak of the activations and operations of one pass."""
    with (meter := Meter()):
        call(student).square().mean().backward()
    return {n: p.grad for n, p in student.named_parameters()}, max(p[0] for p in meter.peaks.values()), meter.flops


@pytest.mark.parametrize("of", ["role", "teacher"])
def test_recomputed_blocks_of_adapters_give_equal_gradients_from_less_memory(of):
    gradients, peak, operations = once(adapters()[1])
    lean = adapters(checkpointing=of == "teacher")[1]
    if of == "role":
        recompute(lean)
    repeated, lean_peak, lean_operations = once(lean)
    assert all(g is not None and g.abs().sum() > 0 for g in repeated.values())
    assert repeated.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(repeated[name], gradient, rtol=1e-4, atol=1e-8)
    assert lean_peak < 0.5 * peak and 1.1 < lean_operations / operations < 1.6


def test_two_adapters_repeat_their_own_terms_and_leave_the_base_as_it_was():
    teacher, first, second = adapters(count=2)
    alone = [once(copy_)[0] for copy_ in adapters(count=2)[1:]]
    before = {id(m): dict(vars(m)) for m in teacher.net.net.modules()}
    recompute(first)
    recompute(second)
    (call(first).square().mean() + call(second).square().mean()).backward()
    for student, expected in zip((first, second), alone):
        for name, p in student.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-8)
    for module in teacher.net.net.modules():
        assert vars(module).keys() == before[id(module)].keys() and not module._forward_hooks
        assert vars(module).get("gradient_checkpointing") == before[id(module)].get("gradient_checkpointing")


def test_small_networks_are_checkpointed_by_block():
    from distill.denoise import Denoiser
    from distill.models import Transformer
    from distill.noise import RectifiedFlow

    torch.manual_seed(0)
    net = Transformer(size=8, width=32, depth=4, heads=2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    student = Denoiser(copy.deepcopy(SharedBase(net.requires_grad_(False), rank=2)), RectifiedFlow(), "flow")
    for up in student.net.up:
        torch.nn.init.normal_(up, std=0.1)
    x, t, seen = torch.randn(3, 1, 8, 8), torch.rand(3), []
    for lean in (False, True):
        if lean:
            recompute(student)
        student.zero_grad()
        with (meter := Meter()):
            student(x, t).square().mean().backward()
        seen.append(([p.grad.clone() for p in student.parameters()], max(p[0] for p in meter.peaks.values())))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-4, atol=1e-7)
    assert seen[1][1] < 0.6 * seen[0][1]


@pytest.mark.parametrize("layout", ["shared_base", "full"])
def test_the_plan_of_a_text_recipe_saves_what_is_measured(layout):
    """`distill plan` traces the same checkpointing: bytes kept for the student's backward pass."""
    kept = []
    for lean in (False, True):
        keys = ["model=tiny", f"engine.checkpoint_activations={lean}", "method.grid=1", f"roles.layout={layout}"]
        keys += ["roles.teacher.size=[32,32]", "data.shape=[4,32,32]", "data.samples=true"]
        keys += ["roles.adapter=null"] if layout == "full" else []
        experiment, _ = experiment_of(config.load([ROOT / "configs/sd15/lcm_lora.yaml"], keys))
        kept.append(trace(experiment, brief=True).kept["student"])
    assert kept[1] < 0.4 * kept[0]
