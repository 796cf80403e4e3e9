"""Shards written one by one, by several processes and in several runs, that become one folder at the end.

The unfinished folder lies beside OUT as `.OUT.unfinished`. A shard is written under another name, locked while it is,
and renamed when it is whole; a note of what it holds makes it count. Whoever finishes the last shard writes the indexes
and renames the folder, so a process may be killed at any time: the same command goes on with the shards that lack.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from distill.data import array, index
from distill.data.info import Info, Member
from distill.data.pack import measured
from distill.data.shards import NULL
from distill.errors import BadInput

PLAN, ABOUT, SKIPPED, _NOTES, _TEMPORARY = "plan.json", "encoding.json", "skipped.txt", "notes", "temporary"


@dataclass
class Row:
    """One sample to store; `skipped` is the reason why there is none."""

    key: str
    x: np.ndarray | None = None
    cond: dict[str, np.ndarray] = field(default_factory=dict)
    label: int | None = None
    caption: str | None = None
    skipped: str = ""


@dataclass
class Note:
    """What a finished shard holds."""

    count: int = 0
    bytes: int = 0
    x: Member | None = None
    members: dict[str, Member] = field(default_factory=dict)
    total: float = 0.0
    squares: float = 0.0
    size: int = 0
    skipped: list[str] = field(default_factory=list)

    def take(self, row: Row) -> None:
        """Count a sample.

        Raises:
            BadInput: its tensors are not of the shapes and types of those before.
        """
        members = {k: Member(v.shape, v.dtype.name) for k, v in row.cond.items()}
        x = None if row.x is None else Member(row.x.shape, row.x.dtype.name)
        if self.count and (x, members) != (self.x, self.members):
            raise BadInput(f"sample {row.key} holds {x} and {members}, those before {self.x} and {self.members}: "
                           "give data of one shape.")
        self.x, self.members, self.count = x, members, self.count + 1
        if row.x is not None:
            wide = row.x.astype(np.float64)
            self.total += float(wide.sum())
            self.squares += float(np.square(wide).sum())
            self.size += wide.size

    @classmethod
    def read(cls, path: Path) -> Note:
        facts = json.loads(path.read_text())
        member = lambda m: Member(tuple(m["shape"]), m["dtype"])
        facts["x"] = facts["x"] and member(facts["x"])
        return cls(**facts | {"members": {k: member(m) for k, m in facts["members"].items()}})


class Parts:
    """The shards of OUT while they are made.

    Args:
        out: the folder to make.
        about: what decides every byte of it: source, settings, fingerprints. Plain JSON.

    Attributes:
        whole: OUT is there already and was made with the same `about`.
        plan: as `begin` was given it, or None; its jobs are one a shard, each with its folder `at` (below OUT) and its
            `number` there.

    Raises:
        BadInput: OUT exists and is something else, or was begun with another `about`.
    """

    def __init__(self, out: Path, about: dict[str, Any]):
        self.out, self.about, self.plan = out, json.loads(json.dumps(about)), None
        self.stage = out.parent / f".{out.name}.unfinished"
        self.whole = self._whole()
        if not self.whole and (self.stage / PLAN).is_file():
            self._plan()

    @property
    def jobs(self) -> list[dict[str, Any]]:
        return self.plan["jobs"]

    def begin(self, plan: dict[str, Any]) -> None:
        """Keep the plan; of several processes that begin together the first one's stays."""
        with disk(self.out):
            (self.stage / _TEMPORARY).mkdir(parents=True, exist_ok=True)
            (self.stage / _NOTES).mkdir(exist_ok=True)
            own = self.stage / _TEMPORARY / f"plan-{os.uname().nodename}-{os.getpid()}"
            own.write_text(json.dumps({"about": self.about, "plan": plan}))
            try:
                os.link(own, self.stage / PLAN)  # fails where there is one
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not (self.stage / PLAN).exists():
                    os.replace(own, self.stage / PLAN)
            own.unlink(missing_ok=True)
        self._plan()

    def _plan(self) -> None:
        kept = json.loads((self.stage / PLAN).read_text())
        self._same(kept["about"], f"{self.stage} holds an unfinished {self.out.name} that was begun with", "remove it")
        self.plan = kept["plan"]

    def _whole(self) -> bool:
        if not os.path.lexists(self.out):
            return False
        if not (self.out / ABOUT).is_file():
            raise BadInput(f"{self.out} exists already and is never overwritten: give another folder, or remove it first.")
        self._same(json.loads((self.out / ABOUT).read_text()), f"{self.out} exists already and was made with",
                   "another folder, or remove it first")
        shutil.rmtree(self.out / _NOTES, ignore_errors=True)  # of a run that was killed after its very last step
        return True

    def _same(self, before: dict[str, Any], where: str, mend: str) -> None:
        for key in {**before, **self.about}:
            if before.get(key) != self.about.get(key):
                raise BadInput(f"{where} {key} = {before.get(key)}, not {self.about.get(key)}: give the same, or {mend}.")

    # -- one shard -----------------------------------------------------------------------------------------------

    def done(self, job: dict[str, Any]) -> bool:
        """Whether a shard is whole."""
        note, path = self._note(job), self.stage / job["at"] / name(job)
        return note.is_file() and (not (count := Note.read(note)).count or
                                   path.is_file() and path.stat().st_size == count.bytes)

    def write(self, job: dict[str, Any], rows: Iterable[Row]) -> Note:
        """One shard of these samples, or nothing of it.

        Raises:
            BadInput: another process is at it, samples of several shapes, or the disk refuses.
        """
        import webdataset

        note, path = Note(), self.stage / job["at"] / name(job)
        with disk(self.out), self._temporary(job) as file:
            writer = webdataset.TarWriter(file, encoder=False, mtime=0)
            for row in rows:
                if row.skipped:
                    note.skipped.append(f"{row.key}: {row.skipped}")
                    continue
                note.take(row)
                writer.write(_members(row))
            writer.close()
            file.flush()
            note.bytes = file.tell()
            path.parent.mkdir(parents=True, exist_ok=True)
            if note.count:
                os.replace(file.name, path)
            self._note(job).with_suffix(".writing").write_text(json.dumps(asdict(note)))
            os.replace(self._note(job).with_suffix(".writing"), self._note(job))
        return note

    @contextlib.contextmanager
    def _temporary(self, job: dict[str, Any]) -> Iterator[BinaryIO]:
        with open(self.stage / _TEMPORARY / f"{_flat(job)}.tar", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"another process is writing shard {name(job)} of {self.out}: let it finish.") from None
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            yield file

    def _note(self, job: dict[str, Any]) -> Path:
        return self.stage / _NOTES / f"{_flat(job)}.json"

    def keep_null(self, null: dict[str, Tensor]) -> None:
        """Keep the null condition, which will lie beside every index."""
        from safetensors.torch import save_file

        own = self.stage / _NOTES / f"{NULL}.{os.uname().nodename}.{os.getpid()}"
        with disk(self.out):
            save_file({k: v.contiguous() for k, v in null.items()}, own)
            os.replace(own, self.stage / _NOTES / NULL)

    # -- all of them ---------------------------------------------------------------------------------------------

    def left(self) -> int:
        """Shards still to be written."""
        return sum(not self.done(job) for job in self.jobs)

    def finish(self, info: Info) -> dict[str, Info] | None:
        """Write the indexes, rename, and return what was written, by folder; None while shards are left.

        Several processes may come here at once.

        Args:
            info: classes, names, captions, source, encoder; for conditions alone also the shape. The rest is measured.
        """
        try:
            return self._finish(info)
        except FileNotFoundError:  # another process has renamed the folder
            if self.out.is_dir():
                return None
            raise

    def _finish(self, info: Info) -> dict[str, Info] | None:
        if self.left():
            return None
        written, skipped = {}, []
        with disk(self.out):
            for at in sorted({job["at"] for job in self.jobs}):
                jobs = [job for job in self.jobs if job["at"] == at]
                notes = {name(job): Note.read(self._note(job)) for job in jobs}
                skipped += [f"{at} {line}" for note in notes.values() for line in note.skipped]
                full = {n: note for n, note in notes.items() if note.count}
                if full:
                    written[at] = self._index(at, info, full)
            if not written:
                raise BadInput(f"{self.stage} holds no sample, all were skipped: {skipped[0]}.")
            if skipped:
                (self.stage / SKIPPED).write_text("\n".join(skipped) + "\n")
            (self.stage / ABOUT).write_text(json.dumps(self.about, indent=1) + "\n")
            shutil.rmtree(self.stage / _TEMPORARY, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                (self.stage / PLAN).unlink()
            self.stage.rename(self.out)
            shutil.rmtree(self.out / _NOTES, ignore_errors=True)
        return written

    def _index(self, at: str, info: Info, notes: dict[str, Note]) -> Info:
        first, *others = notes.values()
        for n, other in zip([*notes][1:], others):
            if (other.x, other.members) != (first.x, first.members):
                raise BadInput(f"shard {n} of {self.stage / at} holds {other.x} and {other.members}, but others {first.x} "
                               f"and {first.members}: give data of one shape, or sort it by --buckets.")
        count = sum(note.count for note in notes.values())
        info = replace(info, members=first.members, samples=first.x is not None, count=count, path=str(self.out / at))
        if first.x:
            total, squares, size = (sum(getattr(n, k) for n in notes.values()) for k in ("total", "squares", "size"))
            info = measured(replace(info, shape=first.x.shape, dtype=first.x.dtype), total / size, squares / size)
        if (null := self.stage / _NOTES / NULL).is_file():
            shutil.copyfile(null, own := self.stage / at / f".{NULL}.{os.getpid()}")
            os.replace(own, self.stage / at / NULL)
        index.write(self.stage / at, info, [(n, note.count, note.bytes) for n, note in notes.items()])
        return info


def name(job: dict[str, Any]) -> str:
    """File name of a job's shard."""
    return f"{job['number']:06d}.tar"


def _flat(job: dict[str, Any]) -> str:
    return f"{job['at'].replace('/', '-')}-{job['number']:06d}"


def _members(row: Row) -> dict[str, str | bytes]:
    members: dict[str, str | bytes] = {"__key__": row.key}
    if row.x is not None:
        members["npy"] = array.encode(row.x)
    members |= {f"{k}.npy": array.encode(v) for k, v in row.cond.items()}
    if row.label is not None:
        members["cls"] = str(row.label).encode()
    if row.caption is not None:
        members["txt"] = row.caption.encode()
    return members


@contextlib.contextmanager
def disk(out: Path) -> Iterator[None]:
    """What the disk refuses, in a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadInput(f"{out} cannot be written ({reason}): make room or give another folder.") from error
