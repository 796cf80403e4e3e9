"""Watchdogs: what is flagged, when, once; and that healthy numbers are not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.config.schema import Optim
from distill.methods.placement import Placement
from distill.training.alarms import LEAST, ROW, RULES, MetricMonitor, UpdateMonitor, halfway_step, rules_for

TEACHER = {"diversity": 2.0, "coverage": 0.9, "beyond": 0.001, "contrast": 1.0, "high_frequency": 0.1}
HEALTHY = TEACHER | {"critic_lag": 1.0, "head_accuracy": 0.6}


def kinds(alarms) -> list[str]:
    return [a.kind for a in alarms]


@pytest.mark.parametrize(
    "key, value, kind",
    [
        ("diversity", 0.5, "collapse"),
        ("coverage", 0.4, "mode loss"),
        ("beyond", 0.2, "saturation"),
        ("contrast", 2.0, "contrast"),
        ("contrast", 0.3, "contrast"),
        ("high_frequency", 0.01, "frequency"),
        ("high_frequency", 1.0, "frequency"),
        ("critic_lag", 1.6, "critic lag"),
        ("head_accuracy", 1.0, "head saturated"),
    ],
)
def test_a_reading_that_leaves_its_range_is_flagged_at_that_validation_and_once(key, value, kind):
    monitor = MetricMonitor(500)
    assert monitor.check(0, HEALTHY, TEACHER) == []
    found = monitor.check(100, HEALTHY | {key: value}, TEACHER)
    assert (
        kinds(found) == [kind]
        and found[0].step == 100
        and "\n" not in found[0].message
        and "step 0" in found[0].message
    )
    assert monitor.check(200, HEALTHY | {key: value}, TEACHER) == []
    assert monitor.check(300, HEALTHY, TEACHER) == []
    assert kinds(monitor.check(400, HEALTHY | {key: value}, TEACHER)) == [kind], "a second fall is a second alarm"
    assert sum(rule.kind == kind for rule in RULES) == 1


def test_what_was_never_reached_counts_from_half_of_the_run_on():
    monitor, blur = MetricMonitor(500), HEALTHY | {"diversity": 0.1}
    assert monitor.check(0, blur, TEACHER) == [] and monitor.check(400, blur, TEACHER) == []
    assert kinds(monitor.check(500, blur, TEACHER)) == ["collapse"] and monitor.check(600, blur, TEACHER) == []


def test_a_warm_start_counts_for_nothing():
    monitor, blur = MetricMonitor(700, warm=400), HEALTHY | {"diversity": 0.1}
    monitor.check(0, HEALTHY, TEACHER)
    assert (
        monitor.check(300, blur, TEACHER)
        == monitor.check(400, blur, TEACHER)
        == monitor.check(600, blur, TEACHER)
        == []
    )
    assert kinds(monitor.check(700, blur, TEACHER)) == ["collapse"]


def test_numbers_without_their_like_are_not_judged():
    monitor = MetricMonitor(5)
    assert monitor.check(9, {"diversity": 0.0}, {}) == [] and monitor.check(9, {}, TEACHER) == []
    assert monitor.check(9, {"coverage": 0.0}, TEACHER | {"coverage": 0.1}) == [], (
        "a teacher without coverage is not a measure"
    )


@pytest.mark.parametrize(
    "step, clock, warm, half",
    [
        (0, (0, 1000), 0, 500),
        (700, (700, 1000), 0, 500),
        (0, (0, 1000), 400, 700),
        (300, (100, 200), 0, float("inf")),
        (850, (50, 200), 0, 900),  # anew at 200 for 200 steps; at 800 for the last 200
    ],
)
def test_half_of_a_run_that_starts_anew_is_half_of_its_last_start(step, clock, warm, half):
    assert (
        halfway_step(SimpleNamespace(step=step, schedule_step=lambda: clock, warm_start=warm, total_steps=1000)) == half
    )


def test_a_method_with_a_metric_is_not_held_to_the_datas_modes():
    plain, moved = (rules_for(method(metric=m)) for m in (None, print))
    assert plain == tuple(r.worded() for r in RULES)
    assert {r.kind for r in plain} - {r.kind for r in moved} == {"mode loss"}


def method(metric=None, teacher=True, trainable=("critic", "student")):
    return SimpleNamespace(metric=metric, role=lambda name: print if teacher else None, trainable=trainable)


def test_a_run_from_data_that_has_not_reached_them_is_advised_to_train_longer():
    """Without a teacher the reference is the data; a metric that was reached and lost again has the other remedy."""
    missed = HEALTHY | {"coverage": 0.0, "beyond": 0.3, "contrast": 0.2}
    alone, taught = (
        MetricMonitor(50, rules=rules_for(method(teacher=t, trainable=("student",)))) for t in (False, True)
    )
    early = {a.kind: a.message for a in alone.check(50, missed, TEACHER)}
    assert set(early) == {"mode loss", "saturation", "contrast"}
    assert all("; raise train.steps" in text and "lower" not in text for text in early.values())
    assert early["mode loss"].startswith("coverage is 0% of the data's in the second half of the run; ")
    alone.check(60, HEALTHY, TEACHER)
    (lost,) = alone.check(70, HEALTHY | {"coverage": 0.36}, TEACHER)
    assert lost.message == "coverage is 40% of the data's (100% at step 60); lower optim.student.lr."
    assert all("raise train.steps" not in a.message for a in taught.check(50, missed, TEACHER))


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("critic", [True, False])
def test_alarms_speak_of_the_roles_that_the_method_has(teacher, critic):
    rules = rules_for(method(teacher=teacher, trainable=("student", "critic") if critic else ("student",)))
    own = [
        r for r in rules if r.kind not in ("critic lag", "head saturated")
    ]  # readings that other methods do not have
    text = " ".join(f"{r.text} {r.remedy}" for r in own)
    assert ("teacher's" in text) == teacher and ("data's" in text) != teacher and ("guidance" in text) == teacher
    assert ("critic" in text) == critic and ("head" in text) == critic
    assert not set("[]<>") & set(text) and "  " not in text and "REFERENCE" not in text


# -- between validations ---------------------------------------------------------------------------------------------


class Fake:
    """What UpdateMonitor sees of a method: one role of one matrix, its logs and step."""

    def __init__(self, lr=1e-3, roles=("student",)):
        self.trainable, self.step, self.warm_start, self.logs, self.placement = roles, 0, 0, {}, Placement()
        self.anew = 0
        self.optim = {role: Optim(lr=lr) for role in roles}
        for role in roles:
            setattr(self, role, nn.Linear(4, 4, bias=False))
        self.placement.method = self

    def log_value(self, name, value):
        self.logs[name] = value

    def schedule_step(self):
        return self.step - self.anew, 1000


def drive(watch, method, steps, norm=lambda n: 1.0, change=0.01, **logs):
    for _ in range(steps):
        watch.on_train_batch_start(None, method, None, 0)
        method.logs = {}
        for role in method.trainable:
            with torch.no_grad():
                getattr(method, role).weight.mul_(1 + change)
            method.logs |= {
                f"{role}/loss": torch.tensor(0.5),
                f"{role}/grad_norm": torch.tensor(float(norm(method.step))),
            }
        method.logs |= {k: torch.tensor(v) for k, v in logs.items()}
        method.step += 1
        watch.on_train_batch_end(None, method, None, None, 0)


@pytest.fixture
def watched():
    alarms, method = [], Fake()
    return UpdateMonitor(2, alarms.append), method, alarms


def test_the_update_is_the_change_over_the_weights(watched):
    watch, method, alarms = watched
    drive(watch, method, 4, change=0.02)
    assert float(method.logs["student/update"]) == pytest.approx(0.02, rel=1e-3) and alarms == []
    drive(watch, method, 1)
    assert "student/update" not in method.logs, "off the beat nothing is measured"


def test_a_spike_between_two_intervals_is_seen(watched):
    watch, method, alarms = watched
    drive(watch, method, 2 * LEAST, norm=lambda n: 1 + n % 3)
    assert alarms == []
    drive(watch, method, 2, norm=lambda n: 500.0 if n == 2 * LEAST else 1.0)  # the first step of the two, off the beat
    assert kinds(alarms) == ["student gradient"] and "500" in alarms[0].message


def test_the_end_of_a_warm_start_is_no_spike(watched):
    watch, method, alarms = watched
    method.warm_start = 2 * LEAST
    drive(watch, method, 2 * LEAST)
    drive(watch, method, 2 * LEAST + 2, norm=lambda n: 500.0)
    assert alarms == []


def test_a_new_start_midway_is_no_spike(watched):
    watch, method, alarms = watched
    drive(watch, method, 2 * LEAST)
    method.anew = 2 * LEAST
    drive(watch, method, 2 * LEAST + 2, norm=lambda n: 500.0)
    assert alarms == []


@pytest.mark.parametrize("change, kind", [(0.5, "student updates too large"), (0.0, "student updates lost")])
def test_updates_too_large_or_lost_are_flagged_after_some_in_a_row(watched, change, kind):
    watch, method, alarms = watched
    drive(watch, method, 2 * (ROW - 1), change=change)
    assert alarms == []
    drive(watch, method, 8, change=change)
    assert kinds(alarms) == [kind] and "optim.student.lr" in alarms[0].message


def test_a_learning_rate_of_zero_is_no_lost_update():
    alarms, method = [], Fake(lr=0.0)
    drive(UpdateMonitor(1, alarms.append), method, 2 * ROW, change=0.0)
    assert alarms == []


def test_a_head_without_loss_is_flagged():
    alarms, method = [], Fake(roles=("head",))
    drive(UpdateMonitor(1, alarms.append), method, 2 * ROW, **{"head/loss": 1.386})
    assert alarms == []
    drive(UpdateMonitor(1, alarms.append), method, 2 * ROW, **{"head/loss": 0.001})
    assert kinds(alarms) == ["head saturated"]


def test_a_step_between_intervals_reads_nothing_from_the_device(watched, monkeypatch):
    """No `float(tensor)`: that would wait for an accelerator."""
    watch, method, _ = watched
    watch.every = 100
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("a synchronisation"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a synchronisation"))
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: pytest.fail("a copy of the weights"))
    method.optim = SimpleNamespace()
    drive(watch, method, 50)
    assert watch.peak["student"].ndim == 0
