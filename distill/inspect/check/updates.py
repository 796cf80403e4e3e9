"""Dry run of one training step: gradients reach the right networks, and conditions and guidance change them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.denoise import Guided, network_of
from distill.errors import BadInput
from distill.inspect.check.base import CheckContext, Finding, Findings, shortened
from distill.methods.placement import Placement

BATCH = 32  # samples of a step


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

    def all(self, seed: int = 0, later: int = 0) -> dict[str, Turn]:
        """One turn of every role, `later` steps after the first ones."""
        seen: dict[str, Turn] = {}
        for k in sorted(set(self.of.values()), reverse=True):
            seen = self(k + later, seed) | seen
        return seen

    @property
    def halfway(self) -> int:
        """Steps from the first turns to the same ones at half of the run."""
        pattern = max(self.of.values()) + 1
        return (self.method.total_steps - self.method.warm_start) // 2 // pattern * pattern


def frozen(context: CheckContext) -> Findings:
    """Frozen roles that require gradients."""
    names = [
        f"{role}.{n}"
        for role in context.method.frozen
        for n, v in getattr(context.method, role).named_parameters()
        if v.requires_grad
    ]
    if names:
        yield Finding.fail(
            f"frozen roles require gradients ({shortened(names)}); call requires_grad_(False) "
            "on them, and never train them."
        )


def gradients(context: CheckContext, steps: DryRun, seen: dict[str, Turn]) -> Findings:
    """Whether each turn gives all weights of its role a finite gradient, and nothing else one."""
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


# -- what is learnt ------------------------------------------------------------------------------------------------


def learns_conditions(context: CheckContext, steps: DryRun, seen: dict[str, Turn]) -> Findings:
    """Whether a step's gradients change with the conditions, and with guidance where there is some."""
    method, net = context.method, network_of(context.method.student)
    names = [n for n in context.cond if n == "label" and net.classes or n in net.conditions]
    names = [n for n in names if n not in net.null_keeps]
    if not names:
        yield Finding.skipped("the student takes no condition of the data.")
        return
    if method.role("teacher") is None or not any(_size(turn) > 0 for turn in seen.values()):
        # an untrained network may start with a branch of zeros for its conditions
        yield Finding.skipped("it needs a teacher, and a gradient that is not zero.")
        return
    batch = steps.batch
    others = _others(context, batch, names)
    if all(bool((others[n] == batch[n]).all()) for n in names):
        yield Finding.skipped("all samples have the same condition.")
        return
    later = 0
    if "student" in seen and _size(seen["student"]) == 0:  # sCM at step 0: the teacher's velocity is the optimum
        later = steps.halfway
        seen = steps.all(later=later)
    steps.batch = batch | others
    changed = steps.all(later=later)
    steps.batch = batch
    if all(_same(seen[role], changed[role]) for role in seen):
        yield Finding.fail(
            f"no turn's gradient changes with the condition ({', '.join(names)}), so the student would not learn it; pass "
            "the conditions to the networks in the method's losses."
        )
        return
    used = method.guidance != 1 or context.cfg.method.get("guidance_range") is not None
    if not used or "weak" in method.frozen or not net.null_class:
        yield Finding.ok(f"gradients change with the condition ({', '.join(names)}).")
        return
    with _without_guidance():
        changed = steps.all(later=later)
    if all(_same(seen[role], changed[role]) for role in seen):
        yield Finding.warn(
            f"method.guidance: {method.guidance:g} changes no turn's gradient, so the student learns the unguided teacher; "
            f"{type(method).__name__} does not use it in its losses: set guidance: 1, or use another method."
        )
        return
    yield Finding.ok(f"gradients change with the condition ({', '.join(names)}) and with guidance.")


def _others(context: CheckContext, batch: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Other conditions for the same samples: the null condition, or without one those of the next sample."""
    cond = {n: v for n, v in batch.items() if n in context.cond}
    try:
        null = network_of(context.method.student).null(cond)
        if any(bool((null[n] != cond[n]).any()) for n in names):
            return {n: null[n] for n in names}
    except BadInput:
        pass
    return {n: cond[n].roll(1, 0) for n in names}


@contextmanager
def _without_guidance() -> Iterator[None]:
    """Within it every guided model returns the conditional one's estimate."""

    def native(self: Guided, x_t: Tensor, t: Tensor, w: Any = None, **cond: Any) -> Tensor:
        inputs = {"w": torch.ones_like(t)} if network_of(self.denoiser).guided else {}
        return self.denoiser(x_t, t, **inputs, **cond)

    guided, Guided.native = Guided.native, native  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Guided.native = guided  # type: ignore[method-assign]


def _size(turn: Turn) -> float:
    return max((float(g.abs().max()) for g in turn.gradients.values() if g is not None), default=0.0)


def _same(one: Turn, other: Turn) -> bool:
    """Whether two gradients are equal but for rounding."""
    pairs = [(a, other.gradients[n]) for n, a in one.gradients.items()]
    scale = 1e-6 * max(_size(one), _size(other))
    return all((a is None) == (b is None) and (a is None or float((a - b).abs().max()) <= scale) for a, b in pairs)
