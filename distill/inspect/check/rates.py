"""Learning rates, clips and epsilons: how far the first update at the full rate moves weights and estimates of x."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distill.denoise import has_network, network_of
from distill.inspect.check.base import CheckContext, Finding, Findings
from distill.inspect.check.updates import DryRun, Turn
from distill.methods.optim import optimizer_of

FAR = 0.55  # of the data's spread, by which one update may change estimates of x
SLOW = 0.02  # the same, of all updates of a run together
LONG = 100  # shortest run to which SLOW applies
LAG = 0.05  # of the student's update over its weights, below which a critic's cannot follow
SHRUNK = 0.1  # of an update, that clip or eps may leave
Gradients = dict[str, Tensor | None]


def rates(context: CheckContext, steps: DryRun, seen: dict[str, Turn]) -> Findings:
    """Whether the learning rates move weights and estimates of x in proportion, critics not slower than the student."""
    ratios, sound, moves = [], True, {}
    for role, turn in seen.items():
        if role in context.unlike:
            continue
        settings, key = context.method.optim[role], f"optim.{role}.lr"
        ratio = _update(context, role, turn.gradients)[0] if _norm(turn.gradients) > 0 else None
        scaled = "Adam" in settings.name  # such an optimizer divides by the gradient's size
        whole = _unit(context, role, turn.gradients) if scaled else turn.gradients
        moves[role], change = _update(context, role, whole, clip=not scaled)
        found: list[Finding] = []
        if ratio is not None:
            ratios.append(f"{role} {ratio:.0e}")
            found += _shrunk(context, role, turn, ratio) or _of_weights(key, settings.lr, ratio)
        if not found and change is not None:
            found += _of_estimates(role, settings.lr, change, context.cfg.train.steps)
        sound = sound and not found
        yield from found
    for finding in _lagging(context, moves):
        sound = False
        yield finding
    if sound and not moves:
        yield Finding.skipped("no network starts as the teacher; see `start`.")
    elif sound:
        yield Finding.ok(f"first update over weights: {', '.join(ratios) or 'all gradients are zero at the start'}.")


def _of_weights(key: str, lr: float, ratio: float) -> list[Finding]:
    """An update out of proportion to the weights."""
    if not ratio <= 1:
        return [
            Finding.fail(f"{key}: {lr:g} makes the first update {ratio:.1g} times as large as the weights; lower it.")
        ]
    if ratio > 0.1 or ratio < 1e-7:
        return [
            Finding.warn(
                f"{key}: {lr:g} makes the first update {ratio:.0e} of the weights, and 1e-7 to 1e-1 is usual; "
                f"{'lower' if ratio > 0.1 else 'raise'} it."
            )
        ]
    return []


def _of_estimates(role: str, lr: float, change: float, steps: int) -> list[Finding]:
    """An update out of proportion to the data, or a run too short for its rate."""
    if change > FAR:
        return [
            Finding.warn(
                f"optim.{role}.lr: {lr:g} makes one update change the estimates of {role} by {change:.0%} of the data's spread; "
                f"lower it, about {max(round(change / 0.15), 2)} times."
            )
        ]
    if steps >= LONG and change * steps < SLOW:
        return [
            Finding.warn(
                f"optim.{role}.lr: {lr:g} changes the estimates of {role} by at most {change * steps:.1g} of the data's spread "
                f"in {steps} steps; raise it, or train longer."
            )
        ]
    return []


def _shrunk(context: CheckContext, role: str, turn: Turn, ratio: float) -> list[Finding]:
    """An update that clip or eps makes vanish, of an optimizer that divides by the gradient's size."""
    settings, norm = context.method.optim[role], _norm(turn.gradients)
    if "Adam" not in settings.name or norm == math.inf:
        return []
    whole = _update(context, role, _unit(context, role, turn.gradients), clip=False)[0]
    if ratio >= SHRUNK * whole:
        return []
    if settings.clip and settings.clip < norm and _update(context, role, turn.gradients, clip=False)[0] > 2 * ratio:
        return [
            Finding.warn(
                f"optim.{role}.clip: {settings.clip:g} is far below the gradient's norm ({norm:.2g}) and shrinks the update to "
                f"{ratio / whole:.1g} of the step that optim.{role}.lr sets; raise it, to 1 as a rule."
            )
        ]
    if (settings.eps or 0) > 1e-6:
        return [
            Finding.warn(
                f"optim.{role}.eps: {settings.eps:g} is large beside the gradient (norm {norm:.2g}) and shrinks the update to "
                f"{ratio / whole:.1g} of the step that optim.{role}.lr sets; lower it, to 1e-8 as a rule."
            )
        ]
    return []


