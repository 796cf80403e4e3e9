r"""Dry run of one training step: gradients reach the right networks, updates descend, learning rates are in range.

Two sign tests, both without updating weights. For a role with weights theta and gradient g of its loss L,

    slope = (L(theta + h g/|g|) - L(theta - h g/|g|)) / (2 h |g|)

on the same samples and random numbers is 1 if g is the exact gradient of L. Losses with detached targets have other
values, but -1 means that the gradient is reversed. Second, the student's output is shifted by a constant offset a b
(direction b, size a): the student's loss must pull it back, d/da L(a) - d/da L(-a) > 0, and a critic must follow it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.denoise import has_network
from distill.inspect.check.base import CheckContext, Finding, Findings, shortened
from distill.methods.optim import optimizer_of
from distill.methods.placement import Placement

BATCH = 32  # samples per step
SEEDS = (1, 2, 3)  # seeds of the offset directions b
PUSH = 0.5  # size of the offset, in standard deviations of the network's output
STUDENT_LIMIT, CRITIC_LIMIT = -0.5, -0.1  # a pull below these has the wrong sign; an untrained student's may be weak
SIGN = {"x": 1.0, "edm": 1.0, "v": -1.0, "flow": -1.0, "eps": -1.0}  # sign of dx / d(network output)


@dataclass
class Turn:
    """A role's loss and gradients in one step; `leaked` names parameters of other roles that received a gradient."""

    value: float
    gradients: dict[str, Tensor | None]
    leaked: list[str]
    pulls: dict[str, float] = field(default_factory=dict)


