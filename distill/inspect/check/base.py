"""Input of the checks (`CheckContext`) and their results (`Finding`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAMPLES = 256  # samples of the data that the checks read
LEVELS = ("ok", "skipped", "WARN", "FAIL")


@dataclass
class Finding:
    """The result of one check: a level (only FAIL stops a run), a sentence, and the check's name, which the caller fills in."""

    level: str
    text: str
    name: str = ""

    @classmethod
    def ok(cls, text: str, name: str = "") -> Finding:
        return cls("ok", text, name)

    @classmethod
    def skipped(cls, text: str, name: str = "") -> Finding:
        """The check does not apply; the text gives the reason."""
        return cls("skipped", text, name)

    @classmethod
    def warn(cls, text: str, name: str = "") -> Finding:
        """Suspicious: the run may start."""
        return cls("WARN", text, name)

    @classmethod
    def fail(cls, text: str, name: str = "") -> Finding:
        """Certainly wrong: the run is refused. The text names the remedy."""
        return cls("FAIL", text, name)

    def __str__(self) -> str:
        return f"{self.level:8}{self.name:11}{self.text}"


Findings = Iterator[Finding]


@dataclass
class CheckContext:
    """An experiment before training, and its first samples on the training device.

    `batch` holds up to SAMPLES samples from the loader; `x` is None if the data has conditions only. Later checks say nothing
    that follows from what earlier ones found: `failed` names the checks with a FAIL, `unlike` the roles that are not the
    teacher though they could be.
    """

    experiment: Any
    folder: Path
    world: int = 1
    batch: dict[str, Tensor] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    unlike: set[str] = field(default_factory=set)

    @property
    def method(self) -> Any:
        return self.experiment.method

    @property
    def cfg(self) -> Any:
        return self.experiment.cfg

    @property
    def x(self) -> Tensor | None:
        return self.batch.get("x")

    @property
    def cond(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.batch.items() if k not in ("x", "z")}

    @property
    def readable(self) -> bool:
        """Whether there are samples and all are finite."""
        return self.x is not None and bool(torch.isfinite(self.x).all())

    @property
    def random(self) -> bool:
        """Whether the networks are tiny random ones (`model=tiny`), whose outputs have no meaning."""
        return self.cfg.model == "tiny"

    def pretrained(self) -> tuple[str, Any]:
        """Name and network of the role that is pretrained: teacher, else a loaded student; ("", None) if there is none."""
        teacher = self.method.role("teacher")
        if self.random:
            return "", None
        if teacher is not None:
            return "teacher", teacher
        target = (self.cfg.roles.get("student") or {}).get("_target_", "")
        return ("student", self.method.student) if target.endswith(".load") else ("", None)

    def samples(self, n: int) -> tuple[Tensor, dict[str, Tensor]]:
        """n samples with their conditions; noise in place of samples if the data has conditions only."""
        cond = {k: v[:n] for k, v in self.cond.items()}
        n = min([n, *map(len, cond.values()), *([len(self.x)] if self.x is not None else [])])
        x = self.x[:n] if self.x is not None else torch.randn(n, *self.method.shape, device=self.method.device)
        return x, cond


def first_samples(data: Any, limit: int = SAMPLES) -> dict[str, Tensor]:
    """Up to `limit` samples of the loader's first batches."""
    parts, count, batches = [], 0, data.loader(0, 1, 0)
    for batch in batches:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        if parts and any(v.shape[1:] != parts[0][k].shape[1:] for k, v in tensors.items()):
            continue  # another bucket, of another shape
        parts.append(tensors)
        count += len(next(iter(parts[-1].values())))
        if count >= limit or len(parts) >= 64:
            break
    if hasattr(batches, "close"):
        batches.close()  # ends the workers of a streamed split
    return {k: torch.cat([p[k] for p in parts])[:limit] for k in parts[0]}


@contextmanager
def untouched(method: Any):
    """Restore the method bit for bit afterwards: weights, gradients, flags, modes, attributes, random streams."""
    names = (*method.trainable, *method._averages)
    tensors = [v.detach() for n in names for v in getattr(method, n).state_dict(keep_vars=True).values()]
    copies, attributes = [v.clone() for v in tensors], dict(vars(method))
    flags = [(p, p.requires_grad, p.grad) for p in method.parameters()]
    modes = [(m, m.training) for m in method.modules()]
    nonfinite, shared, cpu = method.nonfinite.state(), method.shared.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        vars(method).clear()
        vars(method).update(attributes)
        with torch.no_grad():
            for v, copy in zip(tensors, copies):
                v.copy_(copy)
        for p, needs, grad in flags:
            p.requires_grad_(needs).grad = grad
        for module, mode in modes:
            module.training = mode
        method.nonfinite.restore(nonfinite)
        method.shared.set_state(shared)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def device_of(engine: Any) -> torch.device:
    """The device that a run with these `engine` settings uses."""
    if engine.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    return torch.device("cpu")


def autocast(context: CheckContext) -> torch.autocast:
    """The run's own precision of computation."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(context.cfg.engine.precision))
    return torch.autocast(context.method.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def shortened(values: list[str], most: int = 4) -> str:
    """The first `most` items of a list as text, and the number of the others."""
    rest = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + rest
