"""Two ranks over gloo, forked from this process: nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def ranks(work: Callable[[int], Any], seconds: float = 60, limit: float = 1800) -> list[Any]:
    """What `work(rank)` gives on each of two ranks; an exception as its text. `limit`: seconds of a collective."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(2)]
        both = [
            fork.Process(target=_rank, args=(r, Path(folder) / "store", work, pipes[r][1], limit)) for r in range(2)
        ]
        for rank in both:
            rank.start()
        try:
            return [pipe.recv() if pipe.poll(seconds) else "no answer" for pipe, _ in pipes]
        finally:
            for rank in both:
                rank.join(5)
                rank.kill()


def _rank(rank: int, store: Path, work: Callable[[int], Any], pipe: Any, limit: float) -> None:
    torch.set_num_threads(1)  # a forked process has none of the other threads
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    timeout = timedelta(seconds=limit)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    try:
        pipe.send(work(rank))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    dist.barrier()
    dist.destroy_process_group()
