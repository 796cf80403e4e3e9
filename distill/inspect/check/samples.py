"""The data alone: values, range, spread, repetition, labels and conditions of the first samples, and their order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distill.denoise import GaussianMixture, network_of
from distill.inspect.check.base import CheckContext, Finding, Findings
from distill.methods import MMD

FEW = 0.1  # share of the samples read that differ, below which samples repeat
NARROW = 0.01  # value of the widest kernel at the usual distance between samples, below which it is too narrow
BLANK = 0.05  # share of samples without any contrast that is suspicious


def data(context: CheckContext) -> Findings:
    """Values, range, spread, repetition, labels and conditions of the first samples."""
    info, findings = context.experiment.data.info, [*_labels(context), *_conditions(context), *_order(context)]
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
    findings += [*_repeated(x, context.experiment.data), *_range(x, info), *_moments(context, x, info)]
    if mend := narrow_kernel(context):
        findings.append(Finding.fail(mend))
    yield from findings or [
        Finding.ok(
            f"{len(x)} samples of mean {x.mean():.2f} and standard deviation {x.std():.2f}, within "
            f"[{x.min():.2f}, {x.max():.2f}]."
        )
    ]


def _repeated(x: Tensor, data: Any) -> Findings:
    """Samples that are blank, and samples or whole batches that come again and again."""
    flat = x.flatten(1)
    blank = int((flat.amax(1) - flat.amin(1) == 0).sum()) if flat.shape[1] > 4 else 0
    expected = min(len(x), data.info.count or len(x))
    different = len({hash(row.cpu().numpy().tobytes()) for row in flat})
    size = data.batch_size
    if flat.shape[1] > 1 and different == 1 and float(flat.std(1).max()) == 0 and len(x) > 1:
        yield Finding.fail(f"the first {len(x)} samples are all the same, and blank; look at how the data was written.")
    elif blank > BLANK * len(x):
        yield Finding.warn(
            f"{blank} of the first {len(x)} samples are blank: all their values are equal; remove them, and look at how the "
            "data was written."
        )
    elif expected > size >= different and len(x) >= 2 * size and torch.equal(flat[:size], flat[size : 2 * size]):
        yield Finding.fail(
            f"the data loader repeats its first batch of {size} samples; let it continue with the next batch at each step."
        )
    elif len(x) > 1 and different == 1:
        yield Finding.warn(
            f"the first {len(x)} samples are all the same, which is right only for a test on one sample; otherwise look at how "
            "the data was written."
        )
    elif different < FEW * expected:
        yield Finding.warn(
            f"only {different} of the first {len(x)} samples differ, which is right only for a test on few samples; otherwise "
            "look at how the data was written."
        )


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


@torch.no_grad()
def narrow_kernel(context: CheckContext) -> str:
    """What to do about RBF kernels that vanish at the distances between samples; "" where they do not."""
    method = context.method
    if not isinstance(method, MMD) or method.kernel != "rbf" or not context.readable or len(context.x) < 2:
        return ""
    features = method.features(context.x[:64]).flatten(1).double()
    away = torch.cdist(features, features)[~torch.eye(len(features), dtype=torch.bool, device=features.device)]
    typical, widest = float(away.median()) / math.sqrt(features.shape[1]), max(method.bandwidths)
    if math.exp(-((typical / widest) ** 2) / 2) >= NARROW:
        return ""
    fitting = ", ".join(f"{share * typical:.2g}" for share in (0.125, 0.25, 0.5, 1))
    return (
        f"method.bandwidths: the widest kernel, {widest:g}, vanishes at the usual distance between samples, {typical:.2g}, so "
        f"samples feel no pull; set them to about [{fitting}]."
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
    elif _one_class(context):
        yield Finding.warn(
            f"the first {len(label)} labels are all {int(label[0])} though there are {info.classes} classes, which is right "
            "for samples of that class only; otherwise write the labels again."
        )
    elif not classes and not any(
        isinstance(getattr(context.method, r), GaussianMixture) for r in context.method.frozen
    ):
        yield Finding.warn(f"the data has {info.classes} classes and no network takes them; they are not used.")


def _one_class(context: CheckContext) -> bool:
    label = context.batch["label"]
    several = context.experiment.data.info.classes > 1 and len(label) >= 32
    return several and len(label.unique()) == 1 and int(label[0]) >= 0


def _order(context: CheckContext) -> Findings:
    """Whether neighbours in the order of the loader share their class more often than samples far apart do."""
    label, source = context.batch.get("label"), context.experiment.data
    count, size = source.info.count, source.batch_size
    if label is None or len(label) < 32 or source.info.classes < 2 or count < 2 * len(label) or bool((label < 0).all()):
        return
    neighbours = float((label[1:] == label[:-1]).float().mean())
    if neighbours < 0.5:
        return
    far = torch.cat([_batch_at(source, int(share * count) // size)["label"] for share in (0.25, 0.5, 0.75)])
    apart = float((label[:, None].cpu() == far[None].cpu()).float().mean())
    if apart < 0.6 * neighbours:
        unshuffled = not getattr(source, "shuffle", True)
        mend = (
            "set data.shuffle: true"
            if unshuffled
            else "write the shards again in random order, or raise data.cache_mb or data.window beyond a class"
        )
        yield Finding.fail(
            f"samples come sorted by class: {neighbours:.0%} of neighbours share their class, and {apart:.0%} of samples "
            f"far apart, so a batch shows few classes; {mend}."
        )


def _batch_at(source: Any, start: int) -> dict[str, Tensor]:
    batches = source.loader(0, 1, start)
    try:
        return next(iter(batches))
    finally:
        if hasattr(batches, "close"):
            batches.close()  # ends the workers of a streamed split


def _conditions(context: CheckContext) -> Findings:
    """Conditions other than labels: finite, and not the same for all samples."""
    for name, value in context.cond.items():
        if not value.is_floating_point():
            continue
        bad = int((~torch.isfinite(value)).flatten(1).any(1).sum())
        if bad:
            yield Finding.fail(
                f"'{name}' of {bad} of the first {len(value)} samples holds NaN or infinity; encode the data again, in "
                "bfloat16 or float32 if it was encoded in float16."
            )
        elif len(value) >= 8 and bool((value == value[:1]).all()):
            zero = "zero" if not bool(value.any()) else "the same"
            yield Finding.warn(
                f"'{name}' is {zero} in all of the first {len(value)} samples, so nothing can be learnt of it; look at the "
                "captions, and encode the data again."
            )
