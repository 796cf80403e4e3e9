"""The start: whether student, critics and averages are, before the first update, what they are copies of."""

from __future__ import annotations

from typing import Any

import torch

from distill.denoise import has_network, network_of
from distill.inspect.check.base import CheckContext, Finding, Findings
from distill.models.lora import LoRAAdapter
from distill.noise import bcast

EQUAL = 1e-4  # difference of two estimates of x up to which networks count as equal
APART = 0.5  # of another network's estimate from the teacher's, above which it does not denoise yet


def starts_equal(context: CheckContext) -> Findings:
    """Student and critics equal the teacher before their first update, at every w and s; averages equal their roles."""
    method = context.method
    method.eval()
    wrong = [*_averages(context)]
    yield from wrong
    teacher = method.role("teacher")
    if not (has_network(method.student) and has_network(teacher)):
        yield Finding.skipped("there is no teacher with a network.")
        return
    if method.warm_start:
        yield Finding.skipped(
            f"the student first imitates the teacher for {method.warm_start} steps (method.warm_start)."
        )
        return
    gaps = {}
    for role in method.trainable:
        denoiser = getattr(method, role)
        if has_network(denoiser):
            gaps[role] = _gap(context, denoiser, teacher)
            wrong += (found := [*_against_teacher(context, role, denoiser, teacher, gaps[role])])
            yield from found
    if not wrong:
        values = ", ".join(f"{role} {gap:.0e}" for role, gap in gaps.items())
        yield Finding.ok(f"every network starts as the teacher (difference: {values}); every EMA equals its network.")


def _against_teacher(context: CheckContext, role: str, denoiser: Any, teacher: Any, gap: float) -> Findings:
    """A trainable role that is not the teacher, and what to do."""
    given, copy = context.cfg.roles.get(role), "leave it out to start from the teacher's weights"
    shapes = {k: v.shape for k, v in denoiser.net.state_dict().items()}
    alike = isinstance(denoiser.net, LoRAAdapter) or all(
        shapes.get(k) == v.shape for k, v in teacher.net.state_dict().items()
    )
    if gap <= EQUAL or not alike and gap <= APART:
        return
    if not alike:
        yield Finding.warn(
            f"roles.{role} has another network than the teacher and does not denoise as it does (difference {gap:.2g}); "
            f"train it first, set method.warm_start, or {copy}."
        )
        return
    context.unlike.add(role)
    copied = given is None or isinstance(given, str) or _source(given) == _source(context.cfg.roles.get("teacher"))
    yield Finding(
        "FAIL" if copied else "WARN",
        f"roles.{role} differs from the teacher before its first update (difference {gap:.2g}); "
        + (
            "something changed its weights, or its new inputs w and s do not start at zero."
            if copied
            else f"{copy}, or set method.warm_start."
        ),
    )


def _averages(context: CheckContext) -> Findings:
    method = context.method
    for name, (role, _) in method._averages.items():
        if not has_network(getattr(method, role)):
            continue
        gap = _gap(context, getattr(method, name), getattr(method, role))
        if not gap <= EQUAL:
            yield Finding.fail(
                f"the average '{name}' differs from {role} before the first update (difference {gap:.2g}), and what "
                f"it holds would stay in the exported weights; make it a copy of {role}."
            )


def _source(settings: Any) -> Any:
    return (
        (settings.get("_target_"), settings.get("path"))
        if hasattr(settings, "get") and settings.get("path")
        else settings
    )


@torch.no_grad()
def _gap(context: CheckContext, one: Any, other: Any) -> float:
    """Largest difference of two models' estimates of x, at two w and s where they take them."""
    x, cond = context.samples(8)
    draw, worst = torch.Generator().manual_seed(2), 0.0
    for w, frac in ((1.0, 1.0), (4.0, 0.3)):
        t = (0.05 + 0.9 * torch.rand(len(x), generator=draw)).to(x.device)
        x_t = bcast(t, x) * torch.randn(x.shape, generator=draw).to(x) + x
        a, b = (model(x_t, t, **cond, **_inputs(model, t, w, frac)) for model in (one, other))
        gap = float((a - b).abs().max() / b.abs().max().clamp(min=1))
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def _inputs(model: Any, t: Any, w: float, frac: float) -> dict[str, Any]:
    """The inputs w and s that a network takes besides the data's conditions."""
    net = network_of(model)
    return ({"w": torch.full_like(t, w)} if net.guided else {}) | ({"s": frac * t} if net.flow_map else {})
