"""Text of any script in pictures: the font that can draw it, or escapes if there is none."""

from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font


def lettering(text: str) -> tuple[str, str | None]:
    """Return the text as it can be drawn, and the font file to draw it with; None for the default font.

    This is the first font that has all letters: matplotlib's own, then those of the system. If there is none,
    the letters that matplotlib's font lacks become escapes such as \\u732b.
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
    """Return the code points that a font file has outlines for; none if it is damaged or has only bitmaps."""
    try:
        face = FT2Font(file)
        return frozenset(face.get_charmap() if face.scalable else ())
    except (OSError, RuntimeError):
        return frozenset()
