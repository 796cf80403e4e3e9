"""Checkpoints are whole or absent, the newest whole one is found, and a damaged one is told."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from distill.errors import BadInput
from distill.training import checkpoints


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """No test waits for a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def state(step: int, value: float = 1.0) -> dict:
    return {"step": step, "networks": {"student": {"w": torch.full((1000,), value)}}}


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def flip(path) -> None:
    """Damage one byte in the middle, which leaves the size and the archive's directory as they are."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def test_what_is_saved_is_loaded_with_its_manifest(tmp_path):
    path = checkpoints.save(tmp_path, state(7, 0.1), config="abc")
    assert path == checkpoints.latest(tmp_path) == tmp_path / "step-00000007"
    assert torch.equal(checkpoints.load(path)["networks"]["student"]["w"], torch.full((1000,), 0.1))
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["config"] == "abc"
    assert manifest["files"]["state.pt"]["bytes"] == (path / "state.pt").stat().st_size


def test_the_disk_has_it_before_it_takes_its_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda file: order.append("flush"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    checkpoints.save(tmp_path, state(1))
    assert order == ["flush", "flush", "flush", "rename", "flush"]


def test_the_newest_keep_remain(tmp_path):
    for step in (1, 2, 10, 9):
        checkpoints.save(tmp_path, state(step), keep=2)
    assert names(tmp_path) == ["step-00000009", "step-00000010"]
    for step in range(11, 15):
        checkpoints.save(tmp_path, state(step), keep=0)
    assert len(names(tmp_path)) == 6


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos")])
def test_a_failing_write_leaves_the_old_one_alone(tmp_path, monkeypatch, error):
    checkpoints.save(tmp_path, state(1))
    before = (tmp_path / "step-00000001" / "state.pt").read_bytes()

    def broken(value, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", broken)
    for step in (1, 2):
        with pytest.raises(BadInput, match=rf"step-0000000{step} could not be written .*free some space"):
            checkpoints.save(tmp_path, state(step, 2.0))
    assert names(tmp_path) == ["step-00000001"]
    assert (tmp_path / "step-00000001" / "state.pt").read_bytes() == before


def test_a_disk_that_fills_up_within_torch_save_is_reported_as_such(tmp_path, monkeypatch):
    real = open

    class Full:
        def __init__(self, *args):
            self.file, self.left = real(*args), 300

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if len(data) > self.left:
                raise OSError(28, "No space left on device")
            self.left -= len(data)
            return self.file.write(data)

    monkeypatch.setattr(checkpoints, "open", Full, raising=False)
    with pytest.raises(BadInput, match="could not be written"):
        checkpoints.save(tmp_path, state(1))
    assert names(tmp_path) == []


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints.save(tmp_path, state(1, 1.0))
    checkpoints.save(tmp_path, state(1, 2.0))
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.load(checkpoints.latest(tmp_path))["networks"]["student"]["w"][0] == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(tmp_path, value):
    checkpoints.save(tmp_path, state(1))
    with pytest.raises(BadInput, match=r"student\.w holds NaN or infinity at step 2.*optim"):
        checkpoints.save(tmp_path, state(2, value), keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_half_written_and_size_mismatched_ones_are_never_picked(tmp_path):
    good = checkpoints.save(tmp_path, state(1))
    (tmp_path / ".writing-00000009").mkdir()
    for step, harm in ((2, "cut"), (3, "no manifest"), (4, "no state"), (5, "torn manifest"), (6, "wrong manifest")):
        bad = tmp_path / f"step-0000000{step}"
        shutil.copytree(good, bad)
        if harm == "cut":
            (bad / "state.pt").write_bytes((good / "state.pt").read_bytes()[:-1])
        elif harm == "no manifest":
            (bad / "manifest.json").unlink()
        elif harm == "no state":
            (bad / "state.pt").unlink()
        else:
            (bad / "manifest.json").write_text("{" if harm == "torn manifest" else "{}")
    (tmp_path / "step-00000007").write_text("a file")
    assert checkpoints.complete(tmp_path) == [good] and checkpoints.latest(tmp_path) == good


def test_what_a_killed_process_left_is_swept_by_the_next_save(tmp_path):
    (tmp_path / ".writing-00000009").mkdir()
    checkpoints.save(tmp_path, state(10))
    assert names(tmp_path) == ["step-00000010"]


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_no_checkpoint_is_reported(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=f"{folder} has no complete checkpoint"):
        checkpoints.latest(tmp_path / folder)


def test_a_damaged_newest_one_is_refused_with_the_newest_good_one(tmp_path):
    paths = [checkpoints.save(tmp_path, state(step), keep=0) for step in (1, 2, 3)]
    for path in paths[1:]:
        flip(path / "state.pt")
    with pytest.raises(BadInput, match=r"step-00000003 cannot be read .*; remove it to continue from step-00000001\."):
        checkpoints.load(checkpoints.latest(tmp_path))
    assert len(names(tmp_path)) == 3
    flip(paths[0] / "state.pt")
    with pytest.raises(BadInput, match="there is no older one"):
        checkpoints.load(checkpoints.latest(tmp_path))


def test_a_pickle_that_would_execute_something_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = checkpoints.save(tmp_path / "c", {"step": 1, "evil": Evil()})
    with pytest.raises(BadInput, match="cannot be read"):
        checkpoints.load(path)
    assert not (tmp_path / "owned").exists()
