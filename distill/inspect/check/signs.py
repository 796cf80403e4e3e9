r"""Signs of losses and gradients, by two tests that leave no update.

For a role of weights theta with gradient g of its loss L,

    slope = (L(theta + h g/|g|) - L(theta - h g/|g|)) / (2 h |g|)

on the same samples and random numbers is 1 where g is the loss's own gradient; a loss with a frozen target may have any
other value, but -1 is a reversed gradient. And whatever the loss: a student whose output is pushed off by a constant
a b must be pulled back, d/da L(a) - d/da L(-a) > 0, and a critic must follow it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from distill.denoise import has_network
from distill.inspect.check.base import CheckContext, Finding, Findings
from distill.inspect.check.samples import narrow_kernel
from distill.inspect.check.updates import DryRun, Turn

SEEDS = (1, 2, 3)  # of the directions in which outputs are pushed off
PUSH = 0.5  # of the standard deviation of the network's output
AWAY, BEHIND = (
    -0.5,
    -0.1,
)  # mean pulls of student and critics below these have the wrong sign, if none is above BEHIND
SIGN = {"x": 1.0, "edm": 1.0, "v": -1.0, "flow": -1.0, "eps": -1.0}  # of the change in x by one in the network's output


def signs(context: CheckContext, steps: DryRun, seen: dict[str, Turn]) -> Findings:
    """Whether losses fall along their own updates, and updates pull a shifted student back."""
    if narrow_kernel(context):
        yield Finding.skipped("the kernels are too narrow (method.bandwidths).")
        return
    remarks, clear, (pulls, critics) = [], True, ({}, []) if context.random else _pulls(context, steps)
    for role in (r for r in context.method.trainable if r in seen):
        pull, slope = pulls.get(role, []), _slope(steps, role, seen[role], 0)
        limit = BEHIND if role in critics else AWAY
        if pull and max(pull) < BEHIND and sum(pull) / len(pull) < limit:
            clear = False
            yield Finding.fail(
                f"{role}'s update "
                + (
                    "moves away from the student instead of following it"
                    if role in critics
                    else "moves a shifted student further away"
                )
                + f" (pull {sum(pull) / len(pull):+.2f}); a sign in its loss is wrong"
                + (", or teacher and critic are swapped." if critics else ".")
            )
        elif (
            not (pull and min(pull) > -limit) and _uphill(slope) and _uphill(_slope(steps, role, steps.all(7)[role], 7))
        ):
            clear = False
            yield Finding.fail(
                f"{role}'s gradient has the wrong sign: along its own update the loss grows as fast as it should "
                "fall; a sign in its loss is wrong."
            )
        numbers = [] if slope is None else [f"slope {slope:.2f}"]
        remarks.append(
            f"{role} {', '.join([*numbers, *([f'pull {sum(pull) / len(pull):+.2f}'] if pull else [])]) or 'at rest'}"
        )
    if clear:
        yield Finding.ok(f"no turn has the wrong sign: {'; '.join(remarks)}.")


def _uphill(slope: float | None) -> bool:
    return slope is not None and abs(slope + 1) < 0.15


@torch.no_grad()
def _slope(steps: DryRun, role: str, turn: Turn, seed: int) -> float | None:
    """The loss's slope along its own gradient, over the gradient's norm; none where numbers are too small."""
    own = dict(getattr(steps.method, role).named_parameters())
    gradients = {n: g for n, g in turn.gradients.items() if g is not None}
    norm = torch.stack([g.float().norm() for g in gradients.values()]).norm().item() if gradients else 0.0
    size = torch.stack([own[n].float().norm() for n in gradients]).norm().item() if gradients else 0.0
    if not (norm > 0 and size > 0) or norm == float("inf"):
        return None
    h = min(0.01 * abs(turn.value) / norm, 1e-3 * size)
    if 2 * h * norm < 1e-5 * abs(turn.value) or h == 0:
        return None
    before, values = {n: own[n].clone() for n in gradients}, []
    for sign in (1, -1):
        for n, g in gradients.items():
            own[n].copy_(before[n] + sign * h / norm * g)
        with torch.enable_grad():
            values.append(steps(steps.of[role], seed)[role].value)
    for n, value in before.items():
        own[n].copy_(value)
    return (values[0] - values[1]) / (2 * h * norm)


def _pulls(context: CheckContext, steps: DryRun) -> tuple[dict[str, list[float]], list[str]]:
    """Role -> how strongly it is pulled back (student) or follows (critics), by seed, in units of its gradient."""
    method = context.method
    nets = [r for r in method.trainable if has_network(getattr(method, r))]
    critics = [r for r in nets if r != "student"]
    if "student" not in nets or "student" not in steps.of or ("head" in method.trainable and not critics):
        return {}, []  # an adversarial loss alone gives no direction before its head is trained
    pulls: dict[str, list[float]] = {r: [] for r in nets}
    for seed in SEEDS:
        for probed in (["student"], critics):
            if not probed:
                continue
            pair = [_pushed(context, steps, nets, probed, sign, seed) for sign in (1, -1)]
            for role in probed:
                up, down = (each.get(role) for each in pair)
                if up is not None and down is not None and max(abs(up), abs(down)) > 0:
                    pull = (up - down) / (abs(up) + abs(down))
                    pulls[role].append(pull if role == "student" else -pull)
    return {r: v for r, v in pulls.items() if v}, critics


def _pushed(
    context: CheckContext, steps: DryRun, nets: list[str], probed: list[str], sign: int, seed: int
) -> dict[str, float]:
    """dL/da of the probed roles; the student is pushed off by `sign`, and the critics with it unless they are probed."""
    method, device = context.method, context.method.device
    draw = torch.Generator().manual_seed(seed)
    b = torch.randn(method.shape, generator=draw).to(device)
    with ExitStack() as hooks:
        for role in nets:
            denoiser = getattr(method, role)
            a = torch.tensor(float(sign) if role == "student" or role not in probed else 0.0, device=device)
            if role in probed:
                steps.placement.pushed[role] = a.requires_grad_(True)
            push = _push(a, b * PUSH * SIGN[denoiser.prediction])
            hooks.callback(denoiser.net.register_forward_hook(push).remove)
        try:
            seen = steps.all(seed)
        finally:
            steps.placement.pushed = {}
    return {r: seen[r].pulls.get(r) for r in probed if r in seen}


def _push(a: Tensor, b: Tensor) -> Any:
    return lambda net, args, out: out + a.to(out.dtype) * b.to(out.dtype)
