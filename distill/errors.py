"""BadInput and LostProcess, the exceptions whose messages are written for users."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


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
    """`" Did you mean 'x'?"` for the option nearest to `name`, or the one that it begins; or an empty string."""
    options = list(options)
    begun = [option for option in options if len(name) > 2 and option.startswith(name)]
    near = begun if len(begun) == 1 else difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


NEAR = 0.75  # share of letters that a name has in common with what was meant


def near_path(path: str | Path) -> str:
    """`" Did you mean 'x'?"` for the existing path that differs from `path` by slips in its names, or an empty string."""
    path = Path(path).expanduser()
    at = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not (at / part).exists():
            names = [p.name for p in at.iterdir()] if at.is_dir() else []
            near = difflib.get_close_matches(part, names, n=1, cutoff=NEAR)
            if not near:
                return ""
            part = near[0]
        at /= part
    return f" Did you mean '{at}'?" if at != path else ""
