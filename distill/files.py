"""Small files: atomic writes, digests, JSON, CSV and markdown tables."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from distill.errors import BadInput


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file beside `path` that replaces it on success; on an error `path` stays as it was."""
    path = Path(path)
    staging = _staging(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with open(staging, mode, encoding=encoding, newline=newline) as file:
            yield file
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside `path` that becomes it on success and is removed on an error.

    Raises:
        BadInput: `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise BadInput(f"{path} exists already: remove it or name another folder.")
    staging = _staging(path)
    try:
        staging.mkdir(parents=True)
        yield staging
        os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(path: Path) -> Path:
    """A name beside `path` that no other process uses, on this machine or on another one with the same file system."""
    return path.with_name(f".{path.name}.writing-{os.uname().nodename}-{os.getpid()}")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file: all of it, or nothing."""
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file: all of it, or nothing."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: str | Path, mend: str = "write it again, or restore it from a backup") -> Any:
    """The value of a JSON file.

    Raises:
        BadInput: no file, a file that cannot be read, or no JSON in it; ends with `mend`.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; {mend}.") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); {mend}.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not JSON ({error}); {mend}.") from None


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column; no rows where there is no file.

    Raises:
        BadInput: it is not a table of text, or a row has more cells than the head.
    """
    if not Path(path).exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is damaged ({error}); restore it from a backup, or remove it.") from None
    for line, row in enumerate(rows, start=2):
        if None in row:
            raise BadInput(f"{path}: line {line} is damaged: it has more cells than the first; remove that line.")
    return rows


def write_csv(path: str | Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file: all of it, or nothing. Cells that a row lacks are empty."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(head: Sequence[Any], rows: Sequence[Sequence[Any]], align: str = "") -> str:
    """A markdown table, one line a row. `align`: one of `l`, `r`, `c` a column; left where it is shorter."""
    rule = {"l": "---", "r": "---:", "c": ":---:"}
    marks = [rule[(align + "l" * len(head))[i]] for i in range(len(head))]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (head, marks, *rows))


def sample_counts(about: Mapping[str, Any]) -> str:
    """What the numbers of a table were measured on, as a sentence; empty if `about` does not state it.

    Args:
        about: `samples` per row and `reference` samples, as in metrics.json.
    """
    if "samples" not in about:
        return ""
    reference = f", against {about['reference']:,} reference samples" if about.get("reference") else ""
    return f"{about['samples']:,} samples per row{reference}."


def digest(parts: Iterable[bytes | str], length: int = 12) -> str:
    """The first `length` hex digits of the SHA-256 of `parts` one after another."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:length]
