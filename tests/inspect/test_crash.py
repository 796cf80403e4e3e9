"""Exceptions in `distill check`: of the run's own code they are FAIL with the place, of the checks a warning."""

from __future__ import annotations

import inspect

import pytest
import torch
from checks import look, toy

from distill.inspect.check import UPDATE_CHECKS
from distill.methods import Method


class Regression(Method):
    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z):  # one argument too few: (x, z, cond) are passed
        return x.sum()


class Halts(Regression):
    def loss(self, x, z, cond):
        return x[:, 99].sum()


class Deep(Regression):
    def loss(self, x, z, cond):
        return torch.nn.functional.mse_loss(x, x[:, :0].expand(-1, 5))


class Full(Regression):
    def loss(self, x, z, cond):
        raise torch.OutOfMemoryError("no room")


def line_of(text: str) -> int:
    source, first = inspect.getsource(inspect.getmodule(Regression)).splitlines(), 1
    return next(i for i, line in enumerate(source, first) if text in line)


def experiment(kind: type):
    built = toy(name="pcm")
    method = kind({"teacher": built.method.teacher, "student": built.method.student})
    built.method = method
    return built


@pytest.mark.parametrize(
    "kind, line, error",
    [
        (
            Regression,
            "def loss(self, x, z):",
            "TypeError: Regression.loss() takes 3 positional arguments but 4 were given",
        ),
        (Halts, "return x[:, 99]", "IndexError: "),
        (Deep, "return torch.nn.functional", "RuntimeError: "),
    ],
)
def test_a_step_that_raises_fails_with_its_place_and_the_checks_of_the_step_are_skipped(kind, line, error, tmp_path):
    found = [f for f in look(experiment(kind), tmp_path) if f.name in ("update", *UPDATE_CHECKS)]
    assert [(f.level, f.name) for f in found] == [("FAIL", "update"), *(("skipped", n) for n in UPDATE_CHECKS)]
    assert found[0].text.startswith(f"{__file__}:{line_of(line)}: {error}"), found[0]
    assert "update" in found[1].text


def test_a_network_that_raises_fails_every_check_that_calls_it(tmp_path):
    def forward(*args, **cond):
        raise ValueError("inputs of 3 channels only")

    built = toy()
    built.method.student.native = forward
    found = look(built, tmp_path, "finite", "gradients")
    assert [(f.name, f.level) for f in found] == [("finite", "FAIL"), ("update", "FAIL"), ("gradients", "skipped")]
    place = f"{__file__}:{line_of('raise ValueError(')}: ValueError: inputs of 3 channels only"
    assert all(f.text == place for f in found if f.level == "FAIL")


def test_what_is_not_certain_is_a_warning(tmp_path, monkeypatch):
    """A step that fits no memory, as a dry run needs more of it; and an exception of a check itself, which stops nobody."""
    from distill.inspect import check

    found = [f for f in look(experiment(Full), tmp_path) if f.name == "update"]
    assert [f.level for f in found] == ["WARN"] and "OutOfMemoryError: no room" in found[0].text
    monkeypatch.setattr(check.settings, "Finding", None)
    monkeypatch.setitem(check.CHECKS, "settings", check.settings.settings)
    (own,) = look(toy("optim.student.lr=0"), tmp_path, "settings")
    assert own.level == "WARN" and "failed to run (AttributeError" in own.text
