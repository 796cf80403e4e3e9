"""Alarms for failing runs whose losses look normal.

At each validation the student's collapse indicators are compared with the teacher's (`RULES`, `MetricMonitor`). Between
validations, gradient norms and update sizes are compared with their earlier values (`UpdateMonitor`).
"""

from __future__ import annotations

import re
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from distill.methods.placement import tensors


class Alarm(NamedTuple):
    """An alarm: step, kind, and one sentence with the remedy."""

    step: int
    kind: str
    message: str


# -- at validation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """The accepted range [low, high] of one metric, and the text and remedy of its alarm.

    `against`: "ratio" divides by the reference's value, which must be at least `least`; "excess" subtracts it; "" uses
    the value itself. In `text` and `remedy`, REFERENCE stands for what the student is compared with, [text] is for methods
    with a critic and <text> for those with a teacher; `worded` settles them. `unreached` is the remedy of a metric that was
    never inside, of methods that train from data; empty: `remedy`.
    """

    kind: str
    key: str
    low: float
    high: float
    text: str
    remedy: str
    against: str = "ratio"
    least: float = 1e-6
    unreached: str = ""

    def worded(self, teacher: bool = True, critic: bool = True) -> Rule:
        """This rule in words that fit a method: compared with its teacher or with the data, with a critic or without."""
        remedy = re.sub(r"\[(.*?)\]", r"\1" if critic else "", self.remedy)
        remedy = re.sub(r"<(.*?)>", r"\1" if teacher else "", remedy)
        text = self.text.replace("REFERENCE", "teacher" if teacher else "data")
        return replace(self, text=text, remedy=remedy, unreached=UNREACHED if self.against and not teacher else "")

    def shown(self, value: float) -> str:
        """A reading as the text writes it."""
        return re.findall(r"{.*?}", self.text)[0].format(value)

    def reading(self, row: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
        """None if the run does not measure it, or there is no reference value."""
        value, known = row.get(self.key), reference.get(self.key)
        if value is None or self.against and known is None:
            return None
        if self.against == "ratio":
            return value / known if known >= self.least else None
        return value - known if self.against else value


UNREACHED = (
    "raise train.steps; if the loss no longer falls, set another optim.student.lr"  # of a model trained from data
)
RULES = (
    Rule(
        "collapse",
        "diversity",
        0.5,
        float("inf"),
        "the diversity of samples with one condition is {:.2g} x the REFERENCE's",
        "lower optim.student.lr[, raise method.student_every (critic turns per student turn)], or use the best checkpoint",
    ),
    Rule(
        "mode loss",
        "coverage",
        0.5,
        float("inf"),
        "coverage is {:.0%} of the REFERENCE's",
        "lower optim.student.lr< or guidance>[, or use a mode-covering divergence (method.divergence: js or kl) or a head]",
        least=0.3,
    ),
    Rule(
        "saturation",
        "beyond",
        -float("inf"),
        0.1,
        "the share of values outside the range of the data is {:.2g} above the REFERENCE's",
        "lower <guidance or >optim.student.lr",
        against="excess",
    ),
    Rule(
        "contrast",
        "contrast",
        0.5,
        1.5,
        "the contrast is {:.2g} x the REFERENCE's",
        "above 1 lower <guidance or >optim.student.lr; below 1 [raise method.student_every (critic turns per student turn) or "
        "]train longer",
    ),
    Rule(
        "frequency",
        "high_frequency",
        0.25,
        4.0,
        "energy at high frequencies is {:.2g} x the REFERENCE's",
        "below 1 samples are blurred: use more steps[ or a head]; above 1 they are noisy: lower [the head's weight or ]the "
        "learning rate",
    ),
    Rule(
        "critic lag",
        "critic_lag",
        -float("inf"),
        1.5,
        "the critic's error on the student is {:.2g} x that on its running average, each over the teacher's",
        "raise optim.critic.lr or method.student_every (critic turns per student turn), or lower optim.student.lr",
        against="",
    ),
    Rule(
        "head saturated",
        "head_accuracy",
        -float("inf"),
        0.98,
        "the head classifies a share of {:.3g} of data and samples correctly",
        "lower optim.head.lr or raise r1: a saturated head gives the student almost no gradient",
        against="",
    ),
)


def rules_for(method: Any) -> tuple[Rule, ...]:
    """All rules; without those for lost modes if a reward moves the student's distribution away from the data's."""
    moved = method.metric is not None
    has_teacher, has_critic = method.role("teacher") is not None, "critic" in method.trainable
    rules = (rule for rule in RULES if not (moved and rule.kind == "mode loss"))
    return tuple(rule.worded(has_teacher, has_critic) for rule in rules)


def halfway_step(method: Any) -> float:
    """The step half way between the warm start and the end; for methods in rounds, half of the last round."""
    done, of = method.schedule_step()
    begin = method.step - done
    last = begin + 1.5 * of > method.total_steps  # no other start fits in; their lengths are rounded down
    return (max(begin, method.warm_start) + begin + of) / 2 if last else float("inf")


class MetricMonitor:
    """Compares the student's metrics with a reference at each validation.

    An alarm is raised if a metric leaves its range after it was inside, or is still outside at the first validation in
    the second half of the run. It is raised again only after the metric was inside once more.

    Args:
        half: the step from which a metric must be inside; see `halfway_step`.
        warm: steps of the warm start, which are ignored.
    """

    def __init__(self, half: float, warm: int = 0, rules: Iterable[Rule] = tuple(rule.worded() for rule in RULES)):
        self.half, self.warm, self.rules = half, warm, tuple(rules)
        self.healthy: dict[str, str] = {}  # kind -> when it was last inside, in words
        self.raised: set[str] = set()

    def check(self, step: int, row: Mapping[str, float], reference: Mapping[str, float]) -> list[Alarm]:
        """The alarms of one validation."""
        found = []
        for rule in self.rules if step >= self.warm else ():
            value = rule.reading(row, reference)
            if value is None:
                continue
            if rule.low <= value <= rule.high:
                self.healthy[rule.kind] = f"{rule.shown(value)} at step {step}"
                self.raised.discard(rule.kind)
            elif rule.kind not in self.raised and (rule.kind in self.healthy or step >= self.half):
                self.raised.add(rule.kind)
                known = self.healthy.get(rule.kind)
                before = f" ({known})" if known else " in the second half of the run"
                remedy = rule.remedy if known else rule.unreached or rule.remedy
                found.append(Alarm(step, rule.kind, f"{rule.text.format(value)}{before}; {remedy}."))
        return found


# -- between validations ---------------------------------------------------------------------------------------------

SPIKE, HUGE, SATURATED = 30.0, 0.1, 0.05
LEAST, WINDOW, ROW = 10, 100, 5  # logged steps: before a median counts, that it is taken of, in a row that make a fault
PIECES, PIECE = 8, 1 << 16  # tensors of a role, and values of each, that its update is measured on


class UpdateMonitor(lightning.Callback):
    """Monitors gradient norms against their running median, update sizes, and the loss of the head, by role.

    Between logged steps the maximum norm is kept on the device; it is read when the log synchronises anyway. Adds
    `ROLE/update` to the log: the norm of a step's change over that of the weights, on up to `PIECE` values of each of up
    to `PIECES` tensors; with sharded weights the mean over the ranks.

    Args:
        every: steps between checks, equal to those between log rows.
        raise_alarm: called with each alarm.
    """

    def __init__(self, every: int, raise_alarm: Callable[[Alarm], None]):
        self.every, self.raise_alarm = every, raise_alarm
        self.start()

    def start(self) -> None:
        self.peak: dict[str, Tensor] = {}
        self.norms: dict[str, deque[float]] = {}
        self.rows: dict[str, int] = {}  # fault -> logged steps in a row
        self.before: dict[str, list[Tensor]] = {}

    def on_train_batch_start(self, trainer, method, batch, index):
        if (method.step + 1) % self.every == 0:
            self.before = {role: [v.clone() for v in self.pieces(method, role)] for role in method.trainable}

    @staticmethod
    def pieces(method: Any, role: str) -> list[Tensor]:
        """Views of some of a role's weights, of the matrices where it has any."""
        found = [t for t in tensors(method.placement.module(role)) if t.is_floating_point() and t.numel()]
        found = [t for t in found if t.ndim > 1] or found
        return [t.reshape(-1)[:PIECE] for t in found[:: max(1, len(found) // PIECES)]]

    @torch.no_grad()
    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        if method.step - 1 == method.warm_start or method.schedule_step()[0] <= 1:  # other losses from here on
            self.norms = {}
        for role in method.trainable:
            norm = method.logs.get(f"{role}/grad_norm")
            if isinstance(norm, Tensor):
                self.peak[role] = torch.maximum(self.peak[role], norm) if role in self.peak else norm
        if method.step % self.every == 0:
            for role in method.trainable:
                if f"{role}/loss" in method.logs and self.before.get(role):
                    method.log_value(f"{role}/update", self.update(method, role))
            self.check_logged_step(method)
            self.before = {}

    def update(self, method: Any, role: str) -> Tensor:
        """|change of the weights in this step| / |weights before|."""
        norm = lambda some: torch.stack([v.float().square().sum() for v in some]).sum().sqrt()
        now, before = self.pieces(method, role), self.before[role]
        return method.placement.mean(norm([a - b for a, b in zip(now, before)]) / norm(before).clamp_min(1e-30))

    def check_logged_step(self, method: Any) -> None:
        for role, peak in self.peak.items():
            self.spike(method, role, float(peak))
        self.peak = {}
        for role in method.trainable:
            change, rate = method.logs.get(f"{role}/update"), method.optim[role].lr
            if change is None:
                continue
            change = float(change)
            self.fault(
                method,
                f"{role} updates too large",
                change > HUGE,
                f"a step changes the {role}'s weights by "
                f"{change:.2g} of their norm, {{}} times in a row; lower optim.{role}.lr.",
            )
            self.fault(
                method,
                f"{role} updates lost",
                change == 0 and rate > 0,
                f"steps leave the {role}'s weights as they are, "
                f"{{}} times in a row: rounded away, skipped or without gradient; raise optim.{role}.lr, keep weights "
                "in float32, or look at its loss.",
            )
        if "head/loss" in method.logs:
            loss = float(method.logs["head/loss"])
            self.fault(
                method,
                "head saturated",
                loss < SATURATED,
                f"the head's loss is {loss:.2g}, {{}} times in a row: "
                "a saturated head gives the student almost no gradient; lower optim.head.lr or raise r1.",
            )

    def spike(self, method: Any, role: str, peak: float) -> None:
        norms = self.norms.setdefault(role, deque(maxlen=WINDOW))
        usual = statistics.median(norms) if len(norms) >= LEAST else float("inf")
        if peak > SPIKE * usual > 0:
            text = f"the {role}'s gradient norm reached {peak:.3g}, {peak / usual:.0f} x its running median"
            remedy = f"inspect the batch, or lower optim.{role}.clip or optim.{role}.lr."
            self.raise_alarm(Alarm(method.step, f"{role} gradient", f"{text}; {remedy}"))
        norms.append(peak)

    def fault(self, method: Any, kind: str, present: bool, message: str) -> None:
        self.rows[kind] = self.rows.get(kind, 0) + 1 if present else 0
        if self.rows[kind] == ROW:
            self.raise_alarm(Alarm(method.step, kind, message.format(ROW)))
