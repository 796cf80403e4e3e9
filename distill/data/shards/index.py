"""index.json of a folder of shards, and the shards that a path or pattern names."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from distill.data.info import Info, Member
from distill.data.shards import sample as samples
from distill.data.shards import tar
from distill.data.shards.errors import BadSample, ShardError, UnreadableShard
from distill.errors import BadInput, near_path
from distill.files import write_json

log = logging.getLogger(__name__)
NAME, FORMAT, VERSION = "index.json", "distill shards", 2
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class Tar:
    """A shard and the number of samples that can be read from it."""

    path: str
    count: int


@dataclass
class ShardSet:
    """The shards of a path.

    Attributes:
        tars: shards with at least one readable sample.
        info: facts about all of them.
        errors: damage that is found without decoding samples.
        stated: number of samples according to the indexes.
    """

    tars: list[Tar]
    info: Info
    errors: list[ShardError]
    stated: int


@dataclass
class _Survey:
    """The parts of a `ShardSet` while it is collected; `infos` are keyed by the index or shard they come from."""

    tars: list[Tar] = field(default_factory=list)
    infos: dict[str, Info] = field(default_factory=dict)
    errors: list[ShardError] = field(default_factory=list)
    stated: int = 0


def find(path: str | os.PathLike | list, size: int | None = None) -> ShardSet:
    """The shards of a split folder, a .tar, a brace or glob pattern, or a list of these.

    Args:
        path: as above.
        size: images are resized to this many pixels a side; None keeps theirs.

    Raises:
        BadInput: no shards, a broken index, or shards that differ in shape, classes or range.
    """
    items = [str(p) for p in path] if isinstance(path, (list, tuple)) else [str(path)]
    where = ", ".join(items)
    survey = _Survey()
    for item in items:
        for folder, names in _expand(item).items():
            _look(Path(folder), names, survey)
    tars = [t for t in survey.tars if t.count]
    if not survey.infos or not tars:
        reasons = "; ".join(map(str, survey.errors[:5]))
        raise BadInput(f"no readable sample in {where}: {reasons}. Write the shards again.")
    info = replace(_merge(survey.infos), count=sum(t.count for t in tars), path=where)
    if size is not None and info.dtype != "uint8":
        raise BadInput(f"size={size} resizes images, but {where} holds {info.dtype} arrays: leave size out.")
    return ShardSet(tars, samples.resized(info, size), survey.errors, survey.stated)


def _expand(item: str) -> dict[str, list[str] | None]:
    """Folder -> names of its shards, None for all of them."""
    from braceexpand import UnbalancedBracesError, braceexpand

    if "://" in item or item.startswith("pipe:"):
        raise BadInput(f"{item} is not a path: copy or mount the shards, and give the folder.")
    item = os.path.expanduser(item)
    if os.path.isdir(item):
        return {item: None}
    try:
        patterns = [] if os.path.exists(item) else list(braceexpand(item))
    except UnbalancedBracesError:
        raise BadInput(f"the pattern {item} has unbalanced braces: close them.") from None
    paths: list[str] = []
    for pattern in patterns:
        paths += sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    paths = paths or [item]
    if not any(map(os.path.exists, paths)):
        raise BadInput(
            f"{item} does not exist: write shards there by `distill data`, or correct the path.{near_path(item)}"
        )
    folders: dict[str, list[str] | None] = {}
    for path in paths:
        folders.setdefault(os.path.dirname(path) or ".", []).append(os.path.basename(path))
    return folders


def _look(folder: Path, names: list[str] | None, survey: _Survey) -> None:
    index = folder / NAME
    info, stated = read(index) if index.is_file() else (None, {})
    names = names if names is not None else list(stated) or _shard_names(folder)
    indexed = [name for name in names if name in stated]
    if indexed:
        survey.infos[str(index)] = info
    for name in indexed:
        _add_indexed(folder / name, *stated[name], survey)
    foreign = [name for name in names if name not in stated]
    if foreign:
        log.info("reading %d shards of %s that are in no %s", len(foreign), folder, NAME)
    for name in foreign:
        _add_foreign(str(folder / name), survey)


def _shard_names(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIXES) and not p.name.startswith("."))
    if names:
        return names
    splits = sorted(str(p.parent) for p in folder.glob(f"*/{NAME}"))
    mend = "write shards there by `distill data`, or correct the path"
    if splits:
        mend = f"give one of its splits: {', '.join(splits)}"
    raise BadInput(f"{folder} holds no shards: {mend}.")


def _add_indexed(path: Path, count: int, size: int, survey: _Survey) -> None:
    """Take a shard's count from the index; read the shard only if its size differs from the index."""
    survey.stated += count
    actual = path.stat().st_size if path.is_file() else None
    if actual != size:
        readable, reason = _readable(str(path))
        differs = f"{actual} bytes where the index says {size}" if actual is not None else "missing"
        reason = f"{differs}, {readable} of {count} samples readable{reason}"
        survey.errors.append(ShardError(str(path), "", reason, max(count - readable, 0)))
        count = min(count, readable)
    survey.tars.append(Tar(str(path), count))


