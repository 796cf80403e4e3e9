"""Peak memory and machine of a run: `cost.json` in its folder."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from pathlib import Path

import lightning
import torch

from distill.files import write_json
from distill.training.callbacks import console
from distill.training.run_folder import is_rank_zero, world


class CostRecorder(lightning.Callback):
    """Peak memory of the first rank: of the accelerator's allocator where there is one, else resident memory.

    A resumed run keeps the highest of its parts.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_start(self, trainer, method):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, trainer, method):
        if not is_rank_zero():
            return
        kind, peak = peak_memory()
        found = {"memory": kind, "peak_bytes": max(peak, self._before(kind))}
        try:
            write_json(self.path, found | {"device": device(), "processes": world()})
        except OSError as error:
            console.print(f"{self.path} could not be written ({error.strerror}); the run continues.", highlight=False)

    def _before(self, kind: str) -> int:
        """The highest of the run's earlier parts; 0 if there is none of this kind of memory, or the file is damaged."""
        try:
            before = json.loads(self.path.read_text())
            return int(before["peak_bytes"]) if before["memory"] == kind else 0
        except (OSError, ValueError, TypeError, KeyError):
            return 0


def peak_memory() -> tuple[str, int]:
    """("accelerator" or "resident", bytes) of this process so far."""
    if torch.cuda.is_available():
        return "accelerator", torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "resident", peak if sys.platform == "darwin" else peak * 1024


def device() -> str:
    """The accelerator by name, else the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"
