"""Signals end the step, not the run: Ctrl-C, SIGTERM, SIGUSR1, ranks that agree, exit codes, a queue that gets it back."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from nursery import Nursery

from distill.training import checkpoints
from distill.training.signals import REQUEUE, Signals

ROOT = Path(__file__).parents[2]
SCHEDULER = [signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture
def watch():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, *SCHEDULER)}
    with Signals() as watch:
        yield watch
    assert {n: signal.getsignal(n) for n in before} == before


def step(watch) -> bool:
    """Whether the training continues after a step."""
    trainer = SimpleNamespace(should_stop=False)
    watch.on_train_batch_end(trainer, None, None, None, 0)
    return not trainer.should_stop


def test_ctrl_c_asks_to_stop_and_a_second_one_stops_at_once(watch):
    watch.on_train_start(None, None)
    assert step(watch)
    signal.raise_signal(signal.SIGINT)
    assert not step(watch) and not watch.preempted
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", SCHEDULER)
def test_a_schedulers_signal_asks_to_stop_however_often_it_comes(watch, number):
    watch.on_train_start(None, None)
    for _ in range(3):
        signal.raise_signal(number)
    assert watch.preempted and not step(watch)


def test_a_signal_before_the_training_is_not_lost_but_ctrl_c_is_at_once(watch):
    signal.raise_signal(signal.SIGUSR1)
    watch.on_train_start(None, None)
    assert watch.preempted and not step(watch)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_handlers_that_others_set_meanwhile_are_replaced(watch):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as lightning does between the two
    watch.on_train_start(None, None)
    signal.raise_signal(signal.SIGTERM)
    assert watch.preempted


def test_signals_are_left_alone_outside_the_main_thread():
    errors = []

    def work():
        try:
            with Signals() as watch:
                watch.on_train_start(None, None)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def ranks(rank: int, world: int, folder: str) -> None:
    """One rank gets a signal at its third step; each writes at which step it ended and why."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    with Signals() as watch:
        watch.on_train_start(None, None)
        for n in range(1, 6):
            if rank == 1 and n == 3:
                signal.raise_signal(signal.SIGUSR1)
            if not step(watch):
                break
    (Path(folder) / str(rank)).write_text(f"{n} {watch.preempted}")
    dist.destroy_process_group()


def test_a_signal_to_one_rank_ends_all_at_the_same_step(tmp_path):
    multiprocessing.spawn(ranks, (2, str(tmp_path)), nprocs=2)
    assert [(tmp_path / r).read_text() for r in "01"] == ["3 True", "3 True"]


# -- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


