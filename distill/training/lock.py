"""A lock on a run folder, so that two processes never train into one."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from distill.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
LEASE, PAUSE = 120, 2.0  # seconds that the lock of another machine's process is waited for, and between two tries


class RunLock:
    """The kernel's lock on `folder/.lock` (POSIX, by fcntl), taken by `acquire` and given back at the end of `with`.

    The kernel releases it when its process ends, however it ends, so a killed run leaves no stale lock. On NFS version 4
    the server releases the lock of a machine that is gone after its lease (90 s by default), so the lock of a process on
    another machine is waited for during `LEASE` seconds; NFS version 3 releases it when that machine is up again. Where
    the file system has no locks (Lustre without `-o flock`), `acquire` returns False and nothing protects the folder.
    """

    def __init__(self, folder: str | Path):
        self.path, self.file = Path(folder) / LOCK, None

    def __enter__(self) -> RunLock:
        return self

    def acquire(self) -> bool:
        """Take the lock, unless it is taken; returns whether the file system has locks.

        Raises:
            BadInput: another process trains in this folder; names it.
        """
        if self.file or fcntl is None:
            return self.file is not None
        end = time.monotonic() + LEASE
        while True:
            file = open(self.path, "a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = self._holder()
                file.close()
                if holder.get("host") == socket.gethostname() or time.monotonic() > end:
                    raise BadInput(
                        f"{self.path.parent} is being trained by process {holder.get('pid', '?')} on "
                        f"{holder.get('host', 'another machine')}; wait for it, end it, or give another name=..."
                    ) from None
                time.sleep(PAUSE)
                continue
            except OSError:
                file.close()
                return False
            if self._is_current(file):
                break
            file.close()  # its owner has removed it meanwhile
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        self.file = file
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_current(self, file: Any) -> bool:
        try:
            return os.fstat(file.fileno()).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None
