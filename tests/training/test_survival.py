"""What must not end a run: pictures, dashboards, metrics, old checkpoints, damaged records, another process in its folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from distill.cli import main
from distill.errors import BadInput
from distill.methods.base import Method
from distill.metrics.suite import ToySuite
from distill.training import checkpoints, lock, loggers, records, run_folder
from distill.training.lock import LOCK, RunLock

ROOT = Path(__file__).parents[2]
VALIDATED = ("train.validate_every=2", "eval.evaluations=[1,2]")


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def newest(folder: Path) -> dict:
    return checkpoints.load(checkpoints.latest(folder / "checkpoints"))


def fail(*arguments, **keywords):
    raise RuntimeError("on purpose")


# -- pictures, dashboards, metrics ----------------------------------------------------------------------------------------


class Broken:
    """A dashboard of which every call fails."""

    def __getattr__(self, name):
        return fail


def test_a_run_outlives_its_pictures_and_dashboards(tmp_path, monkeypatch, capsys):
    inner = loggers.open_loggers
    monkeypatch.setattr(
        "distill.training.loggers.open_loggers",
        lambda opened, *a, **k: (inner(opened, *a, **k), opened.append(Broken())),
    )
    monkeypatch.setattr(ToySuite, "picture", fail)
    experiment = tiny.train(tmp_path / "run", *VALIDATED)
    said = " ".join(capsys.readouterr().out.split())
    assert experiment.method.step == 6 and newest(tmp_path / "run")["step"] == 6
    assert [r["step"] for r in tiny.rows(tmp_path / "run") if r["validation/energy"]] == ["0", "2", "4", "6"]
    assert said.count("WARNING: Broken failed at 'write' (RuntimeError: on purpose); the run continues.") == 1
    assert "could not be drawn" in said and "Broken could not be closed: on purpose" in said


def test_a_cost_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "distill.training.cost.write_json", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    tiny.train(tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == 6 and "cost.json could not be written" in " ".join(
        capsys.readouterr().out.split()
    )


def test_rows_that_the_disk_refuses_come_with_the_next_one(tmp_path, monkeypatch):
    file, inner = records.MetricsFile(tmp_path / "metrics.csv"), open
    file.write({"a": 1}, 1)

    class Full:
        def __init__(self, *arguments, **keywords):
            self.file = inner(*arguments, **keywords)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, text):
            self.file.write(text[:3])
            self.file.flush()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records, "open", Full, raising=False)
        with pytest.raises(OSError):
            file.write({"a": 2}, 2)
    file.write({"a": 3, "b": 4}, 3)
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,a,b", "1,1,", "2,2,", "3,3,4"]


def test_the_last_validation_comes_after_the_last_checkpoint(tmp_path, monkeypatch):
    """A process that is killed in it, for memory or by a limit, has lost nothing; `--resume` validates."""
    inner = ToySuite.score

    def score(self, *arguments, **keywords):
        if (tmp_path / "run" / "checkpoints" / "step-00000006").exists():
            raise KeyboardInterrupt
        return inner(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(ToySuite, "score", score)
        with pytest.raises(KeyboardInterrupt):
            tiny.train(tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == 6 and tiny.rows(tmp_path / "run")[-1]["validation/energy"] == ""
    tiny.train(tmp_path / "run", resume=True)
    tiny.train(tmp_path / "whole")
    ours, theirs = ([r for r in tiny.rows(tmp_path / n) if r.get("validation/energy")] for n in ("run", "whole"))
    assert ours == theirs and [r["step"] for r in ours] == ["0", "6"]


def test_a_validation_that_fails_is_an_alarm_unless_it_is_the_first(tmp_path, monkeypatch):
    inner, calls = ToySuite.score, []

    def score(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) > 3:  # the teacher, then steps 0 and 2
            raise RuntimeError("out of memory")
        return inner(self, *arguments, **keywords)

    monkeypatch.setattr(ToySuite, "score", score)
    experiment = tiny.train(tmp_path / "run", *VALIDATED, name="tdm")
    assert newest(tmp_path / "run")["step"] == 6
    assert [(a.step, a.kind) for a in experiment.validation.alarms] == [
        (4, "validation failed"),
        (6, "validation failed"),
    ]
    assert "RuntimeError: out of memory" in experiment.validation.alarms[0].message
    calls[:] = [1] * 3
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny.train(tmp_path / "other", *VALIDATED, name="tdm")


# -- values that are not finite --------------------------------------------------------------------------------------------


def test_samples_that_are_not_finite_are_scored_as_nan_and_alarmed(tmp_path, monkeypatch):
    inner = Method.sample

    def sample(self, z, *arguments, **keywords):
        x = inner(self, z, *arguments, **keywords)
        return torch.where((torch.arange(len(x)) < 3)[:, None], math.nan, x) if self.step == 4 else x

    monkeypatch.setattr(Method, "sample", sample)
    experiment = tiny.train(tmp_path / "run", *VALIDATED, "train.keep_best=1", "train.patience=9", name="tdm")
    rows = {r["step"]: r["validation/energy"] for r in tiny.rows(tmp_path / "run") if r["validation/energy"]}
    assert rows["4"] == "nan" and math.isfinite(float(rows["6"])) and experiment.method.step == 6
    (alarm,) = [a for a in experiment.validation.alarms if a.kind == "samples not finite"]
    assert alarm.step == 4 and alarm.message.startswith("3 of 40 samples of the student's average hold NaN")
    kept = json.loads((tmp_path / "run" / "checkpoints" / "scores.json").read_text())
    assert kept["step-00000004"] == math.inf


@pytest.mark.parametrize("name, at", [("ema", 3), ("critic", 6)])
def test_weights_that_are_not_finite_roll_the_run_back(tmp_path, monkeypatch, capsys, name, at):
    inner, spoilt = Method.training_step, []

    def training_step(self, batch, index=0):
        inner(self, batch, index)
        if self.step == at and not spoilt:
            spoilt.append(name)
            with torch.no_grad():
                next(getattr(self, name).parameters()).fill_(math.nan)

    monkeypatch.setattr(Method, "training_step", training_step)
    experiment = tiny.train(tmp_path / "run", "train.save_every=2", "train.nonfinite_limit=3", name="tdm")
    assert f"weights of '{name}' are not finite at step" in " ".join(capsys.readouterr().out.split())
    assert experiment.method.step == 6 and newest(tmp_path / "run")["step"] == 6
    assert all(torch.isfinite(v).all() for v in newest(tmp_path / "run")["networks"]["ema"].values())


# -- old checkpoints ---------------------------------------------------------------------------------------------------------


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or fail_os(path))
        tiny.train(tmp_path / "run", "train.save_every=1", "train.keep=1")
    assert newest(tmp_path / "run")["step"] == 6
    assert any("could not be removed (Directory not empty); the run continues" in str(w.message) for w in caught)
    tiny.train(tmp_path / "run", "train.save_every=1", "train.keep=1", "train.steps=8", resume=True)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000008"]  # what was left is swept


def fail_os(path):
    raise OSError(39, "Directory not empty", str(path))


def test_a_link_to_a_checkpoint_that_was_moved_is_taken_away(tmp_path):
    tiny.train(tmp_path / "run", "train.save_every=3")
    old = tmp_path / "run" / "checkpoints" / "step-00000003"
    shutil.move(old, tmp_path / "kept")
    old.symlink_to(tmp_path / "kept")
    tiny.train(tmp_path / "run", "train.steps=8", resume=True)
    assert not old.is_symlink() and checkpoints.intact(tmp_path / "kept")


# -- whose folder and whose checkpoint -----------------------------------------------------------------------------------------


HOLD = """
import sys, time
from distill.training.lock import RunLock
with RunLock(sys.argv[1]) as held:
    held.acquire()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a finished run."""
    tiny.train(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_is_trained_in_is_refused_until_that_process_is_gone(holder, tmp_path):
    before = tiny.files(tmp_path / "run")
    with pytest.raises(BadInput, match=rf"run is being trained by process {holder.pid} on \S+; wait for it, end it"):
        tiny.train(tmp_path / "run", "train.steps=8", resume=True)
    assert tiny.files(tmp_path / "run") == before
    holder.kill()
    holder.wait()
    assert (
        tiny.train(tmp_path / "run", "train.steps=8", resume=True).method.step == 8
    )  # the dead one's lock is not an obstacle
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_lock_of_another_machine_is_waited_for(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 2.0)
    monkeypatch.setattr(lock, "PAUSE", 0.1)
    (tmp_path / "run" / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    began = time.monotonic()
    with pytest.raises(BadInput, match="is being trained by process 7 on elsewhere"), RunLock(tmp_path / "run") as held:
        held.acquire()
    assert time.monotonic() - began >= 2
    holder.kill()
    with RunLock(tmp_path / "run") as held:
        assert held.acquire()


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    tiny.train(tmp_path / "run", "train.steps=1")
    assert "is on a file system without locks" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    for name in ("a", "b"):
        tiny.train(tmp_path / name)
    mine, other = (tmp_path / name / "checkpoints" / "step-00000006" for name in ("a", "b"))
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    for use in (
        lambda: tiny.train(tmp_path / "a", "train.steps=8", resume=True),
        lambda: run_folder.latest_state(tmp_path / "a"),
    ):
        with pytest.raises(BadInput, match="step-00000006 is of another run"):
            use()


@pytest.mark.parametrize("change", ["folder", "manifest", "state"])
def test_folder_manifest_and_state_must_be_of_one_step(tmp_path, change):
    path = checkpoints.save(tmp_path, {"step": 3, "networks": {}})
    if change == "folder":
        path = path.rename(tmp_path / "step-00000009")
    elif change == "manifest":
        file = path / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 9}))
    else:
        other = checkpoints.save(tmp_path / "other", {"step": 9, "networks": {}})
        shutil.copy(other / "state.pt", path / "state.pt")
        file = path / "manifest.json"
        file.write_text((other / "manifest.json").read_text().replace('"step": 9', '"step": 3'))
    with pytest.raises(
        BadInput, match="its folder, manifest and state are of different steps: step-00000003, step-00000009"
    ):
        checkpoints.load(path)


# -- damaged records -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "runs" / "toy-teacher"
    tiny.train(folder)
    (folder / "alarms.jsonl").write_text('{"step": 2, "kind": "collapse", "message": "x"}\n')
    return folder


GARBAGE = {
    "empty": b"",
    "binary": b"\xff\xfe\x00\x80" * 9,
    "list": b"[1, [2], null]",
    "mapping": b'{"files": 3, "step": [], "x": {}}',
    "text": b'"files"\n1,2,3\n',
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/step-00000006/manifest.json",
        "metrics.csv",
        "newest_checkpoint",
        "code.json",
        "alarms.jsonl",
        "cost.json",
        "run_id",
        "config.yaml",
    ],
)
def test_a_damaged_record_is_one_sentence_or_none(finished, tmp_path, monkeypatch, name, kind):
    runs = tmp_path / "runs"
    shutil.copytree(finished.parent, runs)
    (runs / "toy-teacher" / name).write_bytes(GARBAGE[kind])
    monkeypatch.chdir(tmp_path)
    keys = (*tiny.SMALL, "train.steps=7", "name=toy-teacher", "--no-check", "--resume")
    for verb in (("report", "runs/toy-teacher", "--quick"), ("train", str(tiny.TOY / "teacher.yaml"), *keys)):
        result = CliRunner().invoke(main, [*map(str, verb)])
        assert result.exit_code in (0, 2), (verb, result.output, result.exception)
        if result.exit_code:
            assert len(result.stderr.splitlines()) == 1 and "distill: " in result.stderr, result.stderr


@pytest.mark.parametrize("name", ["x[/y]", "a[bold]", "x:smile:y"])
def test_names_are_printed_as_they_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    keys = (*tiny.SMALL, "train.steps=1", f"name={name}", "--no-check")
    for more, says in (
        ((), f"runs/{name}: 1 of 1 steps done."),
        (("--resume",), f"runs/{name} has its 1 steps already"),
    ):
        result = CliRunner().invoke(main, ["train", str(tiny.TOY / "teacher.yaml"), *keys, *more])
        assert result.exit_code == 0 and says in " ".join(result.output.split()), (result.output, result.exception)


def test_a_size_of_no_pixels_and_a_schedule_that_is_a_word_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb, says in (
        (("data", "images", ".", "out", "--size", "0"), "size=0 must be at least 1"),
        (
            ("train", "toy/tdm", "roles.teacher.schedule=foo"),
            "schedule: expected Schedule, got 'foo' of type str; describe",
        ),
    ):
        result = CliRunner().invoke(main, list(verb))
        assert result.exit_code == 2 and says in " ".join(result.stderr.split()), (result.output, result.exception)
