r"""Conversion of diffusers models: schedulers to Schedules and Grids, networks to Denoisers.

Integer timesteps and alpha-bar are used only here and in `distill.export`. A scheduler with N discrete timesteps n =
0..N-1, least noise first, corresponds to times t = (n + 1) / N; t = 0 is clean data.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "distill.models.families.dit": ("DiT",),
    "distill.models.families.unet2d": ("UNet2D",),
    "distill.models.families.family": ("Family", "Twin"),
    "distill.models.families.registry": ("FAMILIES", "LABEL_FAMILIES", "register_family"),
    "distill.models.diffusers.network": ("StockNetwork", "TensorConditioned"),
    "distill.models.diffusers.encoders": ("Geometry", "fingerprints"),
    "distill.models.diffusers.prompts": ("FirstFrames", "Latent", "Prompts", "decode", "encode"),
    "distill.models.diffusers.schedulers": ("PREDICTIONS", "grid_of", "prediction_of", "schedule_of", "scheduler_of"),
    "distill.models.diffusers.loading": ("load",),
    "distill.models.diffusers.sampling": ("calls_used", "sample_stock", "stock_solvers"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:  # lazily, because the families import modules of this package
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
