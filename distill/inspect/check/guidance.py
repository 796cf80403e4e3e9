"""Checks of guidance and initialisation: conditions change the teacher, w = 1 is conditional, student equals teacher."""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import has_network, network_of
from distill.errors import BadInput
from distill.inspect.check.base import CheckContext, Finding, Findings
from distill.inspect.check.conventions import ConventionFit
from distill.models.lora import LoRAAdapter
from distill.noise import bcast


def guides(context: CheckContext) -> Findings:
    """The condition changes the teacher's output, there is a null condition, and w counts from 1 (conditional)."""
    role, model = context.pretrained()
    w, drawn = context.method.guidance, context.cfg.method.get("guidance_range")
    used = drawn is not None or w != 1
    if "weak" in context.method.frozen:
        yield Finding.skipped("guidance is by the weaker model roles.weak.")
        return
    if drawn is None and w < 1:
        yield Finding.warn(
            f"method.guidance: {w:g} is below 1, and 1 is the conditional model, 0 the unconditional one; a "
            "paper that counts from 0 calls ours its w + 1."
        )
    if model is None and context.random and "teacher" in context.method.frozen:
        role, model = "teacher", context.method.teacher  # random weights depend on conditions too
    if model is None:
        yield Finding.skipped("no role is trained on a condition yet.")
        return
    if not context.cond:
        if used:
            yield Finding.fail(
                f"method.guidance: {w:g} does nothing, because the data carries no condition; give labelled "
                "data, or set guidance: 1."
            )
        else:
            yield Finding.skipped("there is no condition and no guidance.")
        return
    yield from _conditions(context, role, model, used)


@torch.no_grad()
def _conditions(context: CheckContext, role: str, model: Any, used: bool) -> Findings:
    x, cond = context.samples(32)
    t = torch.full((len(x),), 0.6, device=x.device)
    x_t = model.schedule.add_noise(x, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x))
    net, level = network_of(model), "FAIL" if used else "WARN"
    if used and net.classes and not net.null_class:
        yield Finding.fail(
            f"roles.{role}: the network has no class for 'no class', which guidance requires; set guidance: 1, "
            "or null_class: true if its last class is that."
        )
        return
    try:
        null = model.null(cond) if net.null_class else None
    except BadInput as error:
        if used:
            yield Finding.fail(str(error))
            return
        null = None
    if null is None:
        yield Finding.ok("the conditional model alone is used, and there is no null condition.")
        return
    given, free = model(x_t, t, **cond), model(x_t, t, **null)
    apart = float((given - free).norm() / given.norm().clamp(min=1e-12))
    conditions = any(bool((v != null[k]).any()) for k, v in cond.items())
    if not conditions and bool((cond.get("label", torch.zeros(1)) == -1).all()):
        if used:
            yield Finding.fail("data: every label is 'no class' (-1), so guidance does nothing; label the data.")
        else:
            yield Finding.skipped("every label is 'no class'.")
    elif apart < 1e-6:
        same = "equals the condition" if not conditions else "changes nothing in its output"
        yield Finding(
            level,
            f"roles.{role}: the null condition {same}, so guidance does nothing; "
            "give the network a null class that it was trained on.",
        )
    elif context.readable and not context.random and _prefers_none(model, context):
        yield Finding.warn(
            f"roles.{role} denoises better without its condition than with it; the classes of the data may be "
            "numbered differently from the model's."
        )
    else:
        yield Finding.ok(
            f"the condition changes the {role}'s estimate by {apart:.0%}; w = {context.method.guidance:g}, 1 is conditional."
        )


def _prefers_none(model: Any, context: CheckContext) -> bool:
    conditional = ConventionFit(model, context.x, context.cond).score()
    return conditional > 1.02 * ConventionFit(model, context.x, model.null(context.cond)).score()


@torch.no_grad()
def starts_equal(context: CheckContext) -> Findings:
    """The student equals the teacher before its first update, at every w and s."""
    teacher, student, given = (
        context.method.role("teacher"),
        context.method.student,
        context.cfg.roles.get("student"),
    )
    if not (has_network(student) and has_network(teacher)):
        yield Finding.skipped("there is no teacher with a network.")
        return
    if context.method.warm_start:
        yield Finding.skipped(
            f"the student first imitates the teacher for {context.method.warm_start} steps (method.warm_start)."
        )
        return
    ours, theirs = student.net, teacher.net
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    if not isinstance(ours, LoRAAdapter) and any(shapes.get(k) != v.shape for k, v in theirs.state_dict().items()):
        yield Finding.skipped("student and teacher have different networks.")
        return
    gap = _gap(context, student, teacher)
    if gap <= 1e-4:
        yield Finding.ok(f"the student is the teacher before its first update (difference {gap:.0e}).")
        return
    copied = given is None or isinstance(given, str) or _source(given) == _source(context.cfg.roles.get("teacher"))
    yield Finding(
        "FAIL" if copied else "WARN",
        f"roles.student differs from the teacher before its first update (difference {gap:.2g}); "
        + (
            "something changed its weights, or its new inputs w and s do not start at zero."
            if copied
            else "leave it out to start from the teacher's weights, or set method.warm_start."
        ),
    )


def _source(settings: Any) -> Any:
    return (
        (settings.get("_target_"), settings.get("path"))
        if hasattr(settings, "get") and settings.get("path")
        else settings
    )


def _gap(context: CheckContext, student: Any, teacher: Any) -> float:
    x, cond = context.samples(8)
    draw, worst = torch.Generator().manual_seed(2), 0.0
    for w, frac in ((1.0, 1.0), (4.0, 0.3)):
        t = (0.05 + 0.9 * torch.rand(len(x), generator=draw)).to(x.device)
        x_t = bcast(t, x) * torch.randn(x.shape, generator=draw).to(x) + x
        conditions = {"w": torch.full_like(t, w)} if network_of(student).guided else {}
        conditions |= {"s": frac * t} if network_of(student).flow_map else {}
        theirs = teacher(x_t, t, **cond)
        worst = max(
            worst, float((student(x_t, t, **cond, **conditions) - theirs).abs().max() / theirs.abs().max().clamp(min=1))
        )
    return worst
