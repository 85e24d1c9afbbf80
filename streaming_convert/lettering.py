"""Text of any script in pictures: which font of the system draws it, and what is written where none does."""

from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font


def lettering(text: str) -> tuple[str, str | None]:
    """The text as it can be drawn, and the font file to draw it with; None for the usual font.

    The first font that has every letter is taken: matplotlib's own, then those of the system. Where there is
    none, letters that matplotlib's own font lacks are written as escapes: \\u732b.
    """
    if text.isascii():
        return text, None
    needed = {ord(letter) for letter in text if letter.isprintable()}
    own = str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
    for file in (own, *sorted(font_manager.findSystemFonts())):
        if needed <= _letters(file):
            return text, file
    known = _letters(own)
    return "".join(x if ord(x) in known or x.isspace() else _escaped(x) for x in text), own


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


@cache
def _letters(file: str) -> frozenset[int]:
    """The code points that a font file has outlines of; none if it is damaged or made of bitmaps."""
    try:
        face = FT2Font(file)
        return frozenset(face.get_charmap() if face.scalable else ())
    except (OSError, RuntimeError):
        return frozenset()
