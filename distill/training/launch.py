"""Several processes on one machine, or the rank that a launcher (torchrun, srun) assigned to this process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from distill.config import launcher
from distill.errors import BadInput

SIGNALLED = (85, 130)  # exit codes after a signal, which all ranks receive: they save a checkpoint together
WAITED = (
    75  # exit code of a rank that received a signal and whose step did not end in time: nothing is left to wait for
)
GRACE_AFTER_SIGNAL, GRACE_AFTER_FAILURE = 60, 5  # seconds the other ranks have to end then, and after a failure
PARENT = "DISTILL_PARENT"  # process that started this rank
SHARED = "DISTILL_SHARED"  # folder of the ranks of one machine: their store, and what one of them has printed
EXIT = "DISTILL_EXIT"  # file for the exit code, which torchrun would turn into 1


def launched_externally() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return launcher.started_by_torchrun() or launcher.started_by_srun()


def needs_spawn(engine: Any) -> bool:
    """Whether `distill train` has to start the processes itself.

    Raises:
        BadInput: there would be more processes than GPUs.
    """
    if engine.devices <= 1 or launched_externally():
        return False
    if engine.accelerator in ("auto", "cuda", "gpu"):
        import torch

        count = torch.cuda.device_count()
        if engine.devices > count and (count or engine.accelerator != "auto"):
            raise BadInput(
                f"engine.devices: {engine.devices} processes need a GPU each, and this machine has {count}; lower it, or set "
                "engine.accelerator: cpu."
            )
    return True


def spawn_processes(count: int) -> int:
    """Run this command in `count` processes; returns the exit code of the first rank to fail, or 0.

    Signals are forwarded to every rank. When a rank fails, the others are ended, since they would wait for it.
    """
    shared = tempfile.mkdtemp(prefix="distill-")
    env = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
        PARENT: str(os.getpid()),
        SHARED: shared,
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [sys.executable, *sys.orig_argv[1:]]
    ranks = [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
            start_new_session=True,
            stdout=None if r == 0 else subprocess.DEVNULL,
        )
        for r in range(count)
    ]

    def forward(number, frame):
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _wait(ranks)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        shutil.rmtree(shared, ignore_errors=True)


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Wait for all ranks; the first one that fails gives the others a limit.

    After a signal the limit starts when rank 0, which writes the checkpoint, has ended.
    """
    failed, since = 0, None
    while any(rank.poll() is None for rank in ranks):
        codes = [rank.poll() for rank in ranks]
        failed = failed or next((c for c in codes if c), 0)
        broken = any(c and c not in SIGNALLED for c in codes)
        if since is None and (broken or failed and codes[0] is not None):
            since = time.monotonic()
        if since is not None and time.monotonic() - since > (GRACE_AFTER_FAILURE if broken else GRACE_AFTER_SIGNAL):
            for rank in ranks:
                rank.kill()
        time.sleep(0.2)
    failed = failed or next((rank.returncode for rank in ranks if rank.returncode), 0)
    if failed == WAITED:
        return SIGNALLED[0]
    return failed if failed >= 0 else 128 - failed


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def first_to_say(text: str) -> bool:
    """Whether no other rank of this machine has printed this: every rank meets bad input, and one prints it."""
    shared = os.environ.get(SHARED)
    if not shared:
        return True
    try:
        Path(shared, f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}").open("x").close()
    except FileExistsError:
        return False
    except OSError:  # the folder is another machine's
        return launcher.local_rank() == 0
    return True


def leave(code: int) -> None:
    """End this process with an exit code that survives torchrun's restarts: bad input, or the answer to a signal.

    torchrun turns every code but 0 into 1 and starts all ranks again, so under `launch/torchrun.sh` the code is left in a
    file, which the script reads, and ranks that are started again end at once.
    """
    if EXIT in os.environ:
        Path(os.environ[EXIT]).write_text(str(code))
        code = 0
    sys.exit(code)


def leave_if_ended() -> None:
    """End if a rank of this machine has left its exit code before torchrun started this one."""
    if EXIT in os.environ and os.path.exists(os.environ[EXIT]):
        sys.exit(0)


def join_processes(engine: Any) -> int:
    """Initialise torch.distributed with the other ranks; returns their number.

    Ranks of one machine meet in a file and listen on its loopback interface alone.

    Raises:
        BadInput: `engine.devices` is above 1 but no launcher started the processes.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.get_world_size()
    if launcher.started_by_srun() and not launcher.started_by_torchrun():
        _from_slurm()
    if not launcher.started_by_torchrun():
        if engine.devices > 1:
            raise BadInput(
                f"engine.devices: {engine.devices} processes are started by `distill train` or torchrun only."
            )
        if engine.strategy in ("auto", "ddp"):
            return 1
        alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(
            alone | {"MASTER_PORT": str(_port())}
        )  # which DeepSpeed requires, though nobody listens there
    _end_with_parent()
    cuda = engine.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, world = launcher.launcher_rank()
    meeting: dict[str, Any] = {}  # by default a server at MASTER_ADDR:MASTER_PORT
    if process_layout()[1] == 1 and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if world == 1:
        meeting = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif PARENT in os.environ:
        meeting = {"store": dist.FileStore(str(Path(os.environ[SHARED], "store")), world), "rank": rank}
        meeting["world_size"] = world
    limit = timedelta(minutes=engine.timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit, **meeting)
    return dist.get_world_size()


def _end_with_parent() -> None:
    """End as if preempted when the process that started this rank is killed; at once if that has happened already."""
    if PARENT in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != int(os.environ[PARENT]):
            sys.exit(SIGNALLED[0])


def _from_slurm() -> None:
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    slurm, local = SLURMEnvironment(auto_requeue=False), os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    local = local or os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or "1"
    os.environ.update(
        WORLD_SIZE=str(launcher.srun_tasks()),
        RANK=str(slurm.global_rank()),
        LOCAL_RANK=str(slurm.local_rank()),
        LOCAL_WORLD_SIZE=local.split("(")[0].split(",")[0],  # written as 8(x2), or 8,4
        MASTER_ADDR=slurm.main_address,
        MASTER_PORT=str(slurm.main_port),
    )


def process_layout() -> tuple[int, int]:
    """(processes on this machine, machines)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return local_world, world // local_world