def _readable(path: str) -> tuple[int, str]:
    """Number of readable samples, and why there are no more."""
    count, reason = 0, ""
    try:
        for _ in tar.samples(path):
            count += 1
    except UnreadableShard as error:
        reason = f", {error}" if os.path.exists(path) else ""
    return count, reason


def _add_foreign(path: str, survey: _Survey) -> None:
    """Read a shard without index: count its samples, and describe it by its first good one."""
    count, classes, first = 0, 0, None
    try:
        for raw in tar.samples(path):
            count += 1
            first = first or _describe(raw)
            if first and first.classes:
                classes = max(classes, _class_of(raw) + 1)
        if not count:
            survey.errors.append(ShardError(path, "", "empty: no samples in it", 0))
    except UnreadableShard as error:
        survey.errors.append(ShardError(path, "", f"{error}, {count} samples readable", 0))
    survey.tars.append(Tar(path, count))
    survey.stated += count
    if first:
        survey.infos[path] = replace(first, classes=classes, source="tar files without index")


def _describe(raw: dict) -> Info | None:
    try:
        x, cond = samples.values(raw), samples.conditions(raw)
    except BadSample:
        return None
    low_high = (0.0, 255.0) if x.dtype == "uint8" else (-1.0, 1.0)
    members = {name: Member(value.shape, value.dtype.name) for name, value in cond.items()}
    has_classes = int("cls" in raw)
    return Info(x.shape, has_classes, range=low_high, dtype=x.dtype.name, captions="txt" in raw, members=members)


def _class_of(raw: dict) -> int:
    try:
        return samples.label(raw)
    except BadSample:
        return -1


def _merge(infos: dict[str, Info]) -> Info:
    """The common Info. The number of classes of shards without index is the largest label plus one."""
    (first, info), *others = infos.items()
    for name, other in others:
        differs = {
            "shape": other.shape != info.shape,
            "number of classes": not _same_classes(info, other),
            "range of values": (other.range, other.dtype) != (info.range, info.dtype),
            "presence of captions": other.captions != info.captions,
            "conditions": (other.members, other.samples) != (info.members, info.samples),
            "what encoded them": other.encoder != info.encoder,
        }
        for fact in (fact for fact, different in differs.items() if different):
            raise BadInput(
                f"{first} and {name} differ in {fact}: {_describe_info(info)} against {_describe_info(other)}. "
                "Give shards of one set, or write them again together."
            )
    indexed = [i for i in infos.values() if not _is_foreign(i)]
    measured = len(infos) == 1
    return replace(
        (indexed or [info])[0],
        classes=max(i.classes for i in infos.values()),
        mean=info.mean if measured else None,
        std=info.std if measured else None,
    )


