"""Checkpoints under hardship: a slow disk, a full one, kills between two renames, the best ones kept."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch

from distill import config
from distill.errors import BadInput
from distill.metrics import suite
from distill.training import checkpoints, run_folder
from distill.training.run import train


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """No test waits for a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def state(step: int, value: float = 1.0) -> dict:
    return {"step": step, "networks": {"student": {"w": torch.full((1000,), value)}}, "list": [torch.ones(2), (1, "a")]}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- beside the training ----------------------------------------------------------------------------------------------


class Gate:
    """A disk that is as slow as the test wants."""

    def __init__(self, monkeypatch):
        self.open, self.started, real = threading.Event(), threading.Event(), torch.save
        self.written = 0

        def slow(value, file):
            self.started.set()
            assert self.open.wait(60)
            real(value, file)
            self.written += 1

        monkeypatch.setattr(torch, "save", slow)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_a_slow_disk_holds_nobody_up_and_what_is_written_is_what_was_submitted(tmp_path, gate):
    writer, live = checkpoints.Writer(tmp_path), state(1)
    writer.submit(live)
    assert gate.started.wait(60) and gate.written == 0  # back while the disk has written nothing
    live["networks"]["student"]["w"].zero_()  # the training continues
    live["list"][0].zero_()
    writer.check()
    assert checkpoints.complete(tmp_path) == []
    gate.open.set()
    writer.wait()
    (path,) = checkpoints.complete(tmp_path)
    assert tiny.same(checkpoints.load(path), state(1))


def test_at_most_one_is_in_flight_and_they_land_in_order(tmp_path, gate):
    landed, writer = [], None
    writer = checkpoints.Writer(tmp_path, keep=0, written=lambda path: landed.append(path.name))
    writer.submit(state(1))
    second = threading.Thread(target=writer.submit, args=(state(2),))
    second.start()
    time.sleep(0.05)
    assert second.is_alive() and [t.name for t in threading.enumerate()].count("checkpoint") == 1
    gate.open.set()
    second.join()
    writer.wait()
    assert landed == ["step-00000001", "step-00000002"]


def test_training_waits_for_the_copy_only(tmp_path, monkeypatch):
    """A disk that is done with step 2 only when the training is done with step 3; the last write is waited for."""
    order, real, inner, third = [], torch.save, checkpoints.Writer.submit, threading.Event()

    def slow(value, file):
        order.append(("write", value["step"]))
        assert third.wait(60)
        real(value, file)
        order.append(("written", value["step"]))

    monkeypatch.setattr(torch, "save", slow)
    monkeypatch.setattr(
        checkpoints.Writer,
        "submit",
        lambda self, s, *a, **m: (inner(self, s, *a, **m), order.append(("submitted", s["step"])))[0],
    )
    for n in range(1, 7):
        tiny.after(monkeypatch, n, lambda n=n: order.append(("step", n)))
    tiny.after(monkeypatch, 3, third.set)
    tiny.train(tmp_path / "run", "train.save_every=2", "train.steps=6")
    assert order.index(("step", 3)) < order.index(("written", 2)), order
    assert order.index(("submitted", 2)) < order.index(("written", 2)), order
    assert order.index(("written", 2)) < order.index(("write", 4))
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").name == "step-00000006"  # the end waits


def test_a_write_costs_the_training_its_copy(tmp_path, gate):
    """Processor time of the training's own thread, while the disk has not taken a byte; `pytest -s` prints it."""
    live = {"step": 1, "networks": {"student": {str(i): torch.zeros(1 << 20) for i in range(8)}}}
    writer, clock = checkpoints.Writer(tmp_path), time.thread_time
    checkpoints.to_cpu(live)  # the first touches new memory
    began = clock()
    checkpoints.to_cpu(live)
    copied = clock()
    writer.submit(live)
    stall, copy = clock() - copied, copied - began
    assert gate.written == 0
    print(f"\nof 32 MiB: stall {1e3 * stall:.1f} ms, copy {1e3 * copy:.1f} ms, ratio {stall / copy:.2f}")
    assert stall < 2 * copy + 0.005
    gate.open.set()
    writer.wait()


