"""Checks without networks: data, batches, grid, disk space, and settings without effect in a run of this length."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from distill.denoise import GaussianMixture, network_of
from distill.errors import BadInput
from distill.inspect.check.base import CheckContext, Finding, Findings
from distill.training import checkpoints


def data(context: CheckContext) -> Findings:
    """Finite values, range, standard deviation and labels of the first samples."""
    info, findings = context.experiment.data.info, list(_labels(context))
    if context.x is None:
        yield from findings or [Finding.ok("conditions only.")]
        return
    x = context.x.float()
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        yield Finding.fail(
            f"{bad} of the first {len(x)} samples hold NaN or infinity; write the data again without them."
        )
        return
    if len(x) > 1 and float(x.std(0).max()) == 0:
        yield Finding.fail(f"the first {len(x)} samples are all the same; look at how the data was written.")
    findings += [*_range(x, info), *_moments(context, x, info)]
    yield from findings or [
        Finding.ok(
            f"{len(x)} samples of mean {x.mean():.2f} and standard deviation {x.std():.2f}, within "
            f"[{x.min():.2f}, {x.max():.2f}]."
        )
    ]


def _range(x: torch.Tensor, info: Any) -> Findings:
    most, whole = float(x.abs().max()), info.dtype.startswith(("uint", "int"))
    if most > 1.01 and (whole or info.range != (-1.0, 1.0)):
        low, high = info.range
        yield Finding.fail(
            f"values reach {most:.3g} though the stored range [{low:g}, {high:g}] stands for [-1, 1]; "
            "correct the range and write the data again."
        )
    elif x.ndim == 4 and x.shape[1] in (1, 3) and 1.01 < most:
        yield Finding.warn(
            f"values reach {most:.3g}; pixels lie within [-1, 1], so give their range when the data is written."
        )
    elif x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[-1] > 4 and float(x.min()) >= 0:
        yield Finding.warn("no value is below 0; pixels fill [-1, 1], so give their range when the data is written.")


def _moments(context: CheckContext, x: torch.Tensor, info: Any) -> Findings:
    mean, std = float(x.mean()), float(x.std())
    if (
        info.std
        and len(x) >= 64
        and (not 0.67 < std / info.std < 1.5 or abs(mean - (info.mean or 0.0)) > 0.5 * info.std)
    ):
        yield Finding.fail(
            f"mean and standard deviation are {mean:.2f} and {std:.2f}, but {info.path or 'the data'} says "
            f"{info.mean:.2f} and {info.std:.2f}; write the data again."
        )
    stated = {"method.sigma_data": getattr(getattr(context.method, "chart", context.method), "sigma_data", None)}
    for role in (*context.method.frozen, *context.method.trainable):
        model = getattr(context.method, role)
        if getattr(model, "prediction", None) == "edm":
            stated[f"roles.{role}.sigma_data"] = model.sigma_data
    size = math.sqrt(mean**2 + std**2)
    for key, value in stated.items():
        if value and not 0.5 < size / value < 2:
            level = "WARN" if 0.25 < size / value < 4 else "FAIL"
            yield Finding(
                level, f"{key}: {value:g} stands for the size of the data, which is {size:.2f}; set it to that."
            )


def _labels(context: CheckContext) -> Findings:
    label, info = context.batch.get("label"), context.experiment.data.info
    roles = (getattr(context.method, r) for r in (*context.method.frozen, *context.method.trainable))
    classes = max((network_of(role).classes for role in roles), default=0)
    if label is None or not info.classes:
        if classes:
            yield Finding.warn(f"the network has {classes} classes but the data no labels: every sample is 'no class'.")
        return
    if bool((label >= info.classes).any()) or bool((label < -1).any()):
        yield Finding.fail(f"labels reach {int(label.max())}, but there are {info.classes} classes, counted from 0.")
    elif len(label) >= 32 and info.classes > 1 and len(label.unique()) == 1:
        yield Finding.fail(
            f"the first {len(label)} labels are all {int(label[0])} though there are {info.classes} classes; "
            "write the labels again, and shuffle."
        )
    elif not classes and not any(
        isinstance(getattr(context.method, r), GaussianMixture) for r in context.method.frozen
    ):
        yield Finding.warn(f"the data has {info.classes} classes and no network takes them; they are not used.")


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
        yield Finding.fail(
            f"data.batch_size: {n} is more than the {count} samples there are; lower it, or give more data."
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
                "(1 + n)/(10 + n) counts."
            )
    for role, optim in method.optim.items():
        if optim.warmup >= steps:
            texts.append(f"optim.{role}.warmup: {optim.warmup} steps are not over when the run is ({steps} steps).")
        if optim.lr == 0:
            texts.append(f"optim.{role}.lr: 0 trains nothing.")
    for key, value in _lengths(method):
        if value >= steps:
            texts.append(
                f"method.{key}: {value} steps, but the run has {steps}; its own loss is never reached in full."
            )
    for key in ("validate_every", "save_every"):
        if train[key] > steps:
            texts.append(f"train.{key}: {train[key]} is never reached in {steps} steps.")
    for key in ("keep_best", "patience"):
        if train[key] and not train.validate_every:
            texts.append(f"train.{key}: nothing is validated on the way; set train.validate_every.")
    if method.grid.steps > 64 and method.role("teacher") is not None:
        texts.append(f"method.grid: {method.grid.steps} steps are many for a few-step student.")
    yield from map(Finding.warn, texts) if texts else [Finding.ok(f"all settings take effect within {steps} steps.")]


def _lengths(method: Any) -> list[tuple[str, int]]:
    """The method's settings that are numbers of steps."""
    names = ("warm_start", "warm_up", "share_steps", "rung_steps", "student_every", "head_turns")
    return [(n, v) for n in names if isinstance(v := getattr(method, n, None), int)]
