"""Optimizers by name and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from distill.config.schema import Optim
from distill.errors import BadInput, suggest


def optimizer_of(settings: Optim, parameters: list[nn.Parameter], role: str) -> torch.optim.Optimizer:
    """The `torch.optim` class that `settings.name` names."""
    kind = getattr(torch.optim, settings.name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        near = suggest(settings.name, dir(torch.optim))
        raise BadInput(f"optim.{role}.name: torch.optim has no '{settings.name}'.{near}")
    keywords: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.name != "SGD":
        keywords |= {"betas": tuple(float(b) for b in settings.betas), "eps": settings.eps}
    if settings.name in ("Adam", "AdamW"):
        keywords["fused"] = not parameters[0].is_meta
    return kind(parameters, **keywords)


def learning_rate(settings: Optim, step: int, total: int) -> float:
    """Factor on the learning rate: linear warm-up, then constant or a half cosine to zero at `total` steps."""
    factor = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.decay == "cosine" and total:
        factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return factor
