"""Runs of the run layer's tests: real recipes, made so small that a step takes a millisecond."""

from __future__ import annotations

import csv
import math
import signal
from pathlib import Path

import torch

from distill import config
from distill.data.toy import Samples
from distill.methods.base import Method
from distill.training import run

TOY = Path(__file__).parents[1] / "configs" / "toy"
SMALL = (
    "log.wandb=disabled",
    "train.threads=1",
    "train.log_every=1",
    "train.validate_every=0",
    "train.steps=6",
    "data.batch_size=16",
    "eval.samples=200",
    "eval.validation_samples=40",
    "roles.student.net.width=8",
    "roles.student.net.depth=1",
)


def recipe(*overrides: str, name: str = "teacher"):
    """A toy recipe, made small."""
    return config.load([TOY / f"{name}.yaml"], [*SMALL, *overrides])


def train(folder: Path, *overrides: str, name: str = "teacher", resume: bool = False):
    return run.train(recipe(*overrides, name=name), folder, resume)


def after(monkeypatch, step: int, action) -> None:
    """Call `action` within the training step that makes `step` steps."""
    inner = Method.training_step

    def training_step(self, batch, index=0):
        inner(self, batch, index)
        if self.step == step:
            action()

    monkeypatch.setattr(Method, "training_step", training_step)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without its clock."""
    with open(folder / "metrics.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in found]


def same(a, b) -> bool:
    """Whether two nests of tensors and plain values are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def files(folder: Path) -> dict[str, bytes]:
    """Everything under `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def poison(monkeypatch, *batches: int) -> None:
    """NaN in these batches of the training data."""
    inner = Samples.loader

    def loader(self, rank=0, world=1, start=0):
        for n, found in enumerate(inner(self, rank, world, start), start):
            yield found | {"x": found["x"] * math.nan} if n in batches else found

    monkeypatch.setattr(Samples, "loader", loader)
