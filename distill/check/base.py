"""What every check sees, and what it says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAMPLES = 256  # that the checks look at

Said = Iterator[tuple[str, str]]  # (level, sentence)
LEVELS = ("ok", "skipped", "WARN", "FAIL")


@dataclass
class Finding:
    """One sentence of one check; level is one of LEVELS, and FAIL alone stops a run."""

    name: str
    level: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:8}{self.name:10}{self.text}"


@dataclass
class Probe:
    """A session about to train, with its first samples on the device that will train.

    `batch` holds up to SAMPLES samples as the loader gives them; `x` is None where the data is conditions alone.
    """

    session: Any
    folder: Path
    world: int = 1
    batch: dict[str, Tensor] = field(default_factory=dict)

    @property
    def method(self) -> Any:
        return self.session.method

    @property
    def cfg(self) -> Any:
        return self.session.cfg

    @property
    def x(self) -> Tensor | None:
        return self.batch.get("x")

    @property
    def cond(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.batch.items() if k not in ("x", "z")}

    @property
    def readable(self) -> bool:
        """Whether the samples are numbers that say something of a network."""
        return self.x is not None and bool(torch.isfinite(self.x).all())

    @property
    def random(self) -> bool:
        """Whether the networks stand for others and were never trained: nothing follows from what they answer."""
        return self.cfg.model == "tiny"

    def model(self) -> tuple[str, Any]:
        """The role that should denoise well before the first step, and its key; ("", None) where every role is new."""
        teacher = getattr(self.method, "teacher", None)
        if self.random:
            return "", None
        if teacher is not None:
            return "teacher", teacher
        target = (self.cfg.roles.get("student") or {}).get("_target_", "")
        return ("student", self.method.student) if target.endswith(".load") else ("", None)

    def some(self, n: int) -> tuple[Tensor, dict[str, Tensor]]:
        """n samples, or noise where there are none, with their conditions."""
        cond = {k: v[:n] for k, v in self.cond.items()}
        n = min([n, *map(len, cond.values()), *([len(self.x)] if self.x is not None else [])])
        x = self.x[:n] if self.x is not None else torch.randn(n, *self.method.shape, device=self.method.device)
        return x, cond


def first(data: Any, limit: int = SAMPLES) -> dict[str, Tensor]:
    """Up to `limit` samples of the loader's first batches."""
    parts, count, batches = [], 0, data.loader(0, 1, 0)
    for batch in batches:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        if parts and any(v.shape[1:] != parts[0][k].shape[1:] for k, v in tensors.items()):
            continue  # of another bucket
        parts.append(tensors)
        count += len(next(iter(parts[-1].values())))
        if count >= limit or len(parts) >= 64:
            break
    if hasattr(batches, "close"):
        batches.close()  # ends the workers of a streamed split
    return {k: torch.cat([p[k] for p in parts])[:limit] for k in parts[0]}


@contextmanager
def untouched(method: Any):
    """Leave the method as it was found, bit for bit: weights, gradients, flags, modes, attributes, random streams."""
    names = (*method.trainable, *method._averages)
    tensors = [v.detach() for n in names for v in getattr(method, n).state_dict(keep_vars=True).values()]
    copies, attributes = [v.clone() for v in tensors], dict(vars(method))
    flags = [(p, p.requires_grad, p.grad) for p in method.parameters()]
    modes = [(m, m.training) for m in method.modules()]
    skips, shared, cpu = method.skips.state(), method.shared.get_state(), torch.get_rng_state()
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
        method.skips.restore(skips)
        method.shared.set_state(shared)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def device_of(engine: Any) -> torch.device:
    """Where a run of these settings computes."""
    if engine.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    return torch.device("cpu")


def spread(values: list[str], most: int = 4) -> str:
    """A list in words, shortened."""
    rest = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + rest
