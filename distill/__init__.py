"""Distil diffusion and flow models into students that sample in one to four steps.

Examples:
    >>> import distill
    >>> run = distill.train("toy/tdm", "train.steps=5", "log.wandb=disabled")    # or distill.open_run("runs/toy-tdm")
    runs/toy-tdm: training for 5 steps; the teacher is measured first.
    validation at step 0: ...
    >>> run.sample(8).shape
    torch.Size([8, 2])
    >>> list(run.evaluate(samples=200)["student"])                               # by number of evaluations
    ['1', '2', '4', '8', '50']
    >>> teacher = distill.load("tiny:adm")                                       # or a diffusers folder, or a hub id
    >>> isinstance(teacher, distill.Denoiser), distill.Guided(teacher, w=1.5).w
    (True, 1.5)
    >>> distill.Grid.uniform(4).times
    (1.0, 0.75, 0.5, 0.25, 0.0)
    >>> issubclass(distill.methods.TDM, distill.Method)
    True

Names are imported when they are used: `import distill` loads neither torch nor lightning nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BadInput": "distill.errors",
    "Denoiser": "distill.denoise",
    "Grid": "distill.times",
    "Guided": "distill.denoise",
    "Method": "distill.methods.base",
    "Run": "distill.inspect.results",
    "evaluate": "distill.inspect.results",
    "export_run": "distill.inspect.results",
    "load": "distill.models.diffusers",
    "open_run": "distill.inspect.results",
    "sample": "distill.inspect.results",
    "train": "distill.inspect.results",
}
_MODULES = ("config", "denoise", "losses", "methods", "metrics", "models", "noise", "solvers", "times")

__all__ = ["__version__", *_PUBLIC, *_MODULES]  # __init__.pyi says the same to type checkers


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"distill.{name}")
    else:
        raise AttributeError(f"module 'distill' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
