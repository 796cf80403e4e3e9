"""The teacher baseline of validation: measured once and shared by the runs in one folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import __version__
from distill.denoise import Guided
from distill.files import write_json
from distill.metrics.collapse import collapse_indicators
from distill.metrics.evaluate import ddim_sampler
from distill.metrics.shared_draw import SharedDraw, without_noise
from distill.training.callbacks import TimedPrint

Scores = dict[str, dict[str, float]]
SAMPLED = 256  # values of each tensor that name it


def baseline_fingerprint(teacher: nn.Module, z: Tensor, cond: Mapping[str, Tensor], tests: Any, about: Any) -> str:
    """A digest of everything the baseline depends on: weights, noises, conditions, reference, and the settings `about`.

    Of each tensor the shape and `SAMPLED` evenly spaced values are used, so that 10^10 weights take about a second.
    """
    digest = hashlib.sha256(
        json.dumps([__version__, type(tests).__name__, about], sort_keys=True, default=str).encode()
    )
    reference = {"x": tests.x, "label": tests.label}
    for name, value in [*teacher.state_dict().items(), ("z", z), *cond.items(), *reference.items()]:
        if isinstance(value, Tensor):
            flat = value.detach().reshape(-1)
            picked = flat[torch.linspace(0, len(flat) - 1, min(len(flat), SAMPLED)).long()].double().cpu()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def measure_baseline(method: Any, tests: Any, draw: SharedDraw, cond: Mapping[str, Tensor], most: int) -> Scores:
    """`teacher@K` and `teacher@most` by DDIM in equal steps, under the run's guidance, from the student's own noise.

    All ranks of `draw` call it and get the same; `cond` holds the conditions of all of them. Without a teacher,
    `data`: the indicators of the reference itself that need no second set of samples.
    """
    teacher, found, ranks = method.role("teacher"), {}, draw.ranks
    progress = TimedPrint("measuring ") if ranks.rank == 0 else (lambda text: None)
    if teacher is None:
        return ranks.from_first(lambda: {"data": _reference(tests, cond)} if tests.x is not None else {})
    guided = Guided(teacher, method.guidance)
    for steps in sorted({method.grid.steps, most}):
        progress(f"teacher, {steps} evaluations")
        own = draw(without_noise(ddim_sampler(guided, steps)), method.student)
        progress(f"metrics of the teacher, {steps} evaluations")
        scores, x = tests.score(own, draw.own_cond, quick=True, ranks=ranks), ranks.gather(own)
        found[f"teacher@{steps}"] = scores | ranks.from_first(lambda: collapse_indicators(x, cond, tests.x))  # noqa: B023
    return found


def _reference(tests: Any, cond: Mapping[str, Tensor]) -> dict[str, float]:
    """Collapse indicators of the reference; its coverage is that of other samples of the same distribution."""
    label = tests.label
    found = collapse_indicators(tests.x, {} if label is None else {"label": label}, tests.x)
    found["coverage"] = 1 - 0.5**5
    return found if (label is not None) == ("label" in cond) else {k: v for k, v in found.items() if k != "diversity"}


def read_baseline(path: Path) -> Scores | None:
    """A saved baseline; None if there is none or it is damaged."""
    try:
        found = json.loads(path.read_text())
        return {str(k): {str(n): float(v) for n, v in row.items()} for k, row in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def save_baseline(path: Path, found: Scores) -> None:
    """Save a baseline; a folder that cannot be written is ignored."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    except OSError:
        pass


def baseline_path(folder: Path, name: str) -> Path:
    """Where the baseline of a fingerprint is saved: beside the run, shared with other runs there."""
    return folder.parent / ".cache" / f"teacher-{name}.json"
