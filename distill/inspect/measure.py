"""Evaluates an experiment: teacher, ODE solvers on the teacher and student, by `distill.metrics.evaluate`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distill import config
from distill.denoise import Guided
from distill.metrics.evaluate import Evaluation, ddim_sampler
from distill.metrics.shares import ALONE, SampleShares, current_shares
from distill.metrics.suite import Suite
from distill.times import Grid
from distill.training.callbacks import TimedPrint
from distill.training.experiment import Experiment
from distill.training.run_folder import is_rank_zero


def evaluation_of(
    experiment: Experiment, suite: Suite, samples: int | None = None, ranks: SampleShares = ALONE
) -> Evaluation:
    """An experiment's teacher and student on `samples` fixed noises, `eval.samples` of them by default.

    A run that trains a teacher has its averaged network as the teacher and no student.
    """
    method, cfg = experiment.method, experiment.cfg
    z, cond = experiment.noise(samples or cfg.eval.samples, cfg.eval.seed)
    return Evaluation(
        suite,
        z,
        cond,
        method.student,
        teacher=experiment.teacher,
        student=None if experiment.teacher is method.ema else method.sample,
        grid=method.grid,
        batch=experiment.batch_rows,
        seed=cfg.eval.seed,
        ranks=ranks,
        progress=TimedPrint(prefix="measuring ") if is_rank_zero() else lambda text: None,
    )


def measure(
    experiment: Experiment,
    samples: int | None = None,
    evaluations: Sequence[int] | None = None,
    every_solver: Sequence[int] | None = None,
    folder: Path | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metrics of `Evaluation.run` with `about`, and picture panels (teacher at K and at the most evaluations, student
    at K).

    Args:
        evaluations: NFEs of teacher and student; the config's `eval.evaluations` by default, and K in any case.
        every_solver: NFEs at which every ODE solver of distill is tried on the teacher; all up to 16 by default.
        folder: the run's, where a reference drawn from the teacher is stored.
    """
    cfg = experiment.cfg
    ranks = current_shares(cfg.engine.validation_timeout)
    evaluation = evaluation_of(experiment, experiment.suite(folder), samples, ranks)
    result, panels = evaluation.run(evaluations or cfg.eval.evaluations, every_solver)
    result["about"] = {
        "config": config.fingerprint(cfg),
        "step": experiment.method.step,
        "samples": samples or cfg.eval.samples,
        "reference": 0 if evaluation.suite.x is None else len(evaluation.suite.x),
        "seed": cfg.eval.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    return result, panels


def toy_scores(experiment: Experiment) -> dict[str, float]:
    """The metrics of a toy recipe that `expect` bounds.

    energy         energy distance of the student at K steps to the data
    energy_ratio   the same over that of the exact denoiser in K DDIM steps from the same noise
    map_error      one-dimensional data: error of the deterministic student against the exact flow map
    teacher_error  with a teacher: root mean square distance to the guided teacher's samples in 64 DDIM steps from the
                   same noise, over the data's standard deviation
    reward_gap     methods with a `metric`: mean score of the data minus that of the student, negative if the student's
                   is better
    """
    method, suite = experiment.method, experiment.suite()
    z, cond = experiment.noise(experiment.cfg.eval.samples, experiment.cfg.eval.seed)
    x = method.sample(z, cond, generator=torch.Generator().manual_seed(0))
    scores = suite.score(x, cond)
    of_law = ddim_sampler(suite.oracle, method.grid)(z, {})
    scores["energy_ratio"] = scores["energy"] / suite.score(of_law, cond, quick=True)["energy"]
    if method.shape == (1,):
        scores["map_error"] = suite.map_error(z, x)
    if method.metric is not None:
        scores["reward_gap"] = float(method.metric(suite.x).mean() - method.metric(x).mean())
    if method.role("teacher") is not None:
        of_teacher = ddim_sampler(Guided(method.teacher, method.guidance), Grid.uniform(64))(z, cond)
        scores["teacher_error"] = float((x - of_teacher).square().mean().sqrt() / suite.x.std())
    return scores
