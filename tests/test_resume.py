"""No run is lost: real `distill train` processes are killed without warning at random moments, within saves too, and
resumed until they are done; what comes out equals the uninterrupted run bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import tiny
from nursery import Nursery, kill

from distill.training import checkpoints

STEPS, KILLS = 24, 5
# Several roles, a ladder with promotions, a target that is renewed, turns that are not taken at every step, a validation.
METHODS = {
    "tdm": ("method.student_every=2",),
    "consistency": (),
    "dmd2": (),
    "progressive": ("method.teacher_steps=8",),
    "mmd": (),
}


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


def command(name: str, runs: Path, *more: str) -> tuple[str, ...]:
    keys = (*tiny.SMALL, f"train.steps={STEPS}", "train.save_every=1", "train.validate_every=10")
    keys += ("method.warm_start=3", "eval.samples=50", *METHODS[name])
    return ("train", tiny.TOY / f"{name}.yaml", *keys, "--runs", runs, *more)


def outcome(folder: Path):
    state = checkpoints.load(checkpoints.latest(folder / "checkpoints"))
    return state, tiny.rows(folder)


def wait_for(ready, alive, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready() and alive():
        assert time.monotonic() < end, "nothing happened for a minute"
        time.sleep(0.001)


def moment(draw: random.Random, folder: Path, alive) -> str:
    """Wait until it is time to kill: in the middle of a save, or any time after the next step."""
    table, saves = folder / "metrics.csv", folder / "checkpoints"
    before = table.stat().st_size if table.exists() else 0
    wait_for(lambda: table.exists() and table.stat().st_size != before, alive)
    if draw.random() < 0.5:
        skip, seen = draw.randrange(4), set()

        def writing() -> bool:
            found = {p.name for p in saves.glob(".writing-*")}
            seen.update(found)
            return bool(found) and len(seen) > skip

        wait_for(writing, alive)
        return "save"
    time.sleep(draw.uniform(0, 0.3))
    return "step"


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_again_and_again_ends_as_the_uninterrupted_one(name, nursery, tmp_path):
    draw, log = random.Random(name), tmp_path / "log"
    assert nursery.end(nursery.start(*command(name, tmp_path / "whole"), output=log)) == 0, log.read_text()
    killed, folder = [], tmp_path / "runs" / f"toy-{name}"
    for _ in range(KILLS):
        pid = nursery.start(*command(name, tmp_path / "runs", "--resume-if-exists"), output=log)
        when = moment(draw, folder, lambda: nursery.alive(pid))  # noqa: B023
        kill(pid)
        if nursery.end(pid) == -9:
            done, torn = checkpoints.complete(folder / "checkpoints"), list((folder / "checkpoints").glob(".writing-*"))
            killed.append((when, bool(torn), int(done[-1].name[5:]) if done else 0))
    assert len(killed) >= KILLS - 1 and any(torn for _, torn, _ in killed), (killed, log.read_text())
    assert nursery.end(nursery.start(*command(name, tmp_path / "runs", "--resume-if-exists"), output=log)) == 0
    steps = [step for _, _, step in killed]
    assert steps == sorted(steps), "a resumed run had fewer steps behind it than the one before"
    (ours, rows), (theirs, expected) = outcome(folder), outcome(tmp_path / "whole" / f"toy-{name}")
    assert ours["step"] == STEPS and tiny.same(ours, theirs), killed
    assert rows == expected
    assert not list((folder / "checkpoints").glob(".writing-*"))
