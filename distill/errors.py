"""BadInput and LostProcess, the exceptions whose messages are written for users."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BadInput(ValueError):
    """Input that cannot be used. The message is one sentence that names the key, file or shard and how to fix it.

    The command line prints it without a traceback and exits with code 2.

    Examples:
        >>> import distill
        >>> try:
        ...     distill.Grid.of([1, 0.3, 0.6, 0])
        ... except distill.BadInput as error:
        ...     print(error)
        grid [1, 0.3, 0.6, 0] must decrease strictly from 1 to 0: sort it and remove repeated times.
    """


class LostProcess(RuntimeError):
    """Another process that the run waits for, a rank or a data worker, has ended or does not answer.

    The message is one sentence. The command line prints it without a traceback and exits with code 1: the same command
    may succeed when it is repeated with --resume.
    """


def suggest(name: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the option nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
