"""The rank that a launcher (torchrun, srun) gave this process, by its environment."""

from __future__ import annotations

import os

NO_TASK = ("4294967290", "4294967291")  # SLURM's numbers of an allocation's shell and of a batch script


def started_by_torchrun() -> bool:
    """Whether the environment states a world, as torchrun does."""
    return "WORLD_SIZE" in os.environ


def started_by_srun() -> bool:
    """Whether srun started this process as one task of several.

    A batch script and the shell of salloc have the allocation's SLURM_NTASKS too, and are one process each.
    """
    return os.environ.get("SLURM_STEP_ID", NO_TASK[0]) not in NO_TASK and srun_tasks() > 1


def srun_tasks() -> int:
    """Tasks of this step; SLURM_NTASKS may be the allocation's."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


def launcher_rank() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) where no launcher started this process."""
    if started_by_torchrun() or "RANK" in os.environ:  # lightning takes WORLD_SIZE away at the end of a run
        return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    return (int(os.environ.get("SLURM_PROCID") or 0), srun_tasks()) if started_by_srun() else (0, 1)


def local_rank() -> int:
    """Number of this process on its machine."""
    key = "LOCAL_RANK" if started_by_torchrun() else "SLURM_LOCALID"
    return int(os.environ.get(key) or 0) if launcher_rank()[1] > 1 else 0
