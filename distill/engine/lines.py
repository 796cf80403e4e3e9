"""The teacher's numbers, the horizontal lines beside the student's curves: measured once, kept for every run beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import __version__
from distill.denoise import Guided
from distill.engine.sinks import replace
from distill.eval.health import signs
from distill.grid import Grid
from distill.solvers import DDIM, solve

Scores = dict[str, dict[str, float]]
SAMPLED = 256  # values of each tensor that name it


def fingerprint(teacher: nn.Module, z: Tensor, cond: Mapping[str, Tensor], tests: Any, about: Any) -> str:
    """Names what the lines depend on: weights, noises, conditions, reference and `about`, a nest of plain settings.

    Of each tensor its shape and `SAMPLED` of its values, evenly spaced: a teacher of 10^10 weights is named in a second.
    """
    digest = hashlib.sha256(json.dumps([__version__, type(tests).__name__, about], sort_keys=True, default=str).encode())
    reference = {"x": getattr(tests, "x", None), "label": getattr(tests, "label", None)}
    for name, value in [*teacher.state_dict().items(), ("z", z), *cond.items(), *reference.items()]:
        if isinstance(value, Tensor):
            flat = value.detach().reshape(-1)
            picked = flat[torch.linspace(0, len(flat) - 1, min(len(flat), SAMPLED)).long()].double().cpu()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def measured(
    method: Any, tests: Any, z: Tensor, cond: Mapping[str, Tensor], most: int, draw: Callable[..., Tensor], scores: bool
) -> Scores:
    """`teacher@K` and `teacher@most` by DDIM in equal steps, under the run's guidance, from the student's own noise.

    Without a teacher the reference itself, `data`, and only what needs no second set of samples. With `scores` false
    nothing is scored: for a rank that only lends its shards.
    """
    teacher, found = getattr(method, "teacher", None), {}
    if teacher is None:
        return {"data": _reference(tests, cond)} if scores and getattr(tests, "x", None) is not None else {}
    guided = Guided(teacher, method.guidance)
    for steps in sorted({method.grid.steps, most}):
        walk = lambda z, c, steps=steps: solve(guided, teacher.schedule.start(z), Grid.uniform(steps).times, DDIM(), **c)
        x = draw(walk, z, cond, method)
        if scores:
            found[f"teacher@{steps}"] = tests.score(x, cond, quick=True) | signs(x, cond, tests.x)
    return found


def _reference(tests: Any, cond: Mapping[str, Tensor]) -> dict[str, float]:
    """Signs of the reference: coverage as of other samples of its law, diversity where samples have conditions alike."""
    label = getattr(tests, "label", None)
    found = signs(tests.x, {} if label is None else {"label": label}, tests.x)
    found["coverage"] = 1 - 0.5**5
    return found if (label is not None) == ("label" in cond) else {k: v for k, v in found.items() if k != "diversity"}


def read(path: Path) -> Scores | None:
    """Lines that were kept; None where there are none, or not whole."""
    try:
        found = json.loads(path.read_text())
        return {str(k): {str(n): float(v) for n, v in row.items()} for k, row in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def keep(path: Path, found: Scores) -> None:
    """Write them; a place where nothing can be written is no reason to stop."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lambda file: json.dump(found, file, indent=2))
    except OSError:
        pass


def at(folder: Path, name: str) -> Path:
    """Where the lines of a fingerprint are kept: beside the run, for its sisters too."""
    return folder.parent / ".cache" / f"teacher-{name}.json"
