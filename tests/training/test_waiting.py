"""Processes that wait for what does not come, lose their parent, listen, or meet the same bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

from distill.cli import main
from distill.config import launcher
from distill.data.toy import Samples
from distill.training import launch

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or asks the kernel for the parent's death")
PATIENT = "from distill.training import signals; signals.GRACE_AFTER_SIGNAL = 3; "  # seconds
KEYS = (*tiny.SMALL, "train.steps=1000000", "optim.student.decay=constant", "name=run", "--no-check")


def python(code: str, *arguments, folder: Path, **more) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def distill(*arguments, folder: Path, before: str = PATIENT, **more) -> subprocess.Popen:
    return python(f"{before}from distill.cli import main; main()", *arguments, folder=folder, **more)


def until(ready, process: subprocess.Popen, folder: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.05)


def rows(folder: Path) -> int:
    table = folder / "runs" / "run" / "metrics.csv"
    return table.read_text().count("\n") if table.exists() else 0


# -- a step that does not end ----------------------------------------------------------------------------------------------

WAITS = {
    "a pipe as a file": "os.mkfifo('pipe'); wait = lambda: open('pipe').read()",
    "a stopped worker": (
        "queue = multiprocessing.Queue(); child = multiprocessing.Process(target=time.sleep, args=(99,)); child.start(); "
        "os.kill(child.pid, signal.SIGSTOP); open('child', 'w').write(str(child.pid)); wait = queue.get"
    ),
    "a collective": "import threading; lock = threading.Lock(); lock.acquire(); wait = lock.acquire",
}


@pytest.mark.parametrize(
    "what, number, code",
    [
        *((what, signal.SIGTERM, 85) for what in WAITS),
        ("a pipe as a file", signal.SIGUSR1, 85),
        ("a pipe as a file", signal.SIGINT, 130),
    ],
)
def test_a_step_that_waits_after_a_signal_has_a_limit(tmp_path, what, number, code):
    script = (
        f"import multiprocessing, os, signal, time; {PATIENT}{WAITS[what]}; run = signals.Signals().__enter__(); "
        "run.on_train_start(None, None); run.on_train_batch_start(None, None, None, 0); open('waits', 'w'); wait()"
    )
    process = python(script, folder=tmp_path)
    until((tmp_path / "waits").exists, process, tmp_path)
    process.send_signal(number)
    began = time.monotonic()
    assert process.wait(timeout=60) == code
    assert time.monotonic() - began > 2.5
    assert "the step has not ended in 3 s" in " ".join((tmp_path / "log").read_text().split())
    if (tmp_path / "child").exists():
        pid = int((tmp_path / "child").read_text())
        end = time.monotonic() + 20
        while time.monotonic() < end and is_alive(pid):
            time.sleep(0.05)
        assert not is_alive(pid), "a stopped worker would stay for ever"


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    "error",
    [
        "DataLoader worker (pid(s) 5) exited unexpectedly",
        "DataLoader timed out after 1800 seconds",
        "[/torch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2437",
        "[/torch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    ],
)
def test_a_process_that_is_gone_is_one_sentence_and_no_bad_input(tmp_path, monkeypatch, error):
    def loader(self, rank=0, world=1, start=0):
        raise RuntimeError(error)
        yield

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Samples, "loader", loader)
    result = CliRunner().invoke(main, ["train", str(tiny.TOY / "teacher.yaml"), *KEYS])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1, (result.stderr, result.exception)
    assert error in result.stderr and "--resume" in result.stderr


def test_a_limit_is_as_long_as_the_steps_are(monkeypatch):
    from distill.training import signals

    ended = []
    monkeypatch.setattr(signals, "GRACE_AFTER_SIGNAL", 0.0)
    monkeypatch.setattr(signals.Signals, "_give_up", lambda self, *a: (ended.append(a), self.closed.set()))
    with signals.Signals() as run:
        run.longest = 1.0  # so a step may take two seconds
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert not ended
        time.sleep(2.0)
    assert len(ended) == 1


@pytest.mark.slow
@LINUX
def test_two_ranks_listen_on_loopback_and_a_stopped_one_ends_both(tmp_path):
    process = distill(
        "train", tiny.TOY / "teacher.yaml", *KEYS, "engine.devices=2", "engine.accelerator=cpu", folder=tmp_path
    )
    until(lambda: rows(tmp_path) > 4, process, tmp_path)
    ranks = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(ranks) == 2
    listening = [address for pid in (process.pid, *ranks) for address in listens(pid)]
    assert listening and {address.split(":")[0] for address in listening} <= {"0100007F"}, listening
    os.kill(ranks[1], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) == 85, (tmp_path / "log").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not (tmp_path / "runs" / "run" / ".lock").exists() or "--resume" in (tmp_path / "log").read_text()


def listens(pid: int) -> list[str]:
    """Addresses, as /proc/net/tcp writes them, on which a process listens."""
    inodes = set()
    for number in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(number).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            pass
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return [line[1] for line in lines if line[3] == "0A" and line[9] in inodes]


# -- the parent ---------------------------------------------------------------------------------------------------------------


@LINUX
@pytest.mark.parametrize("alive", [True, False])
def test_a_rank_whose_parent_is_gone_before_it_listens_ends(alive):
    parent = os.getpid() if alive else subprocess.Popen(["true"]).pid
    done = subprocess.run(
        [sys.executable, "-c", "from distill.training import launch; launch._end_with_parent(); print('continues')"],
        env=os.environ | {"PYTHONPATH": str(ROOT), launch.PARENT: str(parent)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == ((0, "continues\n") if alive else (85, "")), done.stderr


@LINUX
def test_a_rank_asks_for_its_parent_before_it_meets_the_others(tmp_path):
    """It would wait for them for `engine.timeout`: half an hour."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", launch.SHARED: str(tmp_path)}
    code = (
        "from distill.config.schema import Engine; from distill.training import launch; launch.join_processes(Engine())"
    )
    process = python(
        code, folder=tmp_path, **ranks, **{launch.PARENT: str(gone.pid)}, MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    try:
        assert process.wait(timeout=120) == 85, (tmp_path / "log").read_text()
    finally:
        process.kill()


def test_rank_0_has_no_limit_while_it_writes_the_checkpoint(monkeypatch):
    """The others have nothing to write, and end before it."""
    monkeypatch.setattr(launch, "GRACE_AFTER_SIGNAL", 0.0)
    code = "import os, sys, time; time.sleep(2 * (os.environ['RANK'] == '0')); sys.exit(85)"
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", code])
    began = time.monotonic()
    assert launch.spawn_processes(2) == 85 and time.monotonic() - began > 2


def test_a_rank_that_gave_up_waiting_ends_the_others(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_AFTER_FAILURE", 0.2)
    code = f"import os, sys, time; time.sleep(60 * (os.environ['RANK'] == '0')); sys.exit({launch.WAITED})"
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", code])
    assert launch.spawn_processes(2) == 85


# -- bad input of several ranks ---------------------------------------------------------------------------------------------


def test_ranks_that_meet_one_error_say_it_once(tmp_path, monkeypatch):
    assert launch.first_to_say("x") and launch.first_to_say("x")  # alone
    monkeypatch.setenv(launch.SHARED, str(tmp_path))
    assert [launch.first_to_say(text) for text in ("x", "x", "y", "x")] == [True, False, True, False]
    monkeypatch.setenv(launch.SHARED, str(tmp_path / "of another machine"))
    assert launch.first_to_say("x")


def test_under_torchrun_the_exit_code_is_left_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.EXIT, str(tmp_path / "exit"))
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "toy/tdm", "train.steps=none"]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0 and (tmp_path / "exit").read_text() == "2" and "train.steps" in first.stderr
    again = CliRunner().invoke(main, arguments)  # as torchrun starts it again where another rank has failed
    assert again.exit_code == 0 and not again.output


