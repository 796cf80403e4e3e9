"""NaN on one of two ranks, in one turn and in spells: `python faults.py FOLDER STRATEGY...`."""

from __future__ import annotations

import copy
import io
import math
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import places
import pytest
import tiny
import torch

from distill.errors import BadInput

KEYS = ("train.steps=12", "train.save_every=2", "train.nonfinite_limit=3", "engine.accelerator=cpu")


def turn(strategy: str, rank: int) -> dict[str, Any]:
    """Rank 1 alone meets a NaN in the critic's second turn."""
    method = places.placed("tdm", strategy, rank)
    places.advance(method, rank, 2)
    before, inner = places.networks(method), method.critic_loss
    method.critic_loss = lambda *shared: inner(*shared) * (math.nan if rank == 1 else 1.0)
    places.advance(method, rank, 3)
    during, method.critic_loss = places.networks(method), inner
    places.advance(method, rank, 4)
    return {"before": before, "during": during, "after": places.networks(method), "nonfinite": method.nonfinite.state()}


def spell(folder: Path, strategy: str, rank: int, *bad: int) -> dict[str, Any]:
    """A run in which these batches of rank 1 are NaN: what it said, where it ended."""
    out: dict[str, Any] = {"error": ""}
    os.environ["WORLD_SIZE"] = str(places.WORLD)  # lightning takes it away at the end of a run
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        if rank == 1:
            tiny.poison(patch, *bad)
        try:
            method = tiny.train(folder, *KEYS, f"engine.strategy={strategy}").method
        except BadInput as error:
            return out | {"error": str(error)}
        finally:
            out["said"] = " ".join(said.getvalue().split())
    out |= {"step": method.step, "extra_batches": method.extra_batches, "nonfinite": method.nonfinite.state()}
    return out | {"networks": copy.deepcopy(places.networks(method))}


def main(folder: Path, strategies: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for strategy in strategies:
        found = {
            "turn": turn(strategy, rank),
            "once": spell(folder / f"{strategy}-once", strategy, rank, 5, 6, 7),
            "twice": spell(folder / f"{strategy}-twice", strategy, rank, 5, 6, 7, 10, 11, 12),
        }
        torch.save(found, folder / f"{strategy}-{rank}.pt")
        torch.distributed.barrier()
        print(strategy, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
