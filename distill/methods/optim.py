"""Optimizers by name and learning-rate schedules."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distill.config.schema import Optim
from distill.errors import BadInput, suggest

OWN = "torch.optim."
SCALED = {"adjust_lr_fn": "match_rms_adamw"}  # of Muon: updates with the root mean square of AdamW's
WHOLE = ("Muon", "Adafactor")  # take a weight as a matrix, which ZeRO cuts to flat parts


def optimizer_of(settings: Optim, parameters: list[nn.Parameter], role: str) -> torch.optim.Optimizer:
    """The optimizer that `settings.name` names, with those of the settings that its signature takes, and `settings.options`.

    Muon takes matrices; other weights get AdamW with the same learning rate.

    Raises:
        BadInput: there is no such optimizer here, or it cannot be used without a closure.
    """
    kind, matrices = optimizer_class(settings.name, f"optim.{role}.name"), [p for p in parameters if p.ndim == 2]
    if kind is torch.optim.Muon and len(matrices) < len(parameters):
        return MuonWithAdamW(parameters, settings, role)
    keywords = keywords_of(kind, settings, role)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        keywords.setdefault("fused", not parameters[0].is_meta)
    if kind is torch.optim.Muon:
        keywords = SCALED | keywords
    return kind(parameters, **keywords)


def optimizer_class(name: str, where: str) -> type[torch.optim.Optimizer]:
    """A class of `torch.optim` by its name, or any optimizer by its dotted path."""
    module, _, last = name.removeprefix(OWN).rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else torch.optim, last, None)
    except ImportError as error:
        package = module.split(".")[0]
        raise BadInput(
            f"{where}: {package} is not installed ({error}); pip install {package}, or use AdamW."
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        near = "" if module else suggest(last, dir(torch.optim))
        raise BadInput(f"{where}: {module or 'torch.optim'} has no '{last}'.{near}")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise BadInput(f"{where}: {last} evaluates the loss several times per step, which no method does; use AdamW.")
    return found


def keywords_of(kind: Callable[..., Any], settings: Optim, role: str) -> dict[str, Any]:
    """Arguments of an optimizer's class: of lr, weight_decay, betas and eps those that it takes, and `options`.

    A number is left out where the class takes a pair, as Adafactor's eps.

    Raises:
        BadInput: an option that the class does not take.
    """
    takes = inspect.signature(kind).parameters
    known: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "eps": settings.eps}
    known["betas"] = tuple(float(b) for b in settings.betas)
    fits = lambda name, value: name in takes and isinstance(takes[name].default, tuple) == isinstance(value, tuple)
    for name in settings.options:
        if name not in takes:
            raise BadInput(f"optim.{role}.options.{name}: {settings.name} has no such argument.{suggest(name, takes)}")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.options.items()}
    return {name: value for name, value in known.items() if fits(name, value)} | plain


def apply_settings(optimizer: torch.optim.Optimizer, fresh: list[dict[str, Any]]) -> None:
    """Put the run's own settings, those of the groups `fresh`, in place of loaded ones; what an optimizer adapts remains.

    Learning rates are set before each step.
    """
    for group, own in zip(optimizer.param_groups, fresh):
        group.update(own)


def settings_in(optimizer: torch.optim.Optimizer, settings: Optim) -> list[dict[str, Any]]:
    """Of each group of an optimizer the values that the config decides."""
    names = {"weight_decay", "eps", "betas", *settings.options} - {"lr"}
    return [{k: v for k, v in group.items() if k in names} for group in optimizer.param_groups]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), AdamW for all other weights.

    Muon's updates have AdamW's root mean square (`SCALED`), so that one learning rate fits both.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: Optim, role: str):
        muon = SCALED | keywords_of(torch.optim.Muon, settings, role)
        adam = keywords_of(torch.optim.AdamW, dataclasses.replace(settings, options={}), role)
        parts = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
        made: list[tuple[Any, dict[str, Any]]] = [(torch.optim.Muon, muon), (torch.optim.AdamW, adam)]
        self.inner = [kind(part, **keywords) for part, (kind, keywords) in zip(parts, made) if part]
        super().__init__([group for one in self.inner for group in one.param_groups], {"lr": settings.lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one, group in zip(self.inner, self.param_groups):
            one.state, one.param_groups = self.state, [group]
            one.step()


def learning_rate(settings: Optim, step: int, total: int) -> float:
    """Factor on the learning rate: linear warm-up, then constant or a half cosine to zero at `total` steps."""
    factor = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.decay == "cosine" and total:
        factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return factor
