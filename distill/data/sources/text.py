"""Text files: captions and lists of prompts."""

from __future__ import annotations

import csv
from pathlib import Path

from distill.errors import BadInput

_PROMPT_COLUMNS = ("prompt", "caption", "text")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors write.

    Raises:
        BadInput: the file cannot be read or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} cannot be read ({error}): save it as UTF-8.") from None


def caption_file(file: Path) -> Path:
    """The .txt beside a file that holds its caption."""
    return file.with_suffix(".txt")


def captioned(files: list[Path]) -> bool:
    """Whether all files have a caption.

    Raises:
        BadInput: only some have one.
    """
    without = [file for file in files if not caption_file(file).is_file()]
    if without and len(without) < len(files):
        raise BadInput(f"{without[0]} has no caption, while others have: write {caption_file(without[0]).name}.")
    return not without


def caption(file: Path) -> str:
    """The caption of a file.

    Raises:
        BadInput: it cannot be read or is not UTF-8.
    """
    return read_text(caption_file(file)).strip()


def captions(files: list[Path]) -> list[str] | None:
    """The captions of files in their order; None if no file has one.

    Raises:
        BadInput: only some files have one, or one is not UTF-8.
    """
    return [caption(file) for file in files] if captioned(files) else None


def prompts(file: Path) -> list[str]:
    """Prompts of a .txt (one per line), or of a .tsv or .csv (column `Prompt`, `caption` or `text`); empty ones are left out.

    Raises:
        BadInput: no such file, another kind, no such column, or no prompt.
    """
    if file.suffix.lower() not in (".txt", ".tsv", ".csv"):
        raise BadInput(f"{file} must end in .txt (one prompt per line), .tsv or .csv (a column Prompt).")
    text = read_text(file)
    text_lines = text.splitlines() if file.suffix.lower() == ".txt" else _prompt_column(file, text)
    text_lines = [line.strip() for line in text_lines if line.strip()]
    if not text_lines:
        raise BadInput(f"{file} holds no prompt: write one per line.")
    return text_lines


def _prompt_column(file: Path, text: str) -> list[str]:
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix.lower() == ".tsv" else {}
    rows = csv.DictReader(text.splitlines(keepends=True), **dialect)
    columns = rows.fieldnames or ()
    column = next((name for name in columns if name.strip().lower() in _PROMPT_COLUMNS), None)
    if column is None:
        names = ", ".join(columns) or "nothing"
        raise BadInput(f"{file} has the columns {names}, but no Prompt: name the column of prompts so.")
    return [row[column] or "" for row in rows]
