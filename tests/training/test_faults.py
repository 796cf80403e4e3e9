"""A NaN on one rank of two: all ranks leave that turn out; a spell of them sends all back once, then ends the run."""

from __future__ import annotations

import faults
import pytest
import tiny
import torch
from reference import launch

STRATEGIES = ("ddp", "fsdp", "zero2")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    launch(folder, [faults.__file__, str(folder), *STRATEGIES])
    read = lambda s, r: torch.load(folder / f"{s}-{r}.pt", weights_only=True)  # noqa: E731
    return folder, {s: [read(s, r) for r in range(2)] for s in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_leave_the_turn_out_and_only_that(strategy, found):
    first, second = (rank["turn"] for rank in found[1][strategy])
    assert first["nonfinite"] == second["nonfinite"] == {"critic": [1, 0], "student": [0, 0]}
    assert tiny.same(first["before"]["critic"], first["during"]["critic"])
    for network in ("student", "ema"):
        assert not tiny.same(first["before"][network], first["during"][network])
    assert not tiny.same(first["during"]["critic"], first["after"]["critic"])
    assert all(v.isfinite().all() for weights in first["after"].values() for v in weights.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_spell_sends_all_ranks_back_once(strategy, found):
    folder, ranks = found
    first, second = (rank["once"] for rank in ranks[strategy])
    assert "not finite in 3 turns in a row, the last at step 7; continuing from step 4 with other data" in first["said"]
    assert (first["step"], first["extra_batches"]) == (second["step"], second["extra_batches"]) == (12, 4)
    assert first["nonfinite"] == second["nonfinite"] == {"student": [3, 0]}
    rows = [int(r["step"]) for r in tiny.rows(folder / f"{strategy}-once") if r["student/loss"]]
    assert rows == list(range(1, 13))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_second_time_ends_the_run_on_all_ranks_with_role_and_step(strategy, found):
    for rank in found[1][strategy]:
        said = rank["twice"]["error"]
        assert "student's loss or gradient was not finite in 3 turns in a row, the last at step 8, again" in said
        assert "lower optim.student.lr" in said
