"""BadInput, the exception whose message is written for users."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BadInput(ValueError):
    """Input that cannot be used. The message is one sentence that names the key, file or shard and how to fix it.

    The command line prints it without a traceback and exits with code 2.
    """


def suggest(name: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the option nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