def _is_foreign(info: Info) -> bool:
    return not info.path


def _same_classes(a: Info, b: Info) -> bool:
    """Whether numbers of classes agree: equal for indexes; a shard without index gives a lower bound."""
    if _is_foreign(a) and _is_foreign(b):
        return bool(a.classes) == bool(b.classes)
    low, high = sorted((a, b), key=_is_foreign, reverse=True)
    return low.classes == high.classes or (_is_foreign(low) and 0 < low.classes < high.classes)


def _describe_info(info: Info) -> str:
    captions = "captions" if info.captions else "no captions"
    conditions = "".join(f", {name} {m.dtype} {m.shape}" for name, m in info.members.items())
    encoder = f", encoded by {info.encoder}" if info.encoder else ""
    return f"{info.classes} classes, {info.dtype} {info.shape} in {info.range}, {captions}{conditions}{encoder}"


def write(folder: Path, info: Info, shards: list[tuple[str, int, int]]) -> None:
    """Write index.json for (name, samples, bytes) of every shard."""
    facts = {
        "format": FORMAT,
        "version": VERSION if info.members or not info.samples else 1,
        "source": info.source,
        "count": info.count,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "range": list(info.range),
        "mean": info.mean,
        "std": info.std,
        "classes": info.classes,
        "class_names": list(info.names),
        "captions": info.captions,
        "samples": info.samples,
        "members": {name: {"shape": list(m.shape), "dtype": m.dtype} for name, m in info.members.items()},
        "encoder": info.encoder,
        "shards": [{"name": name, "count": count, "bytes": size} for name, count, size in shards],
    }
    write_json(folder / NAME, facts, indent=1)


def read(path: Path) -> tuple[Info, dict[str, tuple[int, int]]]:
    """Info and name -> (samples, bytes) from an index.json.

    Raises:
        BadInput: not an index of this format, of a later version, or with a shard outside its folder.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
        if facts["format"] != FORMAT or facts["version"] > VERSION:
            raise BadInput(
                f"{path} is '{facts['format']}' version {facts['version']}, but '{FORMAT}' up to version {VERSION} is "
                "read: write the shards by this release, or install a later one."
            )
        shards = {str(s["name"]): (int(s["count"]), int(s["bytes"])) for s in facts["shards"]}
        info = _parse(facts, str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise BadInput(
            f"{path} {reason}; write the shards again, or delete it to have the shards read at every start."
        ) from None
    outside = [name for name in shards if os.path.basename(name) != name]
    if outside:
        raise BadInput(f"{path} names '{outside[0]}', which is not in its folder: name shards in the folder only.")
    return info, shards


def _parse(facts: dict, path: str) -> Info:
    members = facts.get("members", {})
    return Info(
        shape=tuple(facts["shape"]),
        classes=facts["classes"],
        count=facts["count"],
        names=tuple(facts["class_names"]),
        range=tuple(facts["range"]),
        mean=facts["mean"],
        std=facts["std"],
        dtype=facts["dtype"],
        captions=facts["captions"],
        source=facts["source"],
        path=path,
        members={name: Member(tuple(m["shape"]), m["dtype"]) for name, m in members.items()},
        samples=facts.get("samples", True),
        encoder=facts.get("encoder", {}),
    )


def read_tar(shard: Tar, errors: list[ShardError], beyond: bool = False) -> Iterator[dict]:
    """Raw samples of one shard; appends to `errors` if there are fewer than `shard.count`.

    Args:
        shard: what to read.
        errors: is appended to.
        beyond: also read samples after the first `shard.count`.
    """
    count = 0
    try:
        for raw in tar.samples(shard.path):
            if count == shard.count and not beyond:
                return
            count += 1
            yield raw
        reason = "ends early"
    except UnreadableShard as error:
        reason = str(error)
    if count < shard.count:
        lost = shard.count - count
        errors.append(ShardError(shard.path, "", f"{reason}, {count} of {shard.count} samples", lost))
