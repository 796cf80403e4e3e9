"""`distill data audit`: reads every sample of a set of shards, measures it, and compares it with index and pipeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.data.info import Info
from distill.data.shards import index
from distill.data.shards import sample as samples
from distill.data.shards.dataset import CACHE_MB, WINDOW, Shards
from distill.data.shards.errors import BadSample, ShardError
from distill.data.sources.folder import visible
from distill.errors import BadInput

STD, MEAN = (
    (0.5, 2.0),
    0.5,
)  # range of the standard deviation and bound of the |mean| of latents as networks train on them
FAR = 2.0  # latents beyond these bounds by this factor are an error
LISTED = 20
SORTED = 0.5  # sortedness of the stored labels from which on a stream's batches are short of classes


@dataclass
class SplitReport:
    """Statistics and findings of one split.

    Attributes:
        path, info, count: the split, its `Info`, and its number of samples.
        lines: statistics, as sentences.
        errors, warnings: findings, as sentences.
    """

    path: str
    info: Info
    count: int = 0
    facts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def audit(path: str | Path, pipeline: str | None = None) -> list[SplitReport]:
    """One report for each split (and bucket) at or below `path`.

    Args:
        path: a split, or a folder of splits.
        pipeline: the teacher's diffusers folder to compare with.

    Raises:
        BadInput: there are no shards, or `pipeline` is not a pipeline.
    """
    path = Path(path).expanduser()
    files = visible(path) if path.is_dir() else ()
    splits = sorted({file.parent for file in files if file.name == index.NAME or file.name.endswith(".tar")})
    if not splits and path.is_dir():
        raise BadInput(f"{path} holds no shards: give a split, or a folder of splits.")
    facts = _read_pipeline(pipeline) if pipeline else None
    return [_audit_split(split, facts) for split in splits or [path]]


@dataclass
class _Pipeline:
    path: str
    geometry: Any
    fingerprints: dict[str, str]


def _read_pipeline(path: str) -> _Pipeline:
    from distill.models.diffusers import Geometry, fingerprints

    return _Pipeline(path, Geometry.of(path), fingerprints(path))


def _audit_split(path: Path, pipeline: _Pipeline | None) -> SplitReport:
    shards = index.find(path)
    info, errors = shards.info, shards.errors
    report = SplitReport(str(path), info)
    moments, keys, captions, labels = _Moments(), Counter(), Counter(), _Labels()
    for shard in shards.tars:
        for raw in index.read_tar(shard, errors, beyond=True):
            report.count += 1
            keys[raw["__key__"]] += 1
            try:
                sample = samples.decode(raw, info)
            except BadSample as error:
                errors.append(ShardError(shard.path, raw["__key__"], str(error)))
                continue
            labels.add(sample.label)
            captions[sample.caption] += 1
            if sample.x is not None:
                moments.add(info.to_x(torch.from_numpy(np.array(sample.x))).double().numpy())
    report.errors += [str(error) for error in errors]
    if report.count != shards.stated:
        report.errors.append(f"{report.count} samples where the index says {shards.stated}")
    repeated = [key for key, count in keys.items() if count > 1]
    if repeated:
        report.errors.append(f"{len(repeated)} keys occur more than once, such as {repeated[0]}")
    report.facts += _describe(info, report.count, labels.counts, captions)
    if info.classes and report.count * info.bytes > CACHE_MB * 2**20 and labels.sortedness > SORTED:
        report.warnings.append(
            f"the stored order is sorted by class, and a stream shuffles among {WINDOW} samples at a time, so its "
            "batches hold few classes: write the shards in a random order (`distill data images`, `encode` and `npz` "
            "do), or train with a larger data.window or data.cache_mb"
        )
    _check_null(path, report)
    if moments.count:
        report.facts.append(
            f"x: mean {moments.mean.mean():.3f}, standard deviation {moments.overall:.3f}; by channel mean "
            f"{_row(moments.mean)}, standard deviation {_row(moments.std)}"
        )
    if pipeline:
        _compare(report, moments, pipeline)
    return report


def _describe(info: Info, count: int, labels: Counter, captions: Counter) -> list[str]:
    kind = f"{info.dtype} {info.shape}" if info.samples else f"conditions alone, for samples of {info.shape}"
    facts = [f"{count} samples: {kind}"]
    facts += [f"{name}: {member.dtype} {member.shape}" for name, member in info.members.items()]
    if info.classes:
        names = info.names or range(info.classes)
        counts = ", ".join(f"{names[c]} {labels[c]}" for c in range(min(info.classes, LISTED)))
        facts.append(f"{info.classes} classes: {counts}" + (", ..." if info.classes > LISTED else ""))
    if info.captions:
        facts.append(f"captions: {len(captions)} different ones, {captions['']} empty")
    if info.encoder:
        facts.append("encoded by " + ", ".join(f"{name} {value}" for name, value in info.encoder.items() if value))
    return facts


def _check_null(path: Path, report: SplitReport) -> None:
    info = report.info
    if not info.members:
        return
    try:
        null = Shards(path, 1, cache_mb=0, budget=2**31).null
    except BadInput as error:
        report.errors.append(str(error))
        return
    if null is None:
        report.warnings.append(
            "there is no null condition beside the index; guidance then needs the teacher's own (null: '')"
        )
        return
    framed = info.encoder.get("framed", "").split()  # the first frame stays in the null condition
    for name, member in info.members.items():
        if name in framed:
            continue
        if name not in null or tuple(null[name].shape[1:]) != member.shape:
            shape = tuple(null[name].shape[1:]) if name in null else "nothing"
            report.errors.append(f"the null condition has {shape} for '{name}', but samples {member.shape}")
        elif not torch.isfinite(null[name].float()).all():
            report.errors.append(f"the null condition '{name}' holds NaN or infinite values")


def _compare(report: SplitReport, moments: _Moments, pipeline: _Pipeline) -> None:
    """Compare a split with the pipeline."""
    info, path, geometry = report.info, pipeline.path, pipeline.geometry
    for part, fingerprint in pipeline.fingerprints.items():
        stored = info.encoder.get(part)
        if stored and stored != fingerprint:
            report.errors.append(
                f"encoded by {part} {stored} of {info.encoder.get('pipeline')}, but {path} has {fingerprint}: encode "
                "again by `distill data encode`, or name the pipeline that made these"
            )
    if len(info.shape) != len(geometry.shape) or info.shape[0] != geometry.shape[0]:
        report.errors.append(
            f"samples are {info.shape}, but the network of {path} takes {geometry.shape}: another autoencoder "
            "made them, or none"
        )
    elif info.shape != geometry.shape:
        report.warnings.append(
            f"samples are {info.shape}, the network's default is {geometry.shape}: set roles.teacher.size to "
            f"{list(info.shape[1:])}"
        )
    if geometry.text and not info.members:
        report.errors.append(
            f"there are no text embeddings, which the network of {path} needs: `distill data encode` makes them"
        )
    if moments.count:
        _check_scale(report, moments, bool(info.encoder))


def _check_scale(report: SplitReport, moments: _Moments, encoded: bool) -> None:
    """Compare mean and standard deviation with those of latents; `encoded`: by `distill data encode`."""
    mean, std = float(moments.mean.mean()), moments.overall
    if STD[0] <= std <= STD[1] and abs(mean) <= MEAN:
        report.facts.append("mean and standard deviation are about 0 and 1, as the network expects")
        return
    text = f"mean {mean:.3f} and standard deviation {std:.3f}, where the network expects about 0 and 1"
    far = not STD[0] / FAR <= std <= STD[1] * FAR or abs(mean) > MEAN * FAR
    if far and not encoded:
        report.errors.append(
            f"{text}: the latents lack the autoencoder's scale and shift, x = (a - shift) scale; apply them"
        )
    else:
        report.warnings.append(f"{text}: check the data" + (", its autoencoder and its values' range" if far else ""))


class _Labels:
    """Labels in their stored order, in windows as a stream shuffles them."""

    def __init__(self):
        self.counts, self.window, self.same = Counter(), Counter(), []

    def add(self, label: int | None) -> None:
        """Count a sample."""
        self.counts[label] += 1
        self.window[label] += 1
        if self.window.total() == WINDOW:
            self.same.append(_same(self.window))
            self.window = Counter()

    @property
    def sortedness(self) -> float:
        """(s - p) / (1 - p), where two random samples have one class with probability s in a window and p in all.

        0 is a random order, 1 one class a window; 0 too with fewer than two windows, or one class.
        """
        windows = [*self.same, *([_same(self.window)] if self.window.total() > WINDOW // 2 else [])]
        p = _same(self.counts)
        return 0.0 if len(windows) < 2 or p == 1 else (sum(windows) / len(windows) - p) / (1 - p)


def _same(counts: Counter) -> float:
    """Probability that two different samples have one class."""
    n = counts.total()
    return sum(count * (count - 1) for count in counts.values()) / (n * (n - 1)) if n > 1 else 1.0


class _Moments:
    """Mean and standard deviation by channel (the first axis)."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, x: np.ndarray) -> None:
        """Count a sample."""
        x = x.reshape(len(x), -1) if x.ndim > 1 else x[None]
        self.count += x.shape[1]
        self.total, self.squares = self.total + x.sum(1), self.squares + np.square(x).sum(1)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))

    @property
    def overall(self) -> float:
        """Standard deviation of all values together."""
        return float(np.sqrt(max((self.squares / self.count).mean() - self.mean.mean() ** 2, 0)))


def _row(values: np.ndarray, limit: int = 16) -> str:
    return " ".join(f"{v:.2f}" for v in values[:limit]) + (" ..." if len(values) > limit else "")


def render(reports: list[SplitReport]) -> str:
    """The reports as text."""
    facts = []
    for report in reports:
        facts.append(report.path)
        facts += [f"  {line}" for line in report.facts]
        facts += [f"  WARN  {line}" for line in report.warnings[:LISTED]]
        facts += [f"  WRONG {line}" for line in report.errors[:LISTED]]
        if len(report.errors) > LISTED:
            facts.append(f"  and {len(report.errors) - LISTED} more")
    count, errors = sum(report.count for report in reports), sum(len(report.errors) for report in reports)
    facts.append(f"{count} samples in {len(reports)} splits, {errors or 'nothing'} wrong.")
    return "\n".join(facts)