def test_what_a_write_met_is_raised_at_the_next_step_and_once(tmp_path, monkeypatch):
    def broken(value, file):
        raise OSError(28, "No space left on device")

    writer = checkpoints.Writer(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(torch, "save", broken)
        writer.submit(state(1))
        writer.thread.join()
        with pytest.raises(BadInput, match="step-00000001 could not be written .No space left on device"):
            writer.check()
        writer.check()
    writer.submit(state(2))
    writer.wait()
    assert names(tmp_path) == ["step-00000002"]


def test_a_run_whose_disk_is_full_stops_in_one_sentence_and_keeps_what_it_had(tmp_path, monkeypatch):
    keys, real, seen = ("train.save_every=2", "train.steps=40"), torch.save, []

    def full(value, file):
        seen.append(value["step"])
        if value["step"] > 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(value, file)

    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        with pytest.raises(BadInput, match=r"step-00000004 could not be written .*needs [\d,]+ bytes, [\d,]+ are free"):
            tiny.train(tmp_path / "run", *keys)
    assert seen == [2, 4], "it went on without being able to save"
    assert names(tmp_path / "run" / "checkpoints") == ["step-00000002"]
    assert tiny.train(tmp_path / "run", *keys, resume=True).method.step == 40


# -- a full disk ------------------------------------------------------------------------------------------------------

FULL = """
import resource, signal, sys, torch
from distill.training import checkpoints
from distill.errors import BadInput
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = lambda step, n: {"step": step, "networks": {"student": {"w": torch.ones(n)}}}
checkpoints.save(sys.argv[1], state(1, 1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(sys.argv[1], state(2, 1_000_000))
except BadInput as error:
    print(error)
"""


def test_a_write_that_the_kernel_cuts_off_leaves_the_old_one_and_names_path_and_bytes(tmp_path):
    """The kernel's own refusal, in a process of its own: no file may grow beyond 100 kB."""
    out = subprocess.check_output([sys.executable, "-c", FULL, str(tmp_path)], text=True)
    assert f"{tmp_path}/step-00000002 could not be written" in out and "needs 4,000,000 bytes" in out, out
    assert "are free" in out and names(tmp_path) == ["step-00000001"]
    assert checkpoints.load(tmp_path / "step-00000001")["step"] == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_keeps_its_checkpoint(small_disk):
    checkpoints.save(small_disk, state(1))
    big = {"step": 2, "networks": {"student": {"w": torch.ones(500_000)}}}
    with pytest.raises(BadInput, match=r"step-00000002 could not be written .*needs 2,000,000 bytes, [\d,]+ are free"):
        checkpoints.save(small_disk, big)
    assert names(small_disk) == ["step-00000001"] and checkpoints.load(small_disk / "step-00000001")["step"] == 1
    checkpoints.save(small_disk, state(3))  # and there is room again


# -- renames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills_at", [1, 2, 3, 4])
def test_a_kill_at_any_rename_or_removal_leaves_a_whole_checkpoint_of_the_step(tmp_path, monkeypatch, kills_at):
    """Saving a step again moves the old one aside first; dying anywhere in between must lose neither."""
    checkpoints.save(tmp_path, state(1, 1.0), keep=1)
    calls, replace, remove = [], os.replace, shutil.rmtree

    def counted(inner):
        def call(*args, **kw):
            calls.append(args)
            if len(calls) >= kills_at:
                raise SystemExit  # as far as the folder goes, a kill
            return inner(*args, **kw)

        return call

    with monkeypatch.context() as m:
        m.setattr(os, "replace", counted(replace))
        m.setattr(shutil, "rmtree", counted(remove))
        try:
            checkpoints.save(tmp_path, state(1, 2.0), keep=1)
            checkpoints.save(tmp_path, state(2, 3.0), keep=1)
        except SystemExit:
            pass
    checkpoints.recover(tmp_path)
    found = checkpoints.complete(tmp_path)
    assert found and all(checkpoints.load(p)["step"] for p in found)
    checkpoints.save(tmp_path, state(3), keep=2)
    assert not [n for n in names(tmp_path) if not n.startswith("step-")]


# -- the best ---------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_remain(tmp_path):
    for step, value in ((1, 0.5), (2, 0.1), (3, 0.9), (4, float("nan")), (5, 0.3), (6, 0.8)):
        checkpoints.save(tmp_path, state(step), keep=1, keep_best=2)
        checkpoints.score(tmp_path, step, value)
    checkpoints.save(tmp_path, state(7), keep=1, keep_best=2)
    assert [p.name[-1] for p in checkpoints.complete(tmp_path)] == ["2", "5", "7"]


@pytest.mark.parametrize("best, expected", [("min energy", [2, 4, 8]), ("max energy", [6, 8])])
def test_a_run_keeps_its_best_by_the_metric_and_direction_of_the_config(tmp_path, monkeypatch, best, expected):
    scores = iter([9.0, 0.1, 0.2, 0.8, 0.5])  # at steps 0, 2, 4, 6, 8
    monkeypatch.setattr(
        suite.ToySuite, "score", lambda self, x, cond, quick=False, ranks=None: {"energy": next(scores)}
    )
    count = f"train.keep_best={len(expected) - 1}"
    tiny.train(tmp_path / "run", "train.steps=8", "train.validate_every=2", "train.keep=1", count, f"train.best={best}")
    assert [int(p.name[5:]) for p in checkpoints.complete(tmp_path / "run" / "checkpoints")] == expected


def test_a_metric_that_is_not_measured_is_reported_before_the_first_step(tmp_path):
    with pytest.raises(BadInput, match="train.best: 'min fd' must be min or max and one of energy"):
        tiny.train(tmp_path / "run", "train.keep_best=1", "train.best=min fd")
    assert list(tmp_path.iterdir()) == []


# -- what a resume finds ----------------------------------------------------------------------------------------------


def test_the_manifest_says_what_a_resume_needs(tmp_path):
    cfg = tiny.recipe("train.steps=2", "name=x")
    train(cfg, tmp_path / "run")
    facts = json.loads((checkpoints.latest(tmp_path / "run" / "checkpoints") / "manifest.json").read_text())
    assert facts["step"] == 2 and facts["config"] == config.fingerprint(cfg) and facts["clean"] is True
    assert facts["files"]["state.pt"].keys() == {"bytes", "crc32"}
    assert facts["torch"] == torch.__version__ and facts["world"] == 1 and facts["precision"] == "32"
    assert facts["order"] == {"batch_size": 16} and "strategy" in facts and "wandb" in facts


def test_checkpoints_that_are_gone_are_never_taken_for_a_run_without_any(tmp_path, capsys):
    folder, keys = tmp_path / "run", ("train.save_every=2", "train.steps=4")
    tiny.train(folder, *keys)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    tiny.train(folder, *keys, resume=True)
    assert "step-00000004 is missing; continuing from step-00000002" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(folder / "checkpoints")
    before = tiny.files(folder)
    with pytest.raises(BadInput, match="had checkpoint step-00000004 and has none now; restore it"):
        tiny.train(folder, *keys, resume=True)
    assert tiny.files(folder) == before


def test_a_torn_newest_checkpoint_stops_a_resume_with_the_newest_good_one(tmp_path):
    folder, keys = tmp_path / "run", ("train.save_every=2", "train.steps=6", "train.keep=0")
    tiny.train(folder, *keys)
    for step in (4, 6):
        (folder / "checkpoints" / f"step-0000000{step}" / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="step-00000006 is not complete; remove it to continue from step-00000002"):
        tiny.train(folder, *keys, resume=True)


def test_what_is_no_longer_exact_is_reported():
    before = {"world": 2, "strategy": "ddp", "precision": "32", "order": {"workers": 2}, "torch": "2.13", "config": "a"}
    assert run_folder.resume_notices(before, before) == [] and run_folder.resume_notices(before, {}) == []
    said = run_folder.resume_notices(before | {"world": 4, "strategy": "fsdp", "config": "b"}, before)
    assert len(said) == 2 and said[0].startswith("world was 2 and is 4: the order of the data, the random draws")
    (order,) = run_folder.resume_notices(before | {"order": {"workers": 3}}, before)
    assert order.startswith("order was {'workers': 2} and is {'workers': 3}: the samples of a step")


def test_a_resumed_run_says_it(tmp_path, capsys):
    tiny.train(tmp_path / "run", "train.steps=2")
    manifest = checkpoints.latest(tmp_path / "run" / "checkpoints") / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"world": 8}))
    tiny.train(tmp_path / "run", "train.steps=3", resume=True)
    assert "world was 8 and is 1: the order of the data" in " ".join(capsys.readouterr().out.split())
