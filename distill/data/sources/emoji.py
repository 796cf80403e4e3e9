"""Pictures of emoji with their names as captions, drawn by a font with colour glyphs.

Names are those of the package `emoji` (CLDR short names). Two sets are held out, so that generalisation can be measured:

    train               the rest
    test-combinations   variants of skin tone and gender of known bases; each word of the caption occurs in train
    test-bases          all variants of bases that occur nowhere else

The base of an emoji is its name without skin tone and gender: "woman teacher medium skin tone" and "man teacher" have one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from distill.errors import BadInput
from distill.files import digest

STRIKE = 109  # the size of the bitmaps in Noto Color Emoji, pixels an em
CANVAS = (136, 128)  # width and height of such a bitmap
UNASSIGNED = "\U0010fffd"  # drawn as the font's missing glyph
TONE = re.compile(r"\b(?:medium-)?(?:light|dark|medium) skin tone\b")
GENDERED = re.compile(r"\b(?:men|man|women|woman|person|people|boy|girl|child)\b")
TRAIN, COMBINATIONS, BASES = "train", "test-combinations", "test-bases"


@dataclass(frozen=True)
class Emoji:
    """An emoji: its code points and its name."""

    text: str
    name: str

    @property
    def base(self) -> str:
        """The name without skin tones and gender; of "woman" and the like, which are nothing else, "person"."""
        return " ".join(GENDERED.sub("", TONE.sub("", self.name)).split()) or "person"

    @property
    def file(self) -> str:
        """A file's name without suffix: the code points in hexadecimal."""
        return "-".join(f"{ord(c):x}" for c in self.text)


def named() -> list[Emoji]:
    """All fully qualified emoji of the package `emoji`, in its order.

    Raises:
        BadInput: the package is not installed.
    """
    try:
        import emoji
    except ImportError:
        raise BadInput(
            "The names of emoji are those of the package emoji: pip install 'distill-diffusion[emoji]'."
        ) from None
    qualified = emoji.STATUS["fully_qualified"]
    return [
        Emoji(text, " ".join(about["en"].strip(":").replace("_", " ").split()))
        for text, about in emoji.EMOJI_DATA.items()
        if about["status"] == qualified
    ]


def drawn(font: str | os.PathLike, size: int = 64) -> list[tuple[Emoji, np.ndarray]]:
    """Each emoji that the font has, with its picture: uint8 (size, size, 3) on white; equal pictures once, under the first name.

    Raises:
        BadInput: no such font, one without colour glyphs, or Pillow without text layout.
    """
    if not features.check("raqm"):
        raise BadInput("This Pillow cannot join the parts of an emoji (no raqm): install the wheel from PyPI.")
    emojis = named()
    try:
        face = ImageFont.truetype(os.fspath(font), STRIKE)
    except OSError as error:
        raise BadInput(
            f"{font} cannot be opened as a font with colour bitmaps of {STRIKE} pixels ({error}): "
            "give NotoColorEmoji.ttf, in Debian from the package fonts-noto-color-emoji."
        ) from None
    missing, seen, found = _bitmap(face, UNASSIGNED), set(), []
    for emoji in emojis:
        if face.getlength(emoji.text) > CANVAS[0]:  # the font draws its parts side by side
            continue
        bitmap = _bitmap(face, emoji.text)
        if bitmap is None or bitmap == missing or bitmap.tobytes() in seen:
            continue
        seen.add(bitmap.tobytes())
        found.append((emoji, _on_white(bitmap, size)))
    if not found or not any(np.ptp(picture, -1).any() for _, picture in found):
        raise BadInput(f"{font} has no colour glyphs of emoji: give NotoColorEmoji.ttf.")
    return found


def _bitmap(face: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The glyph of a text on a transparent canvas; None if nothing is drawn."""
    image = Image.new("RGBA", CANVAS, (255, 255, 255, 0))
    ImageDraw.Draw(image).text((0, 0), text, font=face, embedded_color=True)
    return image if image.getchannel("A").getbbox() else None


def _on_white(bitmap: Image.Image, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the picture in the middle of a white square, resized."""
    inner = bitmap.crop(bitmap.getchannel("A").getbbox())
    square = Image.new("RGBA", (CANVAS[0], CANVAS[0]), (255, 255, 255, 255))
    square.alpha_composite(inner, tuple((CANVAS[0] - side) // 2 for side in inner.size))
    return np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def split(emojis: Iterable[Emoji], bases: float = 0.05, combinations: float = 0.1) -> dict[str, list[Emoji]]:
    """The three sets; membership depends on names alone, so a newer font or package moves few.

    Args:
        emojis: distinct.
        bases: share of the bases that are held out with all their variants.
        combinations: share of the variants of the other bases that are held out, if train keeps each of their words.
    """
    sets: dict[str, list[Emoji]] = {TRAIN: [], COMBINATIONS: [], BASES: []}
    candidates: list[Emoji] = []
    for emoji in emojis:
        if _position(emoji.base) < bases:
            sets[BASES].append(emoji)
        elif emoji.base != emoji.name and _position(emoji.name) < combinations:
            candidates.append(emoji)
        else:
            sets[TRAIN].append(emoji)
    known = {word for emoji in sets[TRAIN] for word in emoji.name.split()}
    of_base = {emoji.base for emoji in sets[TRAIN]}
    for emoji in candidates:
        new = emoji.base in of_base and known.issuperset(emoji.name.split())
        sets[COMBINATIONS if new else TRAIN].append(emoji)
    return sets


def _position(name: str) -> float:
    """A number in [0, 1) that only depends on the name."""
    return int(digest([name], 8), 16) / 16**8


def write(folder: Path, font: str | os.PathLike, size: int = 64) -> dict[str, int]:
    """Write SET/CODEPOINTS.png and .txt into an existing folder; the number of pictures of each set."""
    pictures = dict(drawn(font, size))
    sets = {name: emojis for name, emojis in split(pictures).items() if emojis}
    for name, emojis in sets.items():
        (folder / name).mkdir()
        for emoji in emojis:
            Image.fromarray(pictures[emoji]).save(folder / name / f"{emoji.file}.png")
            (folder / name / f"{emoji.file}.txt").write_text(emoji.name + "\n", encoding="utf-8")
    return {name: len(emojis) for name, emojis in sets.items()}
