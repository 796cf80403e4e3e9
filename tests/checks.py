"""What the tests of `distill check` share: small experiments, ways to spoil them, and what the checks find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from torch import Tensor

from distill import config
from distill.inspect.check import Finding, findings
from distill.training.experiment import Experiment, build_experiment

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits"
TOYS = sorted(tiny.TOY.glob("*.yaml"))
FAULTY = "test_check_faults"  # the module of methods that are wrong on purpose


def digits(shards: Path, *overrides: str, name: str = "consistency") -> Experiment:
    keys = [f"data.path={shards}/train", f"eval.reference.path={shards}/test", "data.batch_size=16", "train.threads=1"]
    return build_experiment(config.load([DIGITS / f"{name}.yaml"], [*keys, *overrides]), allow=(FAULTY,))


def toy(*overrides: str, name: str = "tdm") -> Experiment:
    keys = ["data.batch_size=32", "train.threads=1", "roles.student.net.width=16", "roles.student.net.depth=1"]
    return build_experiment(config.load([tiny.TOY / f"{name}.yaml"], [*keys, *overrides]), allow=(FAULTY,))


def spoilt(experiment: Experiment, **change: Callable[[Tensor], Tensor]) -> Experiment:
    """The experiment with its batches changed: column -> function of the column."""
    load = experiment.data.loader
    experiment.data.loader = lambda *a: (
        {k: change[k](v) if k in change else v for k, v in b.items()} for b in load(*a)
    )
    return experiment


def many_latents(bandwidths: str) -> Experiment:
    """MMD on samples of 512 numbers."""
    means = ", ".join(["0.0"] * 512)
    law = f"means: [[{means}]], stds: 1.0, schedule: {{_target_: distill.noise.RectifiedFlow}}"
    keys = [f"roles.teacher={{_target_: distill.denoise.GaussianMixture, {law}}}", "roles.student.net.dim=512"]
    return toy(*keys, f"method.bandwidths={bandwidths}", "method.warm_start=100", name="mmd")


def look(experiment: Experiment, folder: Path, *only: str) -> list[Finding]:
    """Findings, of the named checks alone if there are any."""
    from distill.inspect import check

    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHECKS", "UPDATE_CHECKS") if only else ():
            patch.setattr(check, name, {k: v for k, v in getattr(check, name).items() if k in only})
        if only and not set(only) & set(check.UPDATE_CHECKS):
            patch.setattr(check, "_dry_run", lambda context: [])
        return findings(experiment, folder)


def failed(found: list[Finding]) -> list[str]:
    return [str(f) for f in found if f.level == "FAIL"]
