"""Real `distill` processes at the price of a fork: one process imports everything and forks a child for each command.

Started by tests as `python nursery.py`; a line of JSON in (arguments and where the output goes) is a child, whose pid is
the line out; a line of JSON with that pid is answered by its exit status once it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


class Nursery:
    """The parent's side: `start` gives a pid that anyone may send signals to, `end` its exit code."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def _ask(self, **question) -> int:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *arguments: str, output: Path) -> int:
        return self._ask(arguments=list(map(str, arguments)), output=str(output))

    def end(self, pid: int) -> int:
        """Exit code; negative: the signal that killed it."""
        return self._ask(pid=pid)

    def alive(self, pid: int) -> bool:
        """Not yet a zombie that waits for `end`."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def kill(pid: int) -> None:
    """Without warning, as the kernel does when memory is short."""
    os.kill(pid, signal.SIGKILL)


def _child(arguments: list[str], output: str) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from distill.cli import main

    code = 1
    try:
        main(arguments, standalone_mode=False)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    import threading

    for thread in threading.enumerate():  # as an interpreter does at its end
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    os._exit(code)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    os.fsync = lambda file: None  # a killed process leaves its writes to the kernel; only a power cut asks for more
    import distill.cli
    import distill.inspect.results
    import distill.methods

    for name in distill.methods.names():
        getattr(distill.methods, name)
    for line in sys.stdin:
        question = json.loads(line)
        if "pid" in question:
            print(os.waitstatus_to_exitcode(os.waitpid(question["pid"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _child(**question)
        print(pid, flush=True)


if __name__ == "__main__":
    _serve()