def _lagging(context: CheckContext, moves: dict[str, float]) -> Findings:
    """Critics whose updates are too small to follow the student."""
    for role in context.method.trainable:
        if role in moves and "student" in moves and role != "student" and has_network(getattr(context.method, role)):
            share = moves[role] / moves["student"] if moves["student"] else math.inf
            if share < LAG:
                yield Finding.warn(
                    f"optim.{role}.lr: {context.method.optim[role].lr:g} makes the updates of {role} {share:.0e} of the "
                    f"student's, so it cannot follow the student; raise it to optim.student.lr or above."
                )


def _norm(gradients: Gradients) -> float:
    norms = [g.float().norm() for g in gradients.values() if g is not None]
    return torch.stack(norms).norm().item() if norms else 0.0


def _unit(context: CheckContext, role: str, gradients: Gradients) -> Gradients:
    """The gradient scaled to where an optimizer's eps does not count; where it is zero, that of |D(x_t) - x|^2."""
    if _norm(gradients) == 0 and has_network(getattr(context.method, role)):
        denoiser = getattr(context.method, role)
        own = dict(denoiser.named_parameters())
        with torch.enable_grad():
            for p in own.values():
                p.requires_grad_(True)
            estimate, x = _estimate(context, denoiser)
            found = torch.autograd.grad((estimate - x).square().mean(), list(own.values()), allow_unused=True)
        gradients = dict(zip(own, found))
    size, count = _norm(gradients), sum(g.numel() for g in gradients.values() if g is not None)
    if not 0 < size < math.inf:
        return gradients
    return {n: None if g is None else g * (math.sqrt(count) / size) for n, g in gradients.items()}


def _estimate(context: CheckContext, denoiser: Any) -> tuple[Tensor, Tensor]:
    """Estimates of x (B, ...) at times from data to noise, and x."""
    x, cond = context.samples(16)
    t = torch.linspace(0.05, 0.95, len(x), device=x.device)
    if context.x is None:  # data without samples: near noise, where none are needed
        x, t = torch.zeros_like(x), 0.9 + 0.1 * t
    x_t = denoiser.schedule.add_noise(x, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(x))
    net = network_of(denoiser)
    cond = cond | ({"w": torch.full_like(t, float(context.method.guidance))} if net.guided else {})
    return denoiser(x_t, t, **cond, **({"s": 0.5 * t} if net.flow_map else {})), x


@torch.no_grad()
def _update(context: CheckContext, role: str, gradients: Gradients, clip: bool = True) -> tuple[float, float | None]:
    """|update| / |weights| of one step at the full rate, and the change of estimates of x over the data's spread."""
    settings, denoiser = context.method.optim[role], getattr(context.method, role)
    own = dict(denoiser.named_parameters())
    if not any(g is not None for g in gradients.values()):
        return 0.0, None
    before, network = {n: v.detach().clone() for n, v in own.items()}, has_network(denoiser)
    old, x = _estimate(context, denoiser) if network else (None, None)
    for n, v in own.items():
        g = gradients[n]
        v.requires_grad_(True).grad = None if g is None else g.clone()  # clipping is in place
    if clip and settings.clip:
        torch.nn.utils.clip_grad_norm_(list(own.values()), settings.clip)
    optimizer_of(settings, list(own.values()), role).step()
    moved = torch.stack([(v - before[n]).norm() for n, v in own.items()]).norm().item()
    size = torch.stack([v.norm() for v in before.values()]).norm().item()
    change = None
    if old is not None:
        wide = x if context.x is not None else old  # of data without samples the model's own
        spread = (wide - wide.mean(0)).norm()
        change = float((_estimate(context, denoiser)[0] - old).norm() / spread) if spread > 0 else None
    for n, v in own.items():
        v.copy_(before[n]).grad = None
    return moved / size if size else 0.0, change
