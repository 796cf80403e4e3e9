"""Docstrings, comments, messages and pages use the field's words: retired words of prose, and what replaces them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [*sorted((ROOT / "distill").rglob("*.py")), ROOT / "docs" / "generate.py"]
PAGES = sorted(
    p
    for p in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "checkpoints").rglob("*.md"))
    if p.name != "log.md"  # the log quotes earlier names
)
CONFIGS = sorted(p for folder in ("configs", "launch") for p in (ROOT / folder).rglob("*") if p.is_file()) + [
    ROOT / "Makefile"
]

# Pattern -> what to write instead. A word is listed in its retired sense where it also has an ordinary one.
RETIRED = {
    r"told|tells?|telling": "gets, states, separates",
    r"walks?|walked|walking": "sampler, samples",
    r"bands?": "reference curves, range",
    r"leads?|leading": "rank zero; is updated first",
    r"beats?|beating": "interval; is better than",
    r"(?:teacher|student)(?:'s)? lines?|lines? of the (?:teacher|student)": "teacher baseline, curve",
    r"watch(?:es|ed|ing)?|watchdog": "alarms, monitor",
    r"ships?|shipping": "exports, comes with",
    r"homes?": "run folder",
    r"asks?|asked|asking": "requires, selects, calls",
    r"knows?|knew": "has, supports",
    r"speaks?|spoke": "prints",
    r"lends?|lent": "shares",
    r"promis(?:e|es|ed|ing)": "requirement, bound",
    r"said": "message",
    r"(?<!you )(?<!You )wants?": "requires",
    r"forgets?|forgot": "half-life",
    r"anew": "again",
    r"astray|uphill|flees?": "wrong sign, other parameters",
    r"hands? over|let(?:s|ting)? go": "copies, frees",
    r"go(?:es|ing)? on": "continues",
    r"in vain": "of a killed process",
    r"sessions?": "experiment, run",
    r"skips of|between skips": "skipped turns",
    r"watch ?dogs?|the dog": "alarms",
    r"come(?:s)? into play": "takes effect",
    r"hold(?:s)? against": "compare with",
    r"laws?": "distribution",
    r"rungs?|ladders?": "rounds",
    r"staircase": "what the reward does",
    r"(?:'s|the) chart (?:of|y)|network's chart": "parametrisation, coordinates, schedule",
    r"(?:GB|TFLOP|batch \S+|bytes) a rank": "per rank",
    r"(?:samples|evaluations|turns|one|picture|values) a (?:row|sample|step|prompt|line|condition|second)": "per",
    r"(?<!best )training-free (?:best|solvers?)|best solver without training": "best distill solver, best diffusers solver",
}
WORD = {re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): instead for pattern, instead in RETIRED.items()}
ALLOWED = re.compile(  # names of other projects, and identifiers in text
    r"os\.walk|ast\.walk|wandb\.watch|Path\.home|`[^`]*`|https?://\S+|leading (?:zero|comment|dimension|slash)"
)


def retired(text: str) -> list[str]:
    """The retired words in a text, each with its replacement."""
    text = ALLOWED.sub(" ", text)
    return [f"'{match[0]}' ({instead})" for word, instead in WORD.items() for match in word.finditer(text)]


def prose(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of comments, docstrings and strings of two words or more."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def without_code(text: str) -> str:
    """A page without its code blocks; text blocks, which show output, stay."""
    return re.sub(r"```(?:python|bash|yaml|toml|json)\n.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_uses_no_retired_word(path):
    found = [f"line {line}: {', '.join(words)}" for line, text in prose(path.read_text()) if (words := retired(text))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_use_no_retired_word(path):
    assert not retired(without_code(path.read_text()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_comments_of_configs_use_no_retired_word(path):
    comments = [line.partition("#")[2] for line in path.read_text().splitlines()]
    assert not retired("\n".join(comments))


def test_retired_words_are_found():
    """In docstrings, comments and messages, but not in identifiers, code spans and ordinary words."""
    source = '''def walk():
    """The student is told w."""
    known = shipped = lines  # every beat
    raise ValueError(f"{known} asks for x")
'''
    found = [word for _, text in prose(source) for word in retired(text)]
    assert sorted(word.split("'")[1] for word in found) == ["asks", "beat", "told"]
    assert not retired("You want a student; `watch` and os.walk are known; lines of a file are shipped.")
