"""Resumable writing of shards by several processes, which become one folder when all are complete.

The unfinished folder is `.OUT.unfinished` beside OUT. A shard is written under a temporary name, locked meanwhile, and
renamed when it is complete; it counts once its record exists. The process that finishes the last shard writes the indexes
and renames the folder. After a kill at any time the same command continues with the missing shards.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from distill.data.info import Info
from distill.data.shards.dataset import NULL
from distill.data.shards.sample import Sample
from distill.data.shards.write import (
    ShardRecord,
    Skipped,
    refuse_existing,
    shard_name,
    write_errors,
    write_index,
    write_shard,
)
from distill.data.sources.plan import Plan, ShardJob
from distill.errors import BadInput
from distill.files import atomic_write, write_json, write_text

STATE = "state of the source"  # the setting that changes when files of the source are edited, added or removed
PLAN, SETTINGS, SKIPPED, _RECORDS, _TEMPORARY = "plan.json", "encoding.json", "skipped.txt", "records", "temporary"


class ResumableFolder:
    """The folder OUT while its shards are written.

    Args:
        out: the folder to create.
        settings: everything that decides the bytes of OUT: source, options, fingerprints. Plain JSON.

    Attributes:
        complete: OUT is there already and was made with the same settings.
        plan: the plan that `begin` stored; None before it.

    Raises:
        BadInput: OUT exists and is something else, or was begun with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.settings = out, json.loads(json.dumps(settings))
        self.plan: Plan | None = None
        self.folder = out.parent / f".{out.name}.unfinished"
        self.complete = self._is_complete()
        if not self.complete and (self.folder / PLAN).is_file():
            self._read_plan()

    def begin(self, plan: Plan) -> None:
        """Store the plan. If several processes begin together, the first one's plan is used by all."""
        with write_errors(self.out):
            (self.folder / _TEMPORARY).mkdir(parents=True, exist_ok=True)
            (self.folder / _RECORDS).mkdir(exist_ok=True)
            temporary = self.folder / _TEMPORARY / f"plan-{os.uname().nodename}-{os.getpid()}"
            write_json(temporary, {"settings": self.settings, "plan": asdict(plan)}, indent=None)
            try:
                os.link(temporary, self.folder / PLAN)  # fails if there is one
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not (self.folder / PLAN).exists():
                    os.replace(temporary, self.folder / PLAN)
            temporary.unlink(missing_ok=True)
        self._read_plan()

    def _read_plan(self) -> None:
        begun = f"{self.folder} holds an unfinished {self.out.name} that was begun"
        try:
            stored = json.loads((self.folder / PLAN).read_text())
            settings, plan = stored["settings"], Plan.from_json(stored["plan"])
        except (KeyError, TypeError):
            raise BadInput(f"{begun} by another release: remove it.") from None
        self._check_settings(settings, f"{begun} with", "another folder, or remove it first")
        self.plan = plan

    def _is_complete(self) -> bool:
        if not os.path.lexists(self.out):
            return False
        if not (self.out / SETTINGS).is_file():
            refuse_existing(self.out)
        settings = json.loads((self.out / SETTINGS).read_text())
        self._check_settings(
            settings, f"{self.out} exists already and was made with", "another folder, or remove it first"
        )
        shutil.rmtree(self.out / _RECORDS, ignore_errors=True)  # left by a run that was killed after the rename
        return True

    def _check_settings(self, stored: dict[str, Any], where: str, mend: str) -> None:
        for key in {**stored, **self.settings}:
            if key == STATE and stored.get(key) != self.settings.get(key):
                raise BadInput(
                    f"{where} other files: some of {self.settings['source']} were edited, added or removed since: "
                    f"give {mend}."
                )
            if stored.get(key) != self.settings.get(key):
                raise BadInput(
                    f"{where} {key} = {stored.get(key)}, not {self.settings.get(key)}: give the same, or {mend}."
                )

    # -- one shard -----------------------------------------------------------------------------------------------

    def done(self, job: ShardJob) -> bool:
        """Whether a shard is complete."""
        record, path = self._record(job), self.folder / job.folder / shard_name(job.number)
        if not record.is_file():
            return False
        record = ShardRecord.load(record)
        return not record.count or (path.is_file() and path.stat().st_size == record.bytes)

    def write(self, job: ShardJob, samples: Iterable[Sample | Skipped]) -> ShardRecord:
        """Write one shard: all of it, or nothing.

        Raises:
            BadInput: another process is writing it, samples differ in shape, or the disk refuses.
        """
        path = self.folder / job.folder / shard_name(job.number)
        with write_errors(self.out), self._temporary(job) as file:
            record = write_shard(file, samples)
            path.parent.mkdir(parents=True, exist_ok=True)
            if record.count:
                os.replace(file.name, path)
            record.save(self._record(job))
        return record

    @contextlib.contextmanager
    def _temporary(self, job: ShardJob) -> Iterator[BinaryIO]:
        with open(self.folder / _TEMPORARY / f"{_flat_name(job)}.tar", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                name = shard_name(job.number)
                raise BadInput(f"another process is writing shard {name} of {self.out}: let it finish.") from None
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            yield file

    def _record(self, job: ShardJob) -> Path:
        return self.folder / _RECORDS / f"{_flat_name(job)}.json"

    def save_null(self, null: dict[str, Tensor]) -> None:
        """Store the null condition, which is copied beside every index."""
        from safetensors.torch import save

        with write_errors(self.out), atomic_write(self.folder / _RECORDS / NULL, "wb") as file:
            file.write(save({name: value.contiguous() for name, value in null.items()}))

    # -- all shards ----------------------------------------------------------------------------------------------

    def missing(self) -> int:
        """Number of shards still to be written."""
        return sum(not self.done(job) for job in self.plan.jobs)

    def finish(self, info: Info) -> dict[str, Info] | None:
        """Write the indexes and rename the folder; several processes may call this at once.

        Args:
            info: classes, names, captions, source, encoder; for conditions alone also the shape. The rest is measured.

        Returns:
            What was written, by folder; None while shards are missing, or if another process finished.
        """
        try:
            return None if self.missing() else self._finish(info)
        except FileNotFoundError:  # another process has renamed the folder
            if self.out.is_dir():
                return None
            raise

    def _finish(self, info: Info) -> dict[str, Info]:
        written, skipped = {}, []
        with write_errors(self.out):
            for folder in sorted({job.folder for job in self.plan.jobs}):
                jobs = [job for job in self.plan.jobs if job.folder == folder]
                records = {shard_name(job.number): ShardRecord.load(self._record(job)) for job in jobs}
                skipped += [f"{folder} {line}" for record in records.values() for line in record.skipped]
                records = {name: record for name, record in records.items() if record.count}
                if records:
                    written[folder] = self._finish_folder(folder, info, records)
            if not written:
                raise BadInput(f"{self.folder} holds no sample, all were skipped: {skipped[0]}.")
            if skipped:
                write_text(self.folder / SKIPPED, "\n".join(skipped) + "\n")
            write_json(self.folder / SETTINGS, self.settings, indent=1)
            shutil.rmtree(self.folder / _TEMPORARY, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                (self.folder / PLAN).unlink()
            self.folder.rename(self.out)
            shutil.rmtree(self.out / _RECORDS, ignore_errors=True)
        return written

    def _finish_folder(self, folder: str, info: Info, records: dict[str, ShardRecord]) -> Info:
        if (null := self.folder / _RECORDS / NULL).is_file():
            with atomic_write(self.folder / folder / NULL, "wb") as file:
                file.write(null.read_bytes())
        return write_index(self.folder / folder, replace(info, path=str(self.out / folder)), records)


def _flat_name(job: ShardJob) -> str:
    return f"{job.folder.replace('/', '-')}-{job.number:06d}"
