"""Captions of pictures, from a CSV or JSON-lines file or from a .txt file beside each picture.

Both readers return what each picture has: a text, a list of several, or a Rejected that says why it has none;
an empty caption is a caption.
"""

import csv
import io
import posixpath
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from storage.manifest import DatasetError
from storage.outside import parse_json
from streaming_convert.images import Rejected
from streaming_convert.labels import read_text

Captions = list[str | list[str] | Rejected]
BESIDE = "beside"  # in place of a caption file's name
FILE_KEYS = ("file", "file_name", "filename", "image")
CAPTION_KEYS = ("caption", "text")


@dataclass(frozen=True)
class Told:
    """The place of captions: a file (in the pictures' folder, too) or BESIDE, and its column, if named."""

    file: str
    key: str | None = None


def beside(keys: list[str], names: Collection[str], read: Callable[[str], bytes]) -> Captions:
    """Take the whole text of cat/1.txt as the caption of cat/1.jpg.

    names: of all files of the source; read: from a name to the file's content.
    """

    def caption(key: str) -> str | Rejected:
        name = posixpath.splitext(key)[0] + ".txt"
        if name not in names:
            return Rejected("no caption")
        try:
            return read(name).decode("utf-8-sig").strip()
        except (Rejected, UnicodeDecodeError) as error:
            return Rejected(f"{name}: {error}")

    return [caption(key) for key in keys]


def from_file(path: str, keys: list[str], caption_key: str | None = None) -> Captions:
    """Read files and captions of a CSV file (commas or tabs, with a header) or of JSON lines.

    Their columns are called as in FILE_KEYS and CAPTION_KEYS, or as `caption_key` says; a caption of JSON may
    be a list of several. Raises DatasetError for a row without both, and for files that are not among `keys`.
    """
    text = read_text(path)
    known = (caption_key,) if caption_key else CAPTION_KEYS
    rows = _json_lines(text, path) if text.lstrip().startswith("{") else _csv(text, path, known)
    found, strange = {key: [] for key in keys}, []
    for line, row in rows:
        file, caption = (next((row[x] for x in names if x in row), None) for names in (FILE_KEYS, known))
        several = caption if isinstance(caption, list) else [caption]
        if not all(map(is_text, (file, *several))) or None in row:  # None: cells beyond the header's
            raise DatasetError(f"{path}, line {line}: not one file and one caption: {ascii(row)[:100]}")
        name = posixpath.normpath(file.strip().replace("\\", "/"))
        if name in found:
            found[name] += [one.strip() for one in several]
        else:
            strange.append(name)
    if strange:
        raise DatasetError(f"{path}: {len(strange)} rows name images that do not exist, first {strange[0]}")
    return [several or Rejected("no caption") for several in found.values()]


def texts(caption: Any) -> list[str | Rejected]:  # noqa: ANN401
    """Return the captions of a picture: of a text one, of a list of texts all, else why there is none."""
    if isinstance(caption, Rejected):
        return [caption]
    several = caption if isinstance(caption, list) else [caption]
    if not several or not all(map(is_text, several)):
        return [Rejected(f"no caption, but {ascii(caption)[:50]}")]
    return [one.strip() for one in several]


def is_text(value: object) -> bool:
    """Return True if `value` is text that UTF-8 can encode; JSON may hold lone surrogates."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def _json_lines(text: str, path: str) -> Iterator[tuple[int, dict]]:
    """Yield the line number and the object of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise DatasetError(f"{path}, line {number}: not a JSON object")
        yield number, row


def _csv(text: str, path: str, caption_keys: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """Yield the line number of each row and its cells by the names in the header."""
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in header else ",", strict=True)
    try:
        rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
        for names in (FILE_KEYS, caption_keys):
            if not set(names) & set(rows.fieldnames):
                *others, last = names
                known = f"{', '.join(others)} or {last}" if others else last
                raise DatasetError(f"{path} is neither JSON lines nor CSV whose header names {known}")
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise DatasetError(f"{path} is not a CSV file: {error}") from error
