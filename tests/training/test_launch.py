"""Processes that the command line starts itself: their environment, their ends, their signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from click.testing import CliRunner

from distill.cli import main
from distill.config.schema import Engine
from distill.errors import BadInput
from distill.training import launch

ROOT = Path(__file__).parents[2]


def ranks(monkeypatch, code: str, count: int = 2) -> int:
    """The exit code of `count` processes that run `code`, which knows its rank as r."""
    text = f"import os, signal, sys, time; r = int(os.environ['RANK']); {code}"
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", text])
    return launch.spawn_processes(count)


def test_every_rank_knows_who_it_is_and_where_the_others_are(monkeypatch, tmp_path):
    keys = "WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT".split()
    code = f"open(r'{tmp_path}/' + str(r), 'w').write(' '.join(os.environ[k] for k in {keys}))"
    assert ranks(monkeypatch, code, 3) == 0
    found = [(tmp_path / str(r)).read_text().split() for r in range(3)]
    assert [f[:4] for f in found] == [["3", "3", str(r), "127.0.0.1"] for r in range(3)]
    assert len({f[4] for f in found}) == 1


def test_a_rank_that_fails_ends_the_others(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_AFTER_FAILURE", 0.5)
    began = time.monotonic()
    assert ranks(monkeypatch, "sys.exit(3) if r == 1 else time.sleep(60)") == 3
    assert time.monotonic() - began < 30


def test_a_killed_rank_is_an_exit_code_too(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_AFTER_FAILURE", 0.5)
    assert ranks(monkeypatch, "os.kill(os.getpid(), signal.SIGKILL) if r == 0 else time.sleep(60)") == 128 + 9


def test_signals_reach_every_rank_and_the_handlers_come_back(monkeypatch, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    code = (
        f"signal.signal(signal.SIGTERM, lambda *_: (open(r'{tmp_path}/' + str(r), 'w').close(), sys.exit(85))); "
        f"open(r'{tmp_path}/ready' + str(r), 'w').close(); time.sleep(60)"
    )

    def tell():
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    assert ranks(monkeypatch, code) == 85
    teller.join()
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("verb", ["train", "bench"])
def test_more_processes_than_gpus_are_refused_before_any_starts(monkeypatch, verb):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "spawn_processes", lambda count: pytest.fail(f"{count} processes were started"))
    for accelerator in ("cuda", "auto"):
        keys = ["engine.devices=8", f"engine.accelerator={accelerator}"]
        result = CliRunner().invoke(main, [verb, str(tiny.TOY / "tdm.yaml"), *keys])
        assert result.exit_code == 2 and "8 processes need a GPU each, and this machine has 1" in result.stderr


def test_several_processes_on_processors_need_no_gpu(monkeypatch):
    for accelerator, count in (("cpu", 1), ("auto", 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert launch.needs_spawn(Engine(devices=8, accelerator=accelerator))


def test_several_processes_without_a_launcher_are_refused(monkeypatch):
    for key in ("WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(BadInput, match="engine.devices: 2 processes are started by `distill train` or torchrun only"):
        launch.join_processes(SimpleNamespace(devices=2, strategy="ddp", accelerator="cpu"))
    two, one = (Engine(devices=count, accelerator="cpu") for count in (2, 1))
    assert launch.needs_spawn(two) and not launch.needs_spawn(one)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch.needs_spawn(two), "torchrun has started them"


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_under_another_strategy_and_exports(tmp_path):
    def distill(*words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "distill.cli", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    common = (
        str(ROOT / "configs" / "toy" / "dmd2.yaml"),
        "log.wandb=disabled",
        "method.warm_start=2",
        "data.batch_size=16",
        "train.validate_every=0",
        "eval.validation_samples=50",
        "engine.devices=2",
        "engine.accelerator=cpu",
    )
    said = distill("train", *common, "train.steps=4", "engine.strategy=zero2")
    assert said.count("4 of 4 steps done") == 1 and said.count("validation at step 4") == 1
    said = distill("train", *common, "train.steps=6", "engine.strategy=fsdp", "--resume")
    assert "strategy was zero2 and is fsdp" in " ".join(said.split()) and "6 of 6 steps done" in said
    assert [p.name for p in (tmp_path / "runs").iterdir() if p.name != ".cache"] == ["toy-dmd2"]
    distill("sample", "runs/toy-dmd2", "samples.png", "-n", "10")
    assert (tmp_path / "samples.png").stat().st_size > 1000
    said = distill("train", *common, "name=other", "engine.strategy=zero2", "engine.deepspeed=nowhere.json", code=2)
    assert "engine.deepspeed: nowhere.json cannot be read" in said and not (tmp_path / "runs" / "other").exists()


@pytest.mark.slow
def test_torchrun_starts_all_again_when_one_is_killed_and_the_run_goes_on(tmp_path):
    """A process that kills itself once, when it sees the checkpoint of step 6, in place of a machine that is lost."""
    (tmp_path / "sitecustomize.py").write_text(KILLED_ONCE)
    keys = (
        "log.wandb=disabled",
        "train.steps=60",
        "train.save_every=6",
        "train.log_every=10",
        "train.validate_every=0",
        "data.batch_size=16",
        "eval.validation_samples=50",
        "engine.accelerator=cpu",
        "engine.strategy=ddp",
    )
    env = os.environ | {
        "PROCESSES": "2",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "KILL_AT": "6",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), str(ROOT / "configs" / "toy" / "teacher.yaml"), *keys],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "killed").exists() and "60 of 60 steps done" in done.stdout
    assert {*(tmp_path / "starts").read_text()} == {"0", "1"}
    rows = [int(r["step"]) for r in tiny.rows(tmp_path / "runs" / "toy-teacher") if r["student/loss"]]
    assert rows == [10, 20, 30, 40, 50, 60]


KILLED_ONCE = """
import os, signal
if "RANK" in os.environ:
    open("starts", "a").write(os.environ["TORCHELASTIC_RESTART_COUNT"])
if os.environ.get("RANK") == "1" and not os.path.exists("killed"):
    import threading, time

    def watch():
        newest = os.path.join("runs", "toy-teacher", "checkpoints", "step-%08d" % int(os.environ["KILL_AT"]))
        while not os.path.exists(newest):
            time.sleep(0.01)
        open("killed", "w").write(os.environ["RANK"])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
"""
