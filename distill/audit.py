"""`distill data audit`: every sample of a set of shards read, counted, measured, and compared with what it is said to be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.data import index
from distill.data import sample as samples
from distill.data.damage import Bad, Damage
from distill.data.info import Info
from distill.data.shards import Shards
from distill.errors import BadInput

STD, MEAN, FAR = (0.5, 2.0), 0.5, 2.0  # of latents as networks train on them; beyond them by this factor they cannot be
NAMED = 20


@dataclass
class Found:
    """What one split holds; `wrong` and `odd` are sentences."""

    path: str
    info: Info
    count: int = 0
    lines: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)


def audit(path: str | Path, pipeline: str | None = None) -> list[Found]:
    """One report a split (and bucket) at or below `path`.

    Raises:
        BadInput: there are no shards, or the pipeline is none.
    """
    path = Path(path).expanduser()
    splits = sorted({p.parent for p in path.rglob("*") if p.name == index.NAME or p.name.endswith(".tar")
                     if not any(q.startswith(".") for q in p.relative_to(path).parts)})
    if not splits and path.is_dir():
        raise BadInput(f"{path} holds no shards: give a split, or a folder of splits.")
    facts = _pipeline(pipeline) if pipeline else None
    return [_split(split, facts) for split in splits or [path]]


def _pipeline(path: str) -> tuple[str, Any, dict[str, str]]:
    from distill.nets.diffusers import Geometry, fingerprints

    return path, Geometry.of(path), fingerprints(path)


def _split(path: Path, pipeline: tuple | None) -> Found:
    tars, info, damage, stated = index.find(path)
    found = Found(str(path), info)
    sums, keys, labels, captions = _Moments(), Counter(), Counter(), Counter()
    for shard in tars:
        for raw in index.read_tar(replace(shard, count=2**62), more := []):
            found.count += 1
            keys[raw["__key__"]] += 1
            try:
                row = samples.decode(raw, info)
            except Bad as bad:
                damage.append(Damage(shard.path, raw["__key__"], str(bad)))
                continue
            labels[row.label] += 1
            captions[row.caption] += 1
            if row.x is not None:
                sums.take(info.to_x(torch.from_numpy(np.array(row.x))).double().numpy())
        damage += [d for d in more if "ends early" not in d.reason]
    found.wrong += [str(d) for d in damage]
    if found.count != stated:
        found.wrong.append(f"{found.count} samples where the index says {stated}")
    twice = [k for k, n in keys.items() if n > 1]
    if twice:
        found.wrong.append(f"{len(twice)} keys occur more than once, such as {twice[0]}")
    found.lines += _counts(info, found.count, labels, captions)
    _null(path, info, found)
    if sums.count:
        found.lines.append(f"x: mean {sums.mean.mean():.3f}, standard deviation {sums.overall:.3f}; by channel mean "
                           f"{_row(sums.mean)}, standard deviation {_row(sums.std)}")
    if pipeline:
        _against(found, sums, *pipeline)
    return found


def _counts(info: Info, count: int, labels: Counter, captions: Counter) -> list[str]:
    what = f"{info.dtype} {info.shape}" if info.samples else f"conditions alone, for samples of {info.shape}"
    lines = [f"{count} samples: {what}"]
    lines += [f"{name}: {m.dtype} {m.shape}" for name, m in info.members.items()]
    if info.classes:
        some = ", ".join(f"{info.names[c] if info.names else c} {labels[c]}" for c in range(min(info.classes, NAMED)))
        lines.append(f"{info.classes} classes: {some}" + (", ..." if info.classes > NAMED else ""))
    if info.captions:
        empty = captions[""]
        lines.append(f"captions: {len(captions)} different ones, {empty} empty")
    if info.encoder:
        lines.append("encoded by " + ", ".join(f"{k} {v}" for k, v in info.encoder.items() if v))
    return lines


def _null(path: Path, info: Info, found: Found) -> None:
    if not info.members:
        return
    try:
        null = Shards(path, 1, cache_mb=0, budget=2**31).null
    except BadInput as error:
        found.wrong.append(str(error))
        return
    if null is None:
        found.odd.append("there is no null condition beside the index; guidance then needs the teacher's own (null: '')")
        return
    stays = info.encoder.get("framed", "").split()  # a first frame is not dropped with the prompt
    for name, member in ((n, m) for n, m in info.members.items() if n not in stays):
        if name not in null or tuple(null[name].shape[1:]) != member.shape:
            has = tuple(null[name].shape[1:]) if name in null else "nothing"
            found.wrong.append(f"the null condition has {has} for '{name}', but samples {member.shape}")
        elif not torch.isfinite(null[name].float()).all():
            found.wrong.append(f"the null condition '{name}' holds NaN or infinite values")


def _against(found: Found, sums: _Moments, path: str, geometry: Any, prints: dict[str, str]) -> None:
    """Compare with what the pipeline is and expects."""
    info = found.info
    for part, own in prints.items():
        stored = info.encoder.get(part)
        if stored and stored != own:
            found.wrong.append(f"encoded by {part} {stored} of {info.encoder.get('pipeline')}, but {path} has {own}: encode "
                               "again by `distill data encode`, or name the pipeline that made these")
    if len(info.shape) != len(geometry.shape) or info.shape[0] != geometry.shape[0]:
        found.wrong.append(f"samples are {info.shape}, but the network of {path} takes {geometry.shape}: another autoencoder "
                           "made them, or none")
    elif info.shape != geometry.shape:
        found.odd.append(f"samples are {info.shape}, the network's default is {geometry.shape}: set roles.teacher.size to "
                         f"{list(info.shape[1:])}")
    if geometry.text and not info.members:
        found.wrong.append(f"there are no text embeddings, which the network of {path} is told: `distill data encode` makes them")
    if sums.count:
        _spread(found, sums, bool(info.encoder))


def _spread(found: Found, sums: _Moments, ours: bool) -> None:
    mean, std = float(sums.mean.mean()), sums.overall
    if STD[0] <= std <= STD[1] and abs(mean) <= MEAN:
        found.lines.append("the network expects a mean of about 0 and a standard deviation of about 1: so it is")
        return
    text = f"mean {mean:.3f} and standard deviation {std:.3f}, where the network expects about 0 and 1"
    far = not STD[0] / FAR <= std <= STD[1] * FAR or abs(mean) > MEAN * FAR
    if far and not ours:
        found.wrong.append(f"{text}: the latents lack the autoencoder's scale and shift, x = (a - shift) scale; apply them")
    else:
        found.odd.append(f"{text}: look at the data" + (", its autoencoder and its values' range" if far else ""))


class _Moments:
    """Mean and standard deviation by channel (the first axis)."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def take(self, x: np.ndarray) -> None:
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
        """Of all values together."""
        return float(np.sqrt(max((self.squares / self.count).mean() - self.mean.mean() ** 2, 0)))


def _row(values: np.ndarray, most: int = 16) -> str:
    return " ".join(f"{v:.2f}" for v in values[:most]) + (" ..." if len(values) > most else "")


def words(found: list[Found]) -> str:
    """The report."""
    out = []
    for split in found:
        out.append(split.path)
        out += [f"  {line}" for line in split.lines]
        out += [f"  WARN  {line}" for line in split.odd[:NAMED]]
        out += [f"  WRONG {line}" for line in split.wrong[:NAMED]]
        if len(split.wrong) > NAMED:
            out.append(f"  and {len(split.wrong) - NAMED} more")
    total, wrong = sum(f.count for f in found), sum(len(f.wrong) for f in found)
    out.append(f"{total} samples in {len(found)} splits, {wrong or 'nothing'} wrong.")
    return "\n".join(out)
