"""Several processes on one machine, or the rank that a launcher (torchrun, srun) assigned to this process."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

from distill.errors import BadInput

SIGNALLED = (85, 130)  # exit codes after a signal, which all ranks receive: they save a checkpoint together
GRACE_AFTER_SIGNAL, GRACE_AFTER_FAILURE = 60, 5  # seconds until the other ranks are killed


def launched_externally() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return "WORLD_SIZE" in os.environ or _srun()


def _srun() -> bool:
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS") or 1) > 1


def needs_spawn(engine: Any) -> bool:
    """Whether `distill train` has to start the processes itself."""
    return engine.devices > 1 and not launched_externally()


def spawn_processes(count: int) -> int:
    """Run this command in `count` processes; returns the exit code of the first rank to fail, or 0.

    Signals are forwarded to every rank. When a rank fails, the others are ended, since they would wait for it.
    """
    env = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
        "DISTILL_PARENT": str(os.getpid()),
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


def _wait(ranks: list[subprocess.Popen]) -> int:
    failed, since = 0, None
    while any(rank.poll() is None for rank in ranks):
        code = next((c for c in (rank.poll() for rank in ranks) if c), 0)
        if code and since is None:
            failed, since = code, time.monotonic()
        if since is not None and time.monotonic() - since > (
            GRACE_AFTER_SIGNAL if failed in SIGNALLED else GRACE_AFTER_FAILURE
        ):
            for rank in ranks:
                rank.kill()
        time.sleep(0.2)
    failed = failed or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def join_processes(engine: Any) -> int:
    """Initialise torch.distributed with the other ranks; returns their number.

    Raises:
        BadInput: `engine.devices` is above 1 but no launcher started the processes.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.get_world_size()
    if _srun() and "WORLD_SIZE" not in os.environ:
        _from_slurm()
    if "WORLD_SIZE" not in os.environ:
        if engine.devices > 1:
            raise BadInput(
                f"engine.devices: {engine.devices} processes are started by `distill train` or torchrun only."
            )
        if engine.strategy in ("auto", "ddp"):
            return 1
        alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(_port())})
    if "DISTILL_PARENT" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # end as if preempted when the process that started us is killed
    cuda = engine.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(minutes=engine.timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
    return dist.get_world_size()


def _from_slurm() -> None:
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ.update(
        WORLD_SIZE=str(slurm.world_size()),
        RANK=str(slurm.global_rank()),
        LOCAL_RANK=str(slurm.local_rank()),
        LOCAL_WORLD_SIZE=os.environ.get(
            "SLURM_NTASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", "1").split("(")[0]
        ),
        MASTER_ADDR=slurm.main_address,
        MASTER_PORT=str(slurm.main_port),
    )


def process_layout() -> tuple[int, int]:
    """(processes on this machine, machines)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return local_world, world // local_world
