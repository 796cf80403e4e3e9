"""`distill check`: look at a run before it costs anything, and refuse one that cannot come out right.

Each check says one or more sentences: ok, skipped and why, WARN for what is suspicious, FAIL for what is certainly
wrong, with the key and the mend. docs/check.md lists them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from distill import run
from distill.check import settings, teacher
from distill.check.base import Finding, Probe, device_of, first, untouched
from distill.check.updates import tried
from distill.errors import BadInput

LOOKS = {
    "data": settings.data,
    "teacher": teacher.denoises,
    "pipeline": teacher.matches_stock,
    "guidance": teacher.guides,
    "start": teacher.starts_equal,
    "grid": settings.serves,
    "batch": settings.batches,
    "disk": settings.disk,
    "settings": settings.settings,
}


def check(cfg: Any, folder: Path, allow: tuple[str, ...] = (), world: int = 1) -> list[Finding]:
    """All findings about the run that `cfg` describes, if it were written to `folder` by `world` processes."""
    return findings(run.assemble(cfg, allow), folder, world)


def findings(session: Any, folder: Path, world: int = 1) -> list[Finding]:
    """The checks of an assembled session; it is left as it was, bit for bit."""
    method, device = session.method, device_of(session.cfg.engine)
    home, found = method.device, []
    method.to(device)
    try:
        with untouched(method):
            torch.manual_seed(session.cfg.seed)
            batch = {k: v.to(device) for k, v in first(session.data).items()}
            probe = Probe(session, Path(folder), world, batch)
            for name, look in LOOKS.items():
                found += _said(name, lambda: [(name, *s) for s in look(probe)])  # noqa: B023
            found += _said("update", lambda: list(tried(probe)))
    finally:
        method.to(home)
    return found


def _said(name: str, look: Any) -> list[Finding]:
    """What a check says; one that breaks says so, and stops nobody, unless it was the run's own bad input."""
    try:
        return [Finding(*said) for said in look()]
    except BadInput as error:
        return [Finding(name, "FAIL", str(error))]
    except Exception as error:  # a method or network of the user's may fail in any way
        return [Finding(name, "WARN", f"could not be tried: {type(error).__name__}: {' '.join(str(error).split())}")]


def gate(quiet: bool = False) -> Any:
    """For `run.train(look=...)`: prints what is not as it should be, and refuses to start on a FAIL.

    Raises:
        BadInput: with the sentence of the first certain fault.
    """
    from distill.engine import home

    def look(session: Any, folder: Path) -> None:
        began, found = time.perf_counter(), findings(session, folder, home.world())
        for finding in found if home.leads() and not quiet else ():
            if finding.level == "WARN":
                print(finding)
        refuse(found)
        if home.leads() and not quiet:
            print(f"{sum(f.level == 'ok' for f in found)} checks passed in {time.perf_counter() - began:.1f} s.")

    return look


def refuse(found: list[Finding]) -> None:
    """Raise if a finding is certain."""
    wrong = [f for f in found if f.level == "FAIL"]
    if wrong:
        more = f" ({len(wrong) - 1} more; `distill check` lists them)" if len(wrong) > 1 else ""
        raise BadInput(f"check {wrong[0].name}: {wrong[0].text}{more} Start anyway with --no-check.")
