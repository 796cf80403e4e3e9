from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from distill.cli import main
from distill.data.sources.emoji import BASES, COMBINATIONS, TRAIN, Emoji, drawn, named, split
from distill.data.sources.folder import SourceFolder
from distill.errors import BadInput

HEART, PIZZA, WOMAN, TEACHER, JOINER, DARK = "\u2764", "\U0001f355", "\U0001f469", "\U0001f3eb", "\u200d", "\U0001f3ff"
RED, BLUE = (1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)
NAMES = {
    HEART: "heart",
    PIZZA: "pizza",
    WOMAN: "woman",
    TEACHER: "school",
    JOINER: "zwj",
    DARK: "dark",
    "\ufe0f": "vs16",
}


def square(left: int, right: int):
    pen = TTGlyphPen(None)
    for i, point in enumerate([(left, 0), (left, 800), (right, 800), (right, 0)]):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    return pen.glyph()


@pytest.fixture(scope="module")
def font(tmp_path_factory) -> Path:
    """A font with colour glyphs of a heart and a woman, a ligature of "woman teacher", and no pizza."""
    path = tmp_path_factory.mktemp("font") / "colour.ttf"
    glyphs = [".notdef", *NAMES.values(), "womanteacher"]
    empty = TTGlyphPen(None).glyph()
    outlines = dict.fromkeys(glyphs, empty) | {
        "heart": square(100, 900),
        "woman": square(300, 700),
        "school": square(0, 1000),
        "dark": square(0, 500),
        "womanteacher": square(200, 600),
        ".notdef": square(400, 500),
    }
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(c): name for c, name in NAMES.items() if c != PIZZA})
    builder.setupGlyf(outlines)
    builder.setupHorizontalMetrics({name: (1200 if name not in ("zwj", "vs16") else 0, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Colour", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    colours = {"heart": 0, "woman": 1, "womanteacher": 0}
    builder.setupCOLR({name: [(name, colour)] for name, colour in colours.items()})
    builder.setupCPAL([[RED, BLUE]])
    addOpenTypeFeaturesFromString(
        builder.font, "feature ccmp { sub woman zwj school by womanteacher; sub heart vs16 by heart; } ccmp;"
    )
    builder.save(path)
    return path


def test_pictures_are_those_of_the_fonts_own_glyphs_joined_and_without_repeats(font):
    found = {emoji.name: picture for emoji, picture in drawn(font, 32)}
    assert {"red heart", "woman", "woman teacher"} <= set(found)
    assert "pizza" not in found, "the font has no such glyph"
    assert "woman dark skin tone" not in found, "its parts would stand side by side"
    assert all(picture.shape == (32, 32, 3) and picture.dtype == np.uint8 for picture in found.values())
    assert found["red heart"][16, 16].tolist() == [255, 0, 0] and found["woman"][16, 16].tolist() == [0, 0, 255]
    assert found["red heart"][0, 0].tolist() == [255, 255, 255]
    assert len({picture.tobytes() for picture in found.values()}) == len(found)


def test_a_base_is_a_name_without_skin_tone_and_gender():
    bases = {
        name: Emoji("", name).base for name in ("woman teacher medium-dark skin tone", "man teacher", "man", "pizza")
    }
    assert bases == {
        "woman teacher medium-dark skin tone": "teacher",
        "man teacher": "teacher",
        "man": "person",
        "pizza": "pizza",
    }


def test_held_out_bases_are_disjoint_and_held_out_combinations_have_known_words():
    sets = split(named())
    total = sum(map(len, sets.values()))
    assert total == len(named()) and len({e for part in sets.values() for e in part}) == total
    assert 0.02 < len(sets[BASES]) / total < 0.1 and 0.02 < len(sets[COMBINATIONS]) / total < 0.12
    bases = {name: {e.base for e in part} for name, part in sets.items()}
    assert not bases[BASES] & (bases[TRAIN] | bases[COMBINATIONS]) and bases[COMBINATIONS] <= bases[TRAIN]
    words = {word for e in sets[TRAIN] for word in e.name.split()}
    assert all(words.issuperset(e.name.split()) for e in sets[COMBINATIONS])
    assert split(list(reversed(named())))[BASES][::-1] == sets[BASES], "the order of the emoji"


def test_the_command_writes_a_folder_that_other_commands_read(font, tmp_path):
    out = tmp_path / "emoji"
    result = CliRunner().invoke(main, ["data", "emoji", str(out), "--font", str(font), "--size", "16"])
    assert result.exit_code == 0 and f"{out}: train " in result.output, result.output
    source = SourceFolder.open(out)
    files = sorted(out.rglob("*.png"))
    captions = {file.stem: file.with_suffix(".txt").read_text().strip() for file in files}
    assert captions["1f469-200d-1f3eb"] == "woman teacher"
    assert {Image.open(file).size for file in files} == {(16, 16)}
    assert source.captioned and sorted(source.files) == files


@pytest.mark.parametrize("kind", ["text", "grey", "missing"])
def test_a_font_without_colour_glyphs_is_refused_in_a_sentence(kind, tmp_path):
    import matplotlib

    grey = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    (tmp_path / "text.ttf").write_text("no font")
    font = {"text": tmp_path / "text.ttf", "grey": grey, "missing": tmp_path / "none.ttf"}[kind]
    with pytest.raises(BadInput, match="give NotoColorEmoji.ttf"):
        drawn(font)