@pytest.mark.slow
@pytest.mark.parametrize("how", ["devices", "torchrun"])
def test_bad_input_of_two_ranks_is_printed_once_exits_2_and_is_not_started_again(tmp_path, how):
    recipe, keys = str(tiny.TOY / "teacher.yaml"), [*KEYS, "roles.student.prediction=nothing", "engine.accelerator=cpu"]
    if how == "devices":
        process = distill("train", recipe, *keys, "engine.devices=2", folder=tmp_path)
    else:
        environment = {"PROCESSES": "2", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(
                ["bash", str(ROOT / "launch" / "torchrun.sh"), recipe, *map(str, keys), "engine.strategy=ddp"],
                cwd=tmp_path,
                env=os.environ | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    assert process.wait(timeout=300) == 2, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert said.count("distill: ") == 1 and "prediction" in said and "Traceback" not in said, said


@pytest.mark.slow
def test_torchrun_sh_passes_a_signal_on_and_exits_85(tmp_path):
    environment = {"PROCESSES": "2", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [
                "bash",
                str(ROOT / "launch" / "torchrun.sh"),
                str(tiny.TOY / "teacher.yaml"),
                *KEYS,
                "engine.accelerator=cpu",
            ],
            cwd=tmp_path,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    until(lambda: rows(tmp_path) > 4, process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=90) == 85, (tmp_path / "log").read_text()
    assert list((tmp_path / "runs" / "run" / "checkpoints").glob("step-*"))


# -- SLURM ------------------------------------------------------------------------------------------------------------------

ALLOCATION = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_TASKS_PER_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
    "SLURM_JOB_NODELIST": "localhost",
}
BATCH = ALLOCATION | {"SLURM_JOB_NAME": "train"}
SHELL = ALLOCATION | {
    "SLURM_JOB_NAME": "interactive",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
STEP = ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.fixture
def slurm(monkeypatch):
    for key in [k for k in os.environ if k.startswith("SLURM_") or k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
        monkeypatch.delenv(key)
    return lambda variables: [monkeypatch.setenv(key, value) for key, value in variables.items()]


@pytest.mark.parametrize(
    "variables, rank", [(BATCH, (0, 1, 0)), (SHELL, (0, 1, 0)), (STEP, (3, 4, 1)), ({}, (0, 1, 0))]
)
def test_only_the_tasks_of_srun_are_ranks(slurm, variables, rank):
    slurm(variables)
    assert (*launcher.launcher_rank(), launcher.local_rank()) == rank
    assert launch.launched_externally() == (rank[1] > 1)


def test_a_step_of_srun_is_laid_out_by_its_own_tasks(slurm, monkeypatch):
    slurm(STEP | {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"})
    for key in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "1")  # so that what is written is taken away at the end
    launch._from_slurm()
    assert launch.process_layout() == (2, 2) and os.environ["RANK"] == "3" and os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize("variables", [BATCH, SHELL], ids=["batch script", "salloc's shell"])
def test_without_srun_one_process_does_all_of_the_work(slurm, variables, tmp_path, monkeypatch):
    """Lightning by itself would find a job of four tasks; the encoder would leave three shards of four to others."""
    import numpy as np
    from PIL import Image

    slurm(variables)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for k in range(4):
        pixels = np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(f"photos/{k}.png")
        Path(f"photos/{k}.txt").write_text(f"picture {k}")
    for verb in (
        ("data", "encode", "photos", "latents", "--pipeline", "tiny:sd15", "--per-shard", "1"),
        ("train", tiny.TOY / "tdm.yaml", *tiny.SMALL, "--no-check", "train.steps=2", "name=run"),
    ):
        result = CliRunner().invoke(main, [*map(str, verb)])
        assert result.exit_code == 0, (verb, result.output, result.exception)
    assert len(list(Path("latents").rglob("*.tar"))) == 4
    assert "2 of 2 steps done" in result.output
