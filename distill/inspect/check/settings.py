"""Checks of settings: batches, grid, disk, and settings that never take effect."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from distill.denoise import network_of
from distill.errors import BadInput
from distill.inspect.check.base import CheckContext, Finding, Findings
from distill.training import checkpoints

SHRINK = 1e-3  # share of the weights that decay may take in a step


def batches(context: CheckContext) -> Findings:
    """Enough samples for a step, and a global batch size equal to `expect.batch`."""
    source, n = context.experiment.data, context.experiment.data.batch_size
    accumulate, count = context.cfg.engine.accumulate, source.info.count
    total = n * context.world * accumulate
    conditions = f"{n} samples x {context.world} processes x {accumulate} micro-batches = {total} a step"
    wanted = context.cfg.expect.get("batch")
    if wanted and wanted != total:
        yield Finding.fail(
            f"expect.batch is {wanted}, but a step has {total} samples ({conditions}); set data.batch_size, "
            "engine.devices or engine.accumulate."
        )
    if count and n > count:
        yield Finding.warn(
            f"data.batch_size: {n} is more than the {count} samples there are, so each comes more than once in a batch; "
            "lower it, or give more data."
        )
    elif count and total > count:
        yield Finding.warn(f"{conditions}, but there are {count} samples; each comes more than once in a step.")
    elif not wanted or wanted == total:
        lanes = context.world * max(source.workers, 1)
        yield Finding.ok(f"{conditions}; " + (f"{count} samples, {lanes} readers." if count else "drawn without end."))


def serves(context: CheckContext) -> Findings:
    """The times of the training grid equal those of the stock scheduler that samples the exported student."""
    from distill.noise import Table

    student, grid, serving = context.method.student, context.method.grid, context.method.serving
    net = network_of(student).base
    if not network_of(student).part:
        yield Finding.skipped(f"{type(net).__name__} has no stock class to be exported to.")
        return
    from distill.export import folder

    if serving not in folder.SAMPLERS:
        yield Finding.warn(f"the sampler '{serving}' has no stock scheduler: the student will not export.")
        return
    conditions = network_of(student).source is not None  # from a pipeline folder
    if not conditions and (not isinstance(student.schedule, Table) or student.prediction not in ("eps", "x", "v")):
        yield Finding.skipped(
            f"no stock scheduler serves {student.prediction} under {type(student.schedule).__name__}."
        )
        return
    try:
        scheduler = (
            _of_pipeline(student, grid, serving) if conditions else folder.stock_scheduler(student, grid, serving)
        )
    except BadInput as error:
        yield Finding.fail(f"method.grid: {error}")
        return
    yield Finding.ok(f"{type(scheduler).__name__} serves the {grid.steps} steps at the times that are trained.")


def _of_pipeline(student: Any, grid: Any, serving: str) -> Any:
    """The stock scheduler of a student with text conditions."""
    from distill.denoise import Denoiser
    from distill.export import text

    net = network_of(student).base
    return text.serving(Denoiser(net, student.schedule, student.prediction), grid, serving, text.source(net))[0]


def disk(context: CheckContext) -> Findings:
    """Free disk space for the kept checkpoints and the one being written."""
    method, train = context.method, context.cfg.train
    weights = {
        n: checkpoints.size(dict(getattr(method, n).state_dict())) for n in (*method.trainable, *method._averages)
    }
    moments = sum(weights[r] * (0 if method.optim[r].name == "SGD" else 2) for r in method.trainable)
    one = sum(weights.values()) + moments
    count_kept = train.keep or math.ceil(train.steps / (train.save_every or train.steps))
    need = (count_kept + train.keep_best + 1) * one
    at = Path(context.folder).absolute()
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    conditions = f"{count_kept + train.keep_best + 1} checkpoints of {one / 1e6:,.1f} MB need {need / 1e6:,.1f} MB"
    if free < need:
        yield Finding.fail(
            f"{conditions}, and {free / 1e6:,.1f} MB are free at {at}; free some, write elsewhere with --runs, or "
            "lower train.keep."
        )
    else:
        yield Finding.ok(f"{conditions}; {free / 1e6:,.0f} MB are free.")


def settings(context: CheckContext) -> Findings:
    """Settings that have no effect in a run of this length."""
    train, steps, method, texts = context.cfg.train, context.cfg.train.steps, context.method, []
    for name, (_, decay) in method._averages.items():
        if decay and decay < 1 and (half := math.log(2) / -math.log(decay)) > steps:
            key = "method.ema" if name == "ema" else f"the decay of {name}"
            texts.append(
                f"{key}: {decay:g} has a half-life of {half:,.0f} steps, and the run has {steps}; only its ramp "
                "(1 + n)/(10 + n) counts; lower it, or train longer."
            )
    for role, optim in method.optim.items():
        if optim.warmup >= steps:
            texts.append(
                f"optim.{role}.warmup: {optim.warmup} steps are not over when the run is ({steps} steps); lower it."
            )
        if optim.lr == 0:
            texts.append(f"optim.{role}.lr: 0 trains nothing; raise it.")
        texts += _moments(role, optim)
    for key, value in _lengths(method):
        if value >= steps:
            texts.append(
                f"method.{key}: {value} steps, but the run has {steps}; its own loss is never reached in full; lower it, or "
                "train longer."
            )
    for key in ("validate_every", "save_every"):
        if train[key] > steps:
            texts.append(f"train.{key}: {train[key]} is never reached in {steps} steps; lower it, or train longer.")
    for key in ("keep_best", "patience"):
        if train[key] and not train.validate_every:
            texts.append(f"train.{key}: nothing is validated on the way; set train.validate_every.")
    if method.grid.steps > 64 and method.role("teacher") is not None:
        texts.append(f"method.grid: {method.grid.steps} steps are many for a few-step student; lower it.")
    yield from map(Finding.warn, texts) if texts else [Finding.ok(f"all settings take effect in {steps} steps.")]


def _moments(role: str, optim: Any) -> list[str]:
    """Averages of an Adam optimizer, and a weight decay that decays the weights too fast."""
    texts, betas = [], [float(b) for b in optim.betas or ()]
    if "Adam" in optim.name and len(betas) == 2 and betas[0] > betas[1]:
        texts.append(
            f"optim.{role}.betas: {betas} averages the gradient longer than its square; the first is that of the gradient: "
            "swap them."
        )
    shrink = optim.lr * optim.weight_decay
    if optim.name == "AdamW" and shrink > SHRINK:
        texts.append(
            f"optim.{role}.weight_decay: {optim.weight_decay:g} halves the weights in {math.log(2) / shrink:.0f} steps at the "
            f"rate {optim.lr:g}; lower it."
        )
    return texts


def _lengths(method: Any) -> list[tuple[str, int]]:
    """The method's settings that are numbers of steps."""
    names = ("warm_start", "warm_up", "share_steps", "rung_steps", "student_every", "head_turns")
    return [(n, v) for n in names if isinstance(v := getattr(method, n, None), int)]