def until(ready, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "nothing happened for a minute"
        time.sleep(0.005)


def rows(folder: Path) -> int:
    table = folder / "metrics.csv"
    return table.read_text().count("\n") if table.exists() else 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step_and_its_exit_code(nursery, tmp_path, number, code):
    keys = (*tiny.SMALL, "train.steps=1000000", "optim.student.decay=constant", "name=run", "--runs", tmp_path)
    pid = nursery.start("train", tiny.TOY / "teacher.yaml", *keys, output=tmp_path / "log")
    until(lambda: rows(tmp_path / "run") > 4)
    os.kill(pid, number)
    assert nursery.end(pid) == code, (tmp_path / "log").read_text()
    (saved,) = checkpoints.complete(tmp_path / "run" / "checkpoints")
    trained = [r["step"] for r in tiny.rows(tmp_path / "run") if r["student/loss"]]
    assert saved.name == f"step-{int(trained[-1]):08d}"
    assert "--resume" in (tmp_path / "log").read_text()


FAKE_SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
"$@" & child=$!
echo $child > "$FAKE/pid"
trap 'kill -TERM $child' TERM; trap 'kill -USR1 $child' USR1
told=1; while [ -n "$told" ]; do wait $child; code=$?; kill -0 $child 2>/dev/null || told=; done
wait $child; found=$?; [ $found -ne 127 ] && code=$found
exit $code
"""
FAKE_SCONTROL = """#!/bin/bash
echo "$@" >> "$FAKE/scontrol"
[[ "$*" == *show* ]] && echo "JobId=7 JobState=$(cat "$FAKE/state") Requeue=1"
exit 0
"""
# A `distill` that does what the real one does with signals, and tells what it was asked.
FAKE_DISTILL = """#!/bin/bash
echo "$@" >> "$FAKE/distill"
trap 'exit 85' TERM USR1
touch "$FAKE/started"
[ -e "$FAKE/finish" ] && exit "$(cat "$FAKE/finish")"
for i in $(seq 600); do sleep 0.1; done
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with `srun`, `scontrol` and `distill` that stand in for the real ones."""
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("distill", FAKE_DISTILL)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "state").write_text("RUNNING")
    return tmp_path


def submit(cluster: Path, *arguments: str, **more: str) -> subprocess.Popen:
    path = f"{cluster / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "FAKE": str(cluster), "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"} | more
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def asked(cluster: Path) -> list[str]:
    file = cluster / "scontrol"
    return [line for line in file.read_text().splitlines() if "requeue" in line] if file.exists() else []


@pytest.mark.parametrize("whom", ["processes", "script"])
@pytest.mark.parametrize("number", SCHEDULER)
def test_the_job_puts_itself_back_whoever_gets_the_signal(cluster, whom, number):
    job = submit(cluster, "a.yaml", "name=x")
    until(lambda: (cluster / "started").exists())
    os.kill(int((cluster / "pid").read_text()) if whom == "processes" else job.pid, number)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 85 and asked(cluster) == ["requeue 7"], out
    assert (cluster / "distill").read_text() == "train a.yaml name=x --resume-if-exists\n"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_cancelled_job_is_not_put_back(cluster, state):
    (cluster / "state").write_text(state)
    job = submit(cluster, "a.yaml")
    until(lambda: (cluster / "started").exists())
    os.kill(int((cluster / "pid").read_text()), signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 85 and asked(cluster) == [] and "cancelled" in out


@pytest.mark.parametrize("code", [0, 2, 1])
def test_a_job_that_ends_by_itself_is_not_put_back_and_keeps_its_exit_code(cluster, code):
    (cluster / "finish").write_text(str(code))
    job = submit(cluster, "a.yaml")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == code and asked(cluster) == [], out


def test_a_requeued_job_goes_on_in_its_folder_as_the_same_run_on_the_dashboard(cluster):
    """The real `distill`, twice: preempted in its first life, done in its second."""
    script = cluster / "bin" / "distill"
    script.write_text(f'#!/bin/bash\nexec {sys.executable} -m distill.cli "$@"\n')
    runs = ("--runs", str(cluster / "runs"), "name=run", "log.wandb=offline", "optim.student.decay=constant")
    keys = [k for k in tiny.SMALL if "wandb" not in k]
    steps, lives = 10**6, []
    quiet = {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    for life in range(2):
        job = submit(cluster, str(tiny.TOY / "teacher.yaml"), *keys, *runs, f"train.steps={steps}", **quiet)
        if not life:
            until(lambda: rows(cluster / "runs" / "run") > 4, 120)
            os.kill(int((cluster / "pid").read_text()), signal.SIGUSR1)
        out, _ = job.communicate(timeout=120)
        (*_, saved) = checkpoints.complete(cluster / "runs" / "run" / "checkpoints")
        lives.append((job.returncode, checkpoints.manifest(saved)))
        steps = lives[0][1]["step"] + 3
    (first, before), (second, after) = lives
    assert (first, second) == (85, 0) and asked(cluster) == ["requeue 7"], out
    assert after["step"] == before["step"] + 3 and after["wandb"] == before["wandb"] is not None
    segments = [p.name for p in (cluster / "runs" / "run" / "wandb").glob("offline-run-*")]
    assert {re.sub(".*-", "", s) for s in segments} == {before["wandb"]}
