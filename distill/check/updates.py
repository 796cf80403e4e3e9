r"""One step on trial: do the turns' gradients reach who they should, point downhill, and fit the learning rates?

Two tests of sign, both without any update that stays. For a role of weights theta with gradient g of its loss L,

    slope = (L(theta + h g/|g|) - L(theta - h g/|g|)) / (2 h |g|)

on the same samples and random numbers is 1 where g is the loss's own gradient; a loss with a frozen target may have any
other value, but -1 is a gradient turned round. And whatever the loss: a student whose output is pushed off by a constant
a b must be pulled back, d/da L(a) - d/da L(-a) > 0, and a critic must follow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.check.base import Probe, Said, spread
from distill.denoise import has_network
from distill.place import Place, optimizer_of

TRIED = 32  # samples of a trial step
SEEDS = (1, 2, 3)  # of the directions in which outputs are pushed off
PUSH = 0.5  # of the standard deviation of the network's output
AWAY, FLEES = -0.5, -0.1  # pulls of student and critics below these go the wrong way; an untrained student's may be weak
SIGN = {"x": 1.0, "edm": 1.0, "v": -1.0, "flow": -1.0, "eps": -1.0}  # of the change in x by one in the network's output


@dataclass
class Turn:
    """What a trial saw of a role: the last loss and the gradients of its turns in one step."""

    value: float
    gradients: dict[str, Tensor | None]
    astray: list[str]
    pulls: dict[str, float] = field(default_factory=dict)


class Trial(Place):
    """A place where nothing moves: it keeps each turn's loss and gradient."""

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
        astray = [n for n, p in self.method.named_parameters() if p.grad is not None and id(p) not in mine]
        pulls = {n: float(a.grad) for n, a in self.pushed.items() if a.grad is not None}
        self.seen[role] = Turn(float(loss.detach()), {n: p.grad for n, p in own.items()}, astray, pulls)
        self.zero_grad(role)

    def step(self, role: str, lr: float, finite: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(()), torch.ones((), dtype=torch.bool)

    def average(self, name: str, source: str, weight: float, stepped: Tensor) -> None:
        pass


class Steps:
    """Trial steps of a method: always the same samples, and the same random numbers for the same seed."""

    def __init__(self, p: Probe):
        self.method = p.method
        self.batch = {k: v[:TRIED] for k, v in p.batch.items()}
        self.method.total_steps = p.cfg.train.steps
        self.method.place = self.place = Trial()
        self.place.method = self.method
        self.method.train()
        self.of = self._schedule()

    def _schedule(self) -> dict[str, int]:
        """The first step, after the warm start, that gives each role a turn; one for all roles where there is one."""
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
        self.method.step, self.place.seen = self.method.warm_start + k, {}
        self.method.training_step(dict(self.batch))
        return self.place.seen

    def all(self, seed: int = 0) -> dict[str, Turn]:
        """Every role's turn."""
        seen: dict[str, Turn] = {}
        for k in sorted(set(self.of.values()), reverse=True):
            seen = self(k, seed) | seen
        return seen


def tried(p: Probe) -> Iterator[tuple[str, str, str]]:
    """(check, level, sentence) of the checks that try a step."""
    frozen = [f"{role}.{n}" for role in p.method.frozen for n, v in getattr(p.method, role).named_parameters()
              if v.requires_grad]  # fmt: skip
    if frozen:
        yield "gradients", "FAIL", (f"frozen roles require gradients ({spread(frozen)}); call requires_grad_(False) "
                                    "on them, and never train them.")  # fmt: skip
    if p.x is not None and not p.readable:
        for name in ("gradients", "sign", "rates"):
            yield name, "skipped", "the samples are not finite."
        return
    steps = Steps(p)
    seen = steps.all()
    for name, look in (("gradients", _gradients), ("sign", _signs), ("rates", _rates)):
        for level, text in look(p, steps, seen):
            yield name, level, text


def _gradients(p: Probe, steps: Steps, seen: dict[str, Turn]) -> Said:
    healthy = True
    for role in p.method.trainable:
        if role not in seen:
            yield "WARN", f"{role} has no turn in the first 256 steps; look at what spaces its turns (student_every)."
            healthy = False
            continue
        turn = seen[role]
        dead = [n for n, g in turn.gradients.items() if g is None]
        broken = [n for n, g in turn.gradients.items() if g is not None and not torch.isfinite(g).all()]
        if len(dead) == len(turn.gradients):
            yield "FAIL", f"the loss of {role}'s turn does not depend on {role}; it must call the network with gradient."
        elif dead:
            yield "WARN", (f"{len(dead)} of {len(turn.gradients)} parameters of {role} never get a gradient "
                           f"({spread(dead)}); remove them, or tell the network what they wait for.")  # fmt: skip
        if turn.value != turn.value or abs(turn.value) == float("inf") or broken:
            what = f"gradient is not finite in {spread(broken)}" if broken else f"loss is {turn.value}"
            yield "FAIL", f"{role}'s {what} at the first step; look at its data, precision and weights."
        if turn.astray:
            yield "FAIL", f"{role}'s turn leaves gradients on {spread(turn.astray)}; only {role} may require them then."
        healthy = healthy and not (dead or broken or turn.astray)
    if healthy:
        yield "ok", f"every parameter of {', '.join(p.method.trainable)} has a gradient in its own turn, and no other."


# -- sign --------------------------------------------------------------------------------------------------------


def _signs(p: Probe, steps: Steps, seen: dict[str, Turn]) -> Said:
    said, clear, (pulls, critics) = [], True, ({}, []) if p.random else _pulls(p, steps)
    for role in (r for r in p.method.trainable if r in seen):
        found, slope = pulls.get(role, []), _slope(steps, role, seen[role], 0)
        limit = FLEES if role in critics else AWAY
        if found and max(found) < limit:
            clear = False
            yield "FAIL", (
                f"{role}'s update " + ("flees the student instead of following it" if role in critics else
                                       "pushes the student further off when it is off")
                + f" (pull {sum(found) / len(found):+.2f}); a sign is turned in its loss, or teacher and critic are swapped."
            )  # fmt: skip
        elif not (found and min(found) > -limit) and _uphill(slope) and _uphill(_slope(steps, role, steps.all(7)[role], 7)):
            clear = False
            yield "FAIL", (f"{role}'s gradient points uphill: along its own update the loss grows as fast as it should "
                           "fall; a sign is turned in its loss.")  # fmt: skip
        told = [] if slope is None else [f"slope {slope:.2f}"]
        said.append(f"{role} {', '.join([*told, *([f'pull {sum(found) / len(found):+.2f}'] if found else [])]) or 'at rest'}")
    if clear:
        yield "ok", f"no turn goes the wrong way: {'; '.join(said)}."


def _uphill(slope: float | None) -> bool:
    return slope is not None and abs(slope + 1) < 0.15


@torch.no_grad()
def _slope(steps: Steps, role: str, turn: Turn, seed: int) -> float | None:
    """The loss's slope along its own gradient, over the gradient's norm; none where numbers are too small to tell."""
    own = dict(getattr(steps.method, role).named_parameters())
    gradients = {n: g for n, g in turn.gradients.items() if g is not None}
    norm = torch.stack([g.float().norm() for g in gradients.values()]).norm().item() if gradients else 0.0
    size = torch.stack([own[n].float().norm() for n in gradients]).norm().item() if gradients else 0.0
    if not (norm > 0 and size > 0) or norm == float("inf"):
        return None
    h = min(0.01 * abs(turn.value) / norm, 1e-3 * size)
    if 2 * h * norm < 1e-5 * abs(turn.value) or h == 0:
        return None
    kept, values = {n: own[n].clone() for n in gradients}, []
    for sign in (1, -1):
        for n, g in gradients.items():
            own[n].copy_(kept[n] + sign * h / norm * g)
        with torch.enable_grad():
            values.append(steps(steps.of[role], seed)[role].value)
    for n, value in kept.items():
        own[n].copy_(value)
    return (values[0] - values[1]) / (2 * h * norm)


def _pulls(p: Probe, steps: Steps) -> tuple[dict[str, list[float]], list[str]]:
    """Role -> how strongly it is pulled back (student) or follows (critics), by seed, in units of its gradient."""
    method = p.method
    nets = [r for r in method.trainable if has_network(getattr(method, r))]
    critics = [r for r in nets if r != "student"]
    if "student" not in nets or "student" not in steps.of or ("head" in method.trainable and not critics):
        return {}, []  # an adversarial loss alone knows no way back before its head is trained
    found: dict[str, list[float]] = {r: [] for r in nets}
    for seed in SEEDS:
        for probed in (["student"], critics):
            if not probed:
                continue
            pair = [_pushed(p, steps, nets, probed, sign, seed) for sign in (1, -1)]
            for role in probed:
                up, down = (each.get(role) for each in pair)
                if up is not None and down is not None and max(abs(up), abs(down)) > 0:
                    pull = (up - down) / (abs(up) + abs(down))
                    found[role].append(pull if role == "student" else -pull)
    return {r: v for r, v in found.items() if v}, critics


def _pushed(p: Probe, steps: Steps, nets: list[str], probed: list[str], sign: int, seed: int) -> dict[str, float]:
    """dL/da of the probed roles; the student is pushed off by `sign`, and the critics with it unless they are probed."""
    method, device = p.method, p.method.device
    draw = torch.Generator().manual_seed(seed)
    b = torch.randn(method.shape, generator=draw).to(device)
    with ExitStack() as hooks:
        for role in nets:
            denoiser = getattr(method, role)
            a = torch.tensor(float(sign) if role == "student" or role not in probed else 0.0, device=device)
            if role in probed:
                steps.place.pushed[role] = a.requires_grad_(True)
            push = _push(a, b * PUSH * SIGN[denoiser.prediction])
            hooks.callback(denoiser.net.register_forward_hook(push).remove)
        try:
            seen = steps.all(seed)
        finally:
            steps.place.pushed = {}
    return {r: seen[r].pulls.get(r) for r in probed if r in seen}


def _push(a: Tensor, b: Tensor) -> Any:
    return lambda net, args, out: out + a.to(out.dtype) * b.to(out.dtype)


# -- learning rates ----------------------------------------------------------------------------------------------


def _rates(p: Probe, steps: Steps, seen: dict[str, Turn]) -> Said:
    told, sound = [], True
    for role, turn in seen.items():
        ratio = _ratio(p, role, turn)
        if ratio is None:
            continue
        key, lr = f"optim.{role}.lr", p.method.optim[role].lr
        told.append(f"{role} {ratio:.0e}")
        if not ratio <= 1:
            sound = False
            yield "FAIL", f"{key}: {lr:g} makes the first update {ratio:.1g} times as large as the weights; lower it."
        elif ratio > 0.1 or ratio < 1e-7:
            sound = False
            yield "WARN", (f"{key}: {lr:g} makes the first update {ratio:.0e} of the weights, and 1e-7 to 1e-1 is usual; "
                           f"{'lower' if ratio > 0.1 else 'raise'} it.")  # fmt: skip
    if sound:
        yield "ok", f"first update over weights: {', '.join(told) or 'all gradients are zero at the start'}."


@torch.no_grad()
def _ratio(p: Probe, role: str, turn: Turn) -> float | None:
    """|update| / |weights| of one step at the full learning rate; none for a zero gradient or zero weights."""
    settings, own = p.method.optim[role], dict(getattr(p.method, role).named_parameters())
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
