"""Steps without a finite loss or gradient: skipped whole, counted, undone when they are too many, and then told."""

from __future__ import annotations

import math
import os

import pytest
import tiny
import torch

from distill.errors import BadInput
from distill.methods.base import Method
from distill.training import checkpoints
from distill.training.experiment import build_experiment


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """No test waits for a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def newest(folder):
    return checkpoints.load(checkpoints.latest(folder / "checkpoints"))


def column(folder, name: str) -> list[str]:
    return [r[name] for r in tiny.rows(folder) if r[name]]


def spoil(method: Method, where: str) -> None:
    """A loss that is not finite, or one whose gradient is not."""
    inner = method.loss
    bad = {
        "nan loss": lambda x: x * math.nan,
        "infinite loss": lambda x: x + math.inf,
        "nan gradient": lambda x: x + (x - x.detach()).sqrt(),
    }[where]
    method.loss = lambda *shared: bad(inner(*shared))


def experiment(on_device: bool):
    made = build_experiment(tiny.recipe("method.ema=0.5"))
    made.method.total_steps = 6
    made.method.configure_optimizers()
    if on_device:  # as on an accelerator, where the host does not look
        made.method.placement.waits = lambda role: False
    return made, iter(made.data.loader())


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("where", ["nan loss", "infinite loss", "nan gradient"])
def test_a_turn_that_is_not_finite_moves_nothing_and_the_next_one_goes_on(where, on_device):
    (made, batches), (other, same) = experiment(on_device), experiment(False)
    method = made.method
    for _ in range(2):
        method.training_step(next(batches))
        other.method.training_step(next(same))
    before, kept = method.snapshot(), method.loss
    before = checkpoints.to_cpu(before)
    spoil(method, where)
    method.training_step(next(batches))
    after = method.snapshot()
    for part in ("networks", "optimizers"):
        assert tiny.same(strip(before[part]), strip(after[part])), part
    assert after["nonfinite"] == {"student": [1, 1]} and int(method.logs["student/skipped"]) == 1
    method.loss = kept
    method.training_step(next(batches))
    assert method.nonfinite.state() == {"student": [1, 0]} and method.step == 4
    moved = method.snapshot()["networks"]
    assert not tiny.same(moved, before["networks"]) and all(v.isfinite().all() for v in moved["student"].values())


def strip(part):
    """Without the learning rate, which is set anew at each step."""
    if isinstance(part, dict):
        return {k: strip(v) for k, v in part.items() if k != "lr"}
    return [strip(v) for v in part] if isinstance(part, list) else part


def test_deciding_on_the_device_and_on_the_host_give_the_same_run():
    ends = []
    for on_device in (False, True):
        made, batches = experiment(on_device)
        torch.manual_seed(0)
        for n in range(6):
            batch = next(batches)
            made.method.training_step(batch | {"x": batch["x"] * (math.nan if n in (2, 3) else 1)})
        ends.append(made.method.snapshot())
    for name in ("student", "ema"):
        for key, value in ends[0]["networks"][name].items():
            torch.testing.assert_close(value, ends[1]["networks"][name][key], rtol=1e-6, atol=1e-7)
    assert ends[0]["nonfinite"] == ends[1]["nonfinite"] == {"student": [2, 0]}


def test_a_single_bad_batch_costs_one_step_and_is_seen(tmp_path, monkeypatch):
    tiny.poison(monkeypatch, 3)
    made = tiny.train(tmp_path / "run")
    assert made.method.step == 6
    assert [float(v) for v in column(tmp_path / "run", "student/skipped")] == [0, 0, 0, 1, 1, 1]
    assert all(v.isfinite().all() for v in newest(tmp_path / "run")["networks"]["student"].values())


def test_too_many_in_a_row_go_back_once_and_on_with_other_data(tmp_path, monkeypatch, capsys):
    tiny.poison(monkeypatch, 5, 6, 7)
    keys = ("train.steps=12", "train.save_every=2", "train.nonfinite_limit=3")
    made = tiny.train(tmp_path / "run", *keys)
    conditions = " ".join(capsys.readouterr().out.split())
    assert "The student's loss or gradient was not finite in 3 turns in a row, the last at step 7" in conditions
    assert "continuing from step 4 with other data" in conditions
    assert made.method.step == 12 and made.method.extra_batches == 4  # batches 4 to 7 are lost
    assert made.method.trainer.global_step == 16, "global_step counts passes done, undone ones too"
    assert [int(s) for s in column(tmp_path / "run", "step")] == [0, *range(1, 13), 12]
    assert newest(tmp_path / "run")["extra_batches"] == 4


def test_a_run_that_went_back_resumes_bit_for_bit(tmp_path, monkeypatch):
    tiny.poison(monkeypatch, 5, 6, 7)
    keys = ("train.steps=12", "train.save_every=2", "train.nonfinite_limit=3")
    tiny.train(tmp_path / "whole", *keys)
    for at in (3, 9):  # before it goes back, and after
        with monkeypatch.context() as m:
            tiny.after(m, at, tiny.interrupt)
            assert tiny.train(tmp_path / str(at), *keys).method.step == at
        tiny.train(tmp_path / str(at), *keys, resume=True)
        assert tiny.same(newest(tmp_path / str(at)), newest(tmp_path / "whole")), at


def test_a_second_time_stops_the_run_with_role_step_and_mend_and_keeps_a_good_checkpoint(tmp_path, monkeypatch):
    tiny.poison(monkeypatch, 5, 6, 7, 10, 11, 12)
    says = (
        r"student's loss or gradient was not finite in 3 turns in a row, the last at step 8, again, .*lower optim\.stu"
    )
    with pytest.raises(BadInput, match=says):
        tiny.train(tmp_path / "run", "train.steps=12", "train.save_every=2", "train.nonfinite_limit=3")
    state = newest(tmp_path / "run")
    assert state["step"] == 6 and state["nonfinite"]["student"][1] == 0
    assert all(v.isfinite().all() for v in state["networks"]["student"].values())


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path, monkeypatch):
    tiny.poison(monkeypatch, *range(2, 9))
    with pytest.raises(BadInput, match="the last at step 4, and no checkpoint was written before; lower optim.student"):
        tiny.train(tmp_path / "run", "train.nonfinite_limit=3")


def test_a_bad_spell_does_not_push_the_good_checkpoints_out(tmp_path, monkeypatch):
    tiny.poison(monkeypatch, *range(4, 9))
    keys = ("train.steps=12", "train.save_every=1", "train.keep=1", "train.nonfinite_limit=5")
    made = tiny.train(tmp_path / "run", *keys)
    assert made.method.step == 12 and made.method.extra_batches == 5


def test_a_role_is_skipped_for_its_own_loss_only(tmp_path, monkeypatch):
    made = build_experiment(tiny.recipe("method.warm_start=0", name="tdm"))
    method = made.method
    method.total_steps = 4
    method.configure_optimizers()
    inner = method.critic_loss
    method.critic_loss = lambda *a: inner(*a) * math.nan
    before = checkpoints.to_cpu(method.snapshot()["networks"])
    method.training_step(next(iter(made.data.loader())))
    after = method.snapshot()
    assert tiny.same(before["critic"], after["networks"]["critic"])
    assert not tiny.same(before["student"], after["networks"]["student"])
    assert after["nonfinite"] == {"critic": [1, 1], "student": [0, 0]}
