"""`distill check`: tests a run before it starts, and refuses one that is certainly wrong.

Each check yields findings: ok; skipped, with the reason; WARN for suspicious settings; FAIL for certain faults, with the
key and the remedy. docs/check.md lists the checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from distill.errors import BadInput
from distill.inspect.check import conventions, guidance, numerics, rates, samples, settings, signs, start, updates
from distill.inspect.check.base import CheckContext, Finding, Findings, device_of, first_samples, untouched
from distill.inspect.check.crash import crash
from distill.inspect.check.updates import DryRun, Turn
from distill.training.experiment import build_experiment

CHECKS: dict[str, Callable[[CheckContext], Findings]] = {
    "data": samples.data,
    "teacher": conventions.denoises,
    "pipeline": conventions.matches_stock,
    "guidance": guidance.guides,
    "start": start.starts_equal,
    "finite": numerics.finite,
    "grid": settings.serves,
    "batch": settings.batches,
    "disk": settings.disk,
    "settings": settings.settings,
}
UPDATE_CHECKS: dict[str, Callable[[CheckContext, DryRun, dict[str, Turn]], Findings]] = {
    "gradients": updates.gradients,
    "conditions": updates.learns_conditions,
    "sign": signs.signs,
    "rates": rates.rates,
}


def check(cfg: Any, folder: Path, allow: tuple[str, ...] = (), world: int = 1) -> list[Finding]:
    """All findings about the run that `cfg` describes, to be written to `folder` by `world` processes."""
    return findings(build_experiment(cfg, allow), folder, world)


def findings(experiment: Any, folder: Path, world: int = 1) -> list[Finding]:
    """All findings about an experiment, which is left unchanged."""
    method, device = experiment.method, device_of(experiment.cfg.engine)
    before, out = method.device, []
    method.to(device)
    try:
        with untouched(method):
            torch.manual_seed(experiment.cfg.seed)
            batch = {k: v.to(device) for k, v in first_samples(experiment.data).items()}
            context = CheckContext(experiment, Path(folder), world, batch)
            for name, function in CHECKS.items():
                out += _run(name, function, context)
            out += _dry_run(context)
    finally:
        method.to(before)
    return out


def _dry_run(context: CheckContext) -> list[Finding]:
    """The checks that compute a training step."""
    out = _run("gradients", updates.frozen, context)
    if context.x is not None and not context.readable:
        return out + [Finding.skipped("the samples are not finite.", name) for name in UPDATE_CHECKS]
    steps: list[tuple[DryRun, dict[str, Turn]]] = []

    def first(context: CheckContext) -> Findings:
        dry = DryRun(context)
        steps.append((dry, dry.all()))
        yield from ()

    out += _run("update", first, context)
    if not steps:
        return out + [Finding.skipped("the training step failed; see `update`.", name) for name in UPDATE_CHECKS]
    for name, function in UPDATE_CHECKS.items():
        out += _run(name, lambda context, check=function: check(context, *steps[0]), context)
    return out


def _run(name: str, function: Callable[[CheckContext], Iterable[Finding]], context: CheckContext) -> list[Finding]:
    """The findings of one check. A BadInput becomes a FAIL, any other exception what `crash` says."""
    try:
        out = [Finding(finding.level, finding.text, finding.name or name) for finding in function(context)]
    except BadInput as error:
        out = [Finding.fail(str(error), name)]
    except Exception as error:  # a user's method or network may raise anything
        finding = crash(error, context.method, name in ("update", *UPDATE_CHECKS))
        out = [Finding(finding.level, finding.text, name)]
    context.failed |= {finding.name for finding in out if finding.level == "FAIL"}
    return out


def gate(quiet: bool = False) -> Any:
    """For `train(check=...)`: prints warnings, and refuses to start on a FAIL.

    Raises:
        BadInput: the text of the first FAIL.
    """
    from distill.training import run_folder

    def look(experiment: Any, folder: Path) -> None:
        began, out = time.perf_counter(), findings(experiment, folder, run_folder.world())
        verbose = run_folder.is_rank_zero() and not quiet
        for finding in out if verbose else ():
            if finding.level == "WARN":
                print(finding)
        refuse(out)
        if verbose:
            print(f"{sum(f.level == 'ok' for f in out)} checks passed in {time.perf_counter() - began:.1f} s.")

    return look


def refuse(findings: list[Finding]) -> None:
    """Raise `BadInput` if a finding has the level FAIL."""
    wrong = [f for f in findings if f.level == "FAIL"]
    if wrong:
        more = f" ({len(wrong) - 1} more; `distill check` lists them)" if len(wrong) > 1 else ""
        raise BadInput(f"check {wrong[0].name}: {wrong[0].text}{more} Start anyway with --no-check.")
