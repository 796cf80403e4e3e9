"""The input of every export writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.denoise import Denoiser
from distill.times import Grid

SEED = 0  # of the reference samples that `verify` repeats


@dataclass
class ExportRequest:
    """A student, its sampler, and the folder to fill.

    Args:
        student: in `dtype` on `device`, in eval mode; its network is whole.
        adapter: the `distill.models.lora.LoRAAdapter` that was merged into its base to make that network; None if none was.
        grid: the times it was trained on.
        sampler: "ode" or "renoise".
        w: the guidance scale that the student was trained to reproduce; None without guidance.
        staging: the folder to write into.
        name: of the folder that it becomes.
        dtype: of the weights that are written, and of the reference samples' evaluations, as `models.diffusers` names it.
        device: that draws the reference samples.
    """

    student: Denoiser
    adapter: Any
    grid: Grid
    sampler: str
    w: float | None
    staging: Path
    name: str
    dtype: str = "float32"
    device: str = "cpu"
