"""Which shards a path means, and what their index.json (or, without one, a look through them) says."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from distill.data import sample as samples
from distill.data import tar
from distill.data.damage import Bad, Cut, Damage
from distill.data.info import Info, Member
from distill.errors import BadInput

log = logging.getLogger(__name__)
NAME, FORMAT, VERSION = "index.json", "distill shards", 2
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class Tar:
    """A shard and the number of samples that can be read from it."""

    path: str
    count: int


@dataclass
class Found:
    """The shards of a path: which, what they hold, what is broken."""

    tars: list[Tar] = field(default_factory=list)
    infos: dict[str, Info] = field(default_factory=dict)  # by the index or shard that says so
    damage: list[Damage] = field(default_factory=list)
    stated: int = 0  # samples that should be there


def find(path: str | os.PathLike | list, size: int | None = None) -> tuple[list[Tar], Info, list[Damage], int]:
    """Shards of a split folder, a .tar, a brace or glob pattern, or a list of these.

    Returns:
        The shards, what they hold together, the damage seen from outside, and how many samples there should be.

    Raises:
        BadInput: nothing there, a broken index, or shards that differ in shape, classes or range.
    """
    items = [str(p) for p in path] if isinstance(path, (list, tuple)) else [str(path)]
    where = ", ".join(items)
    found = Found()
    for item in items:
        for folder, names in _expand(item).items():
            _look(Path(folder), names, found)
    tars = [t for t in found.tars if t.count]
    if not found.infos or not tars:
        broken = "; ".join(map(str, found.damage[:5]))
        raise BadInput(f"no readable sample in {where}: {broken}. Write the shards again.")
    info = replace(_agree(found.infos), count=sum(t.count for t in tars), path=where)
    if size is not None and info.dtype != "uint8":
        raise BadInput(f"size={size} resizes images, but {where} holds {info.dtype} arrays: leave size out.")
    return tars, samples.resized(info, size), found.damage, found.stated


def _expand(item: str) -> dict[str, list[str] | None]:
    """Folder -> names of its shards, None for all of them."""
    from braceexpand import UnbalancedBracesError, braceexpand

    if "://" in item or item.startswith("pipe:"):
        raise BadInput(f"{item} is not a path: copy or mount the shards, and give the folder.")
    item = os.path.expanduser(item)
    if os.path.isdir(item):
        return {item: None}
    try:
        names = [] if os.path.exists(item) else list(braceexpand(item))
    except UnbalancedBracesError:
        raise BadInput(f"the pattern {item} has unbalanced braces: close them.") from None
    paths = [p for n in names for p in (sorted(glob.glob(n)) if glob.has_magic(n) else [n])] or [item]
    if not any(map(os.path.exists, paths)):
        raise BadInput(f"{item} does not exist: write shards there by distill.data.write, or correct the path.")
    folders: dict[str, list[str] | None] = {}
    for p in paths:
        folders.setdefault(os.path.dirname(p) or ".", []).append(os.path.basename(p))
    return folders


def _look(folder: Path, names: list[str] | None, found: Found) -> None:
    index = folder / NAME
    info, stated = read(index) if index.is_file() else (None, {})
    names = names if names is not None else list(stated) or _tars(folder)
    known = [n for n in names if n in stated]
    if known:
        found.infos[str(index)] = info
    for name in known:
        _trust(folder / name, *stated[name], found)
    foreign = [n for n in names if n not in stated]
    if foreign:
        log.info("looking through %d shards of %s, for they are in no %s", len(foreign), folder, NAME)
    for name in foreign:
        _survey(str(folder / name), found)


def _tars(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(_TARS))
    if not names:
        splits = sorted(p.parent.name for p in folder.glob(f"*/{NAME}"))
        mend = f"give one of its splits: {', '.join(str(folder / s) for s in splits)}" if splits else (
            "write shards there by distill.data.write, or correct the path"
        )
        raise BadInput(f"{folder} holds no shards: {mend}.")
    return names


def _trust(path: Path, count: int, size: int, found: Found) -> None:
    """A shard by its index; looked through only if its size says that it is not what was written."""
    found.stated += count
    actual = path.stat().st_size if path.is_file() else None
    if actual != size:
        readable, reason = _readable(str(path))
        differs = f"{actual} bytes where the index says {size}" if actual is not None else "missing"
        lost = max(count - readable, 0)
        found.damage.append(Damage(str(path), "", f"{differs}, {readable} of {count} samples readable{reason}", lost))
        count = min(count, readable)
    found.tars.append(Tar(str(path), count))


def _readable(path: str) -> tuple[int, str]:
    count, reason = 0, ""
    try:
        for _ in tar.samples(path):
            count += 1
    except Cut as cut:
        reason = f", {cut}" if os.path.exists(path) else ""
    return count, reason


def _survey(path: str, found: Found) -> None:
    """A shard without index: count it and learn from its first good sample."""
    count, classes, first = 0, 0, None
    try:
        for raw in tar.samples(path):
            count += 1
            first = first or _describe(raw)
            if first and first.classes:
                classes = max(classes, _class(raw) + 1)
        if not count:
            found.damage.append(Damage(path, "", "empty: no samples in it", 0))
    except Cut as cut:
        found.damage.append(Damage(path, "", f"{cut}, {count} samples readable", 0))
    found.tars.append(Tar(path, count))
    found.stated += count
    if first:
        found.infos[path] = replace(first, classes=classes, source="tar files without index")


def _describe(raw: dict) -> Info | None:
    try:
        x, cond = samples.values(raw), samples.named(raw)
    except Bad:
        return None
    low, high = (0.0, 255.0) if x.dtype == "uint8" else (-1.0, 1.0)
    members = {k: Member(v.shape, v.dtype.name) for k, v in cond.items()}
    return Info(x.shape, int("cls" in raw), range=(low, high), dtype=x.dtype.name, captions="txt" in raw, members=members)


def _class(raw: dict) -> int:
    try:
        return samples.label(raw)
    except Bad:
        return -1


def _agree(infos: dict[str, Info]) -> Info:
    """What all say; the number of classes of shards without index is the largest label of any, plus one."""
    (first, info), *others = infos.items()
    for name, other in others:
        for what, differs in {
            "shape": other.shape != info.shape,
            "number of classes": not _same_classes(info, other),
            "range of values": (other.range, other.dtype) != (info.range, info.dtype),
            "presence of captions": other.captions != info.captions,
            "conditions": (other.members, other.samples) != (info.members, info.samples),
            "what encoded them": other.encoder != info.encoder,
        }.items():
            if differs:
                raise BadInput(
                    f"{first} and {name} differ in {what}: {_words(info)} against {_words(other)}. "
                    "Give shards of one set, or write them again together."
                )
    indexed = [i for i in infos.values() if not _foreign(i)]
    measured = len(infos) == 1
    return replace(
        (indexed or [info])[0],
        classes=max(i.classes for i in infos.values()),
        mean=info.mean if measured else None,
        std=info.std if measured else None,
    )


def _foreign(info: Info) -> bool:
    return not info.path


def _same_classes(a: Info, b: Info) -> bool:
    """Equal where an index states it; a shard without index shows a lower bound only."""
    if _foreign(a) and _foreign(b):
        return bool(a.classes) == bool(b.classes)
    low, high = sorted((a, b), key=_foreign, reverse=True)
    return low.classes == high.classes or (_foreign(low) and 0 < low.classes < high.classes)


def _words(info: Info) -> str:
    captions = "captions" if info.captions else "no captions"
    told = "".join(f", {k} {m.dtype} {m.shape}" for k, m in info.members.items())
    made = f", encoded by {info.encoder}" if info.encoder else ""
    return f"{info.classes} classes, {info.dtype} {info.shape} in {info.range}, {captions}{told}{made}"


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
        "members": {k: {"shape": list(m.shape), "dtype": m.dtype} for k, m in info.members.items()},
        "encoder": info.encoder,
        "shards": [{"name": n, "count": c, "bytes": b} for n, c, b in shards],
    }
    staging = folder / f".{NAME}.{os.getpid()}"
    staging.write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(staging, folder / NAME)


def read(path: Path) -> tuple[Info, dict[str, tuple[int, int]]]:
    """Info and name -> (samples, bytes) from an index.json.

    Raises:
        BadInput: not an index of this format, of a later version, or with a shard outside its folder.
    """
    try:
        facts = json.loads(path.read_text())
        if facts["format"] != FORMAT or facts["version"] > VERSION:
            raise BadInput(
                f"{path} is '{facts['format']}' version {facts['version']}, but '{FORMAT}' up to version {VERSION} is "
                "read: write the shards by this release, or install a later one."
            )
        shards = {str(s["name"]): (int(s["count"]), int(s["bytes"])) for s in facts["shards"]}
        info = Info(
            tuple(facts["shape"]), facts["classes"], facts["count"], tuple(facts["class_names"]), tuple(facts["range"]),
            facts["mean"], facts["std"], facts["dtype"], facts["captions"], facts["source"], str(path),
            {k: Member(tuple(m["shape"]), m["dtype"]) for k, m in facts.get("members", {}).items()},
            facts.get("samples", True), facts.get("encoder", {}),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise BadInput(f"{path} {what}; write the shards again, or delete it to have them looked through.") from None
    outside = [n for n in shards if os.path.basename(n) != n]
    if outside:
        raise BadInput(f"{path} names '{outside[0]}', which is not in its folder: name shards in the folder only.")
    return info, shards


def read_tar(shard: Tar, damage: list[Damage]) -> Iterator[dict]:
    """Raw samples of one shard, at most the counted ones; what cannot be read is added to `damage`."""
    count = 0
    try:
        for raw in tar.samples(shard.path):
            if count == shard.count:
                return
            count += 1
            yield raw
        reason = "ends early"
    except Cut as cut:
        reason = str(cut)
    if count < shard.count:
        damage.append(Damage(shard.path, "", f"{reason}, {count} of {shard.count} samples", shard.count - count))