class DryRunPlacement(Placement):
    """Placement that records losses and gradients without updating weights."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, Turn] = {}
        self.pushed: dict[str, Tensor] = {}

    def zero_grad(self, role: str) -> None:
        for p in (*self.method.parameters(), *self.pushed.values()):
            p.grad = None

    def backward(self, role: str, loss: Tensor, last: bool = True) -> None:
        if loss.requires_grad:
            loss.backward()
        own = dict(self.module(role).named_parameters())
        mine = {id(p) for p in own.values()}
        leaked = [n for n, p in self.method.named_parameters() if p.grad is not None and id(p) not in mine]
        pulls = {n: float(a.grad) for n, a in self.pushed.items() if a.grad is not None}
        self.seen[role] = Turn(float(loss.detach()), {n: p.grad for n, p in own.items()}, leaked, pulls)
        self.zero_grad(role)

    def step(self, role: str, lr: float, finite: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(()), torch.ones((), dtype=torch.bool)

    def average(self, name: str, source: str, weight: float, stepped: Tensor) -> None:
        pass


class DryRun:
    """Runs steps of a method without updates, on fixed samples; equal seeds give equal random numbers."""

    def __init__(self, context: CheckContext):
        self.method = context.method
        self.batch = {k: v[:BATCH] for k, v in context.batch.items()}
        self.method.total_steps = context.cfg.train.steps
        self.method.placement = self.placement = DryRunPlacement()
        self.placement.method = self.method
        self.method.train()
        self.of = self._schedule()

    def _schedule(self) -> dict[str, int]:
        """Role -> the first step after the warm start in which it has a turn; if possible one step with all roles."""
        first: dict[str, int] = {}
        for k in range(256):
            self.method.step = self.method.warm_start + k
            roles = {role for role, _ in self.method.turns(k)}
            if roles >= set(self.method.trainable):
                return dict.fromkeys(self.method.trainable, k)
            for role in roles:
                first.setdefault(role, k)
            if len(first) == len(self.method.trainable) and k > 16:
                break
        return first

    def __call__(self, k: int, seed: int = 0) -> dict[str, Turn]:
        torch.manual_seed(seed)
        self.method.shared.manual_seed(seed)
        self.method.step, self.placement.seen = self.method.warm_start + k, {}
        self.method.training_step(dict(self.batch))
        return self.placement.seen

    def all(self, seed: int = 0) -> dict[str, Turn]:
        """One turn of every role."""
        seen: dict[str, Turn] = {}
        for k in sorted(set(self.of.values()), reverse=True):
            seen = self(k, seed) | seen
        return seen


def dry_run(context: CheckContext) -> Findings:
    """The checks `gradients`, `sign` and `rates`, which compute a step without updating weights."""
    frozen = [
        f"{role}.{n}"
        for role in context.method.frozen
        for n, v in getattr(context.method, role).named_parameters()
        if v.requires_grad
    ]
    if frozen:
        yield Finding.fail(
            f"frozen roles require gradients ({shortened(frozen)}); call requires_grad_(False) "
            "on them, and never train them.",
            "gradients",
        )
    if context.x is not None and not context.readable:
        for name in ("gradients", "sign", "rates"):
            yield Finding.skipped("the samples are not finite.", name)
        return
    steps = DryRun(context)
    seen = steps.all()
    for name, function in (("gradients", _gradients), ("sign", _signs), ("rates", _rates)):
        for finding in function(context, steps, seen):
            yield Finding(finding.level, finding.text, name)


def _gradients(context: CheckContext, steps: DryRun, seen: dict[str, Turn]) -> Findings:
    healthy = True
    for role in context.method.trainable:
        if role not in seen:
            yield Finding.warn(
                f"{role} has no turn in the first 256 steps; lower the setting that spaces its turns (student_every)."
            )
            healthy = False
            continue
        turn = seen[role]
        dead = [n for n, g in turn.gradients.items() if g is None]
        broken = [n for n, g in turn.gradients.items() if g is not None and not torch.isfinite(g).all()]
        if len(dead) == len(turn.gradients):
            yield Finding.fail(
                f"the loss of {role}'s turn does not depend on {role}; call its network with gradients enabled."
            )
        elif dead:
            yield Finding.warn(
                f"{len(dead)} of {len(turn.gradients)} parameters of {role} never get a gradient "
                f"({shortened(dead)}); remove them, or give the network the condition that they need."
            )
        if turn.value != turn.value or abs(turn.value) == float("inf") or broken:
            what = f"gradient is not finite in {shortened(broken)}" if broken else f"loss is {turn.value}"
            yield Finding.fail(f"{role}'s {what} at the first step; check its data, precision and weights.")
        if turn.leaked:
            yield Finding.fail(
                f"{role}'s turn leaves gradients on {shortened(turn.leaked)}; let only {role} require gradients in it."
            )
        healthy = healthy and not (dead or broken or turn.leaked)
    if healthy:
        yield Finding.ok(
            f"every parameter of {', '.join(context.method.trainable)} has a gradient in its own turn, and no other."
        )


# -- sign --------------------------------------------------------------------------------------------------------


def _signs(context: CheckContext, steps: DryRun, seen: dict[str, Turn]) -> Findings:
    remarks, clear, (pulls, critics) = [], True, ({}, []) if context.random else _pulls(context, steps)
    for role in (r for r in context.method.trainable if r in seen):
        pull, slope = pulls.get(role, []), _slope(steps, role, seen[role], 0)
        limit = CRITIC_LIMIT if role in critics else STUDENT_LIMIT
        if pull and max(pull) < limit:
            clear = False
            yield Finding.fail(
                f"{role}'s update "
                + (
                    "moves away from the student instead of following it"
                    if role in critics
                    else "moves a shifted student further away"
                )
                + f" (pull {sum(pull) / len(pull):+.2f}); a sign in its loss is wrong, or teacher and critic are swapped."
            )
        elif (
            not (pull and min(pull) > -limit)
            and _reversed(slope)
            and _reversed(_slope(steps, role, steps.all(7)[role], 7))
        ):
            clear = False
            yield Finding.fail(
                f"{role}'s gradient has the wrong sign: a step against it increases the loss; a sign in its loss is wrong."
            )
        numbers = [] if slope is None else [f"slope {slope:.2f}"]
        remarks.append(
            f"{role} {', '.join([*numbers, *([f'pull {sum(pull) / len(pull):+.2f}'] if pull else [])]) or 'zero gradient'}"
        )
    if clear:
        yield Finding.ok(f"no turn has the wrong sign: {'; '.join(remarks)}.")


def _reversed(slope: float | None) -> bool:
    return slope is not None and abs(slope + 1) < 0.15


@torch.no_grad()
def _slope(steps: DryRun, role: str, turn: Turn, seed: int) -> float | None:
    """The loss's slope along its own gradient, over the gradient's norm; None if the numbers are too small to decide."""
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
        return {}, []  # a purely adversarial loss has no meaningful direction before its head is trained
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


# -- learning rates ----------------------------------------------------------------------------------------------


def _rates(context: CheckContext, steps: DryRun, seen: dict[str, Turn]) -> Findings:
    ratios, sound = [], True
    for role, turn in seen.items():
        ratio = _ratio(context, role, turn)
        if ratio is None:
            continue
        key, lr = f"optim.{role}.lr", context.method.optim[role].lr
        ratios.append(f"{role} {ratio:.0e}")
        if not ratio <= 1:
            sound = False
            yield Finding.fail(
                f"{key}: {lr:g} makes the first update {ratio:.1g} times as large as the weights; lower it."
            )
        elif ratio > 0.1 or ratio < 1e-7:
            sound = False
            yield Finding.warn(
                f"{key}: {lr:g} makes the first update {ratio:.0e} of the weights, and 1e-7 to 1e-1 is usual; "
                f"{'lower' if ratio > 0.1 else 'raise'} it."
            )
    if sound:
        yield Finding.ok(f"first update over weights: {', '.join(ratios) or 'all gradients are zero at the start'}.")


@torch.no_grad()
def _ratio(context: CheckContext, role: str, turn: Turn) -> float | None:
    """|update| / |weights| of one step at the full learning rate; none for a zero gradient or zero weights."""
    settings, own = context.method.optim[role], dict(getattr(context.method, role).named_parameters())
    if not any(g is not None and bool(g.any()) for g in turn.gradients.values()):
        return None
    before = {n: v.detach().clone() for n, v in own.items()}
    for n, v in own.items():
        v.requires_grad_(True).grad = turn.gradients[n]
    if settings.clip:
        torch.nn.utils.clip_grad_norm_(list(own.values()), settings.clip)
    optimizer_of(settings, list(own.values()), role).step()
    moved = torch.stack([(v - before[n]).norm() for n, v in own.items()]).norm().item()
    size = torch.stack([v.norm() for v in before.values()]).norm().item()
    for n, v in own.items():
        v.copy_(before[n]).grad = None
    return moved / size if size else None
