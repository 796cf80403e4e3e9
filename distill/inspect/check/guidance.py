"""Guidance: whether conditions change the teacher, the null condition is one, and w is in our convention and of a usual size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.denoise import network_of
from distill.errors import BadInput
from distill.inspect.check.base import CheckContext, Finding, Findings
from distill.inspect.check.conventions import ConventionFit

CLASSES = 16  # of a network, that the null condition is compared with
SPREAD = 3.0  # of the guided estimate over the data's, above which few-step students saturate


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
    elif wrong := _null_is_a_condition(context, role, model, x_t, t, cond, free):
        yield Finding(level, wrong)
    elif _has_sound_samples(context) and _prefers_none(model, context):
        yield Finding.warn(
            f"roles.{role} denoises better without its condition than with it; the classes of the data may be "
            "numbered differently from the model's."
        )
    elif wide := _spread(context, model):
        yield Finding.warn(wide)
    else:
        w = context.method.guidance
        meaning = "conditional, no extrapolation" if w == 1 else "1 is conditional"
        yield Finding.ok(f"the condition changes the {role}'s estimate by {apart:.0%}; guidance w = {w:g} ({meaning}).")


def _null_is_a_condition(
    context: CheckContext, role: str, model: Any, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], free: Tensor
) -> str:
    """The fault of a null condition that is a class of the network, or the condition of a sample; "" if it is neither."""
    net = network_of(model)
    size = free.norm().clamp(min=1e-12)
    for label in range(min(net.classes, CLASSES)) if "label" in cond and net.classes > 1 else ():
        if (
            float((model(x_t, t, **cond | {"label": torch.full_like(cond["label"], label)}) - free).norm() / size)
            < 1e-6
        ):
            return (
                f"roles.{role}: the null condition is class {label}, so guidance would push away from that class; give "
                "the network a null class that it was trained on, or set guidance: 1."
            )
    replaced = [name for name in cond if name != "label" and name not in net.null_keeps]
    if not replaced or not all(name in context.cond for name in replaced):
        return ""
    null, n = model.null(context.cond), len(context.cond[replaced[0]])
    for i in range(n):
        if all(bool((null[name][i] == context.cond[name][i]).all()) for name in replaced):
            equal = sum(all(bool((null[k][j] == context.cond[k][j]).all()) for k in replaced) for j in range(n))
            if equal < n:  # all equal: "equals the condition" says so
                return (
                    f"roles.{role}: the null condition is the condition of sample {i} of the data; encode the empty prompt "
                    "with the encoder of the data, or remove samples without a caption."
                )
    return ""


def _spread(context: CheckContext, model: Any) -> str:
    """The fault of a w at which estimates of x leave the data: their spread over the data's, at high noise."""
    w, drawn = float(context.method.guidance), context.cfg.method.get("guidance_range")
    if w <= 1 or drawn is not None or context.random or not context.readable or len(context.x) < 32:
        return ""
    x, cond = context.samples(64)
    draw, wide, plain = torch.Generator().manual_seed(3), 0.0, 0.0
    data = (x - x.mean(0)).norm()
    for time in (0.7, 0.85, 0.95):
        t = torch.full((len(x),), time, device=x.device)
        x_t = model.schedule.add_noise(x, t, torch.randn(x.shape, generator=draw).to(x))
        free, given = model(x_t, t, **model.null(cond)), model(x_t, t, **cond)
        guided = free + w * (given - free)
        wide = max(wide, float((guided - guided.mean(0)).norm() / data))
        plain = max(plain, float((given - given.mean(0)).norm() / data))
    if wide <= SPREAD or wide <= SPREAD * plain:
        return ""
    fitting = 1 + (w - 1) * (2 - plain) / (wide - plain)  # the spread grows nearly linearly in w
    return (
        f"method.guidance: at w = {w:g} the teacher's guided estimates spread {wide:.1f} times as widely as the data, "
        f"so students of few steps saturate; lower it, to about {max(fitting, 1):.2g}."
    )


def _has_sound_samples(context: CheckContext) -> bool:
    """Whether a trained teacher is known to denoise the data."""
    return context.readable and not context.random and not context.failed & {"data", "teacher"}


def _prefers_none(model: Any, context: CheckContext) -> bool:
    if float((context.x - context.x.mean(0)).square().mean()) == 0:
        return False
    conditional = ConventionFit(model, context.x, context.cond).score()
    return conditional > 1.02 * ConventionFit(model, context.x, model.null(context.cond)).score()
