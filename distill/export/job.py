"""What every kind of export is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.denoise import Denoiser
from distill.grid import Grid

SEED = 0  # of the reference samples that `verify` repeats


@dataclass
class Job:
    """A student, the way it walks, and the folder to fill.

    Args:
        student: in float32 on the CPU, in eval mode; its network is whole.
        adapter: the `nets.lora.Adapter` that made its network of a base, if one did.
        grid, sampler: the times it was trained on, and "ode" or "renoise".
        w: the guidance that it imitates.
        staging: the folder to write into.
        name: of the folder that it becomes.
    """

    student: Denoiser
    adapter: Any
    grid: Grid
    sampler: str
    w: float | None
    staging: Path
    name: str
