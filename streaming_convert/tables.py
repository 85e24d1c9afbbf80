"""What datasets of other programs have in common: rows with a picture, perhaps a label, perhaps captions."""

from __future__ import annotations

import atexit
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from storage import Folder
from storage.manifest import DatasetError
from streaming_convert import labels
from streaming_convert.captions import is_text
from streaming_convert.images import ADM_CROP, Rejected
from streaming_convert.sources import Source

FIRST = 100  # rows among which the first good one sets the shape


@dataclass(frozen=True)
class Columns:
    """The names of the columns that become a sample's image or latents, label and caption."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None
    latents: str | None = None

    def given(self) -> dict[str, str]:
        """Return those that have a name, by what they become."""
        return {field.name: name for field in fields(self) if (name := getattr(self, field.name))}

    def or_guessed(self, guessed: Columns, where: str) -> Columns:
        """Return these, or where none has a name what was guessed, which is printed."""
        if self.given():
            return self
        print(f"{where}: {', '.join(f'--{role} {name}' for role, name in guessed.given().items())}")
        return guessed


@dataclass
class Rows:
    """The rows of a dataset before its pictures are read: lists of one length.

    load: of a key and a Note, a picture uint8 (C,H,W), or latents float16 (2c,h,w); raises Rejected.
    captions: a row's text, a list of several, or why it has none.
    """

    keys: list[str]
    versions: list[str]
    load: Callable[..., np.ndarray]
    labels: list[int | str] | None = None
    captions: list[str | list[str] | Rejected] | None = None
    class_names: list[str] | None = None


def as_source(
    name: str, rows: Rows, size: int | None, classes: str | None = None, encoder: dict | None = None
) -> Source:
    """Return the source of these rows, with a sample for each caption of a row.

    Without a size the first good row sets the shape. classes: a file that names them in order. encoder: facts
    about what made the latents; None for pictures.
    """
    if not rows.keys:
        raise DatasetError(f"{name}: there are no samples")
    numbers, names = np.zeros(len(rows.keys), np.int64), []
    if rows.labels is not None:
        known = labels.read_classes(classes) if classes else rows.class_names
        if not known:
            labels.refuse_values(rows.labels)
        numbers, names = labels.number(rows.labels, known)
    elif classes:
        raise DatasetError("--classes: there are no labels")
    source = Source(
        name=name,
        keys=rows.keys,
        labels=numbers,
        class_names=names,
        shape=_first_shape(rows),
        load=rows.load,
        versions=rows.versions,
        column="image" if encoder is None else "latents",
        crop=ADM_CROP if size else "none",
        encoder=encoder,
    )
    if rows.captions is None:
        return source
    each = [_texts(one) for one in rows.captions]
    position = np.repeat(np.arange(len(each)), list(map(len, each)))
    return replace(source.take(position), captions=[text for several in each for text in several])


def _texts(caption: Any) -> list[str | Rejected]:  # noqa: ANN401
    """Return the captions of a row: of a text one, of a list of texts all, else why there is none."""
    if isinstance(caption, Rejected):
        return [caption]
    several = caption if isinstance(caption, list) else [caption]
    if not several or not all(map(is_text, several)):
        return [Rejected(f"no caption, but {ascii(caption)[:50]}")]
    return [one.strip() for one in several]


def _first_shape(rows: Rows) -> tuple[int, ...]:
    for key in rows.keys[:FIRST]:
        try:
            return rows.load(key).shape
        except Rejected as error:
            reason = f"{key}: {error}"
    raise DatasetError(f"none of the first {FIRST} samples can be used; {reason}")


def label_of(value: Any, key: str) -> int | str:  # noqa: ANN401
    """Return a label: a whole number, or a name. Raises DatasetError, naming the sample."""
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DatasetError(f"{key}: --label: {value} is neither a whole number nor a name")
    return value


def local_files(paths: Sequence[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files with these suffixes that `paths` name or hold, each folder's in the order of names.

    paths: files and folders, here or in buckets, from which they are first copied to the temporary folder.
    Raises DatasetError where there are none, StorageError.
    """
    found = []
    for path in paths:
        here = Path(path)
        if "://" in path:
            parent, _, last = path.rpartition("/")
            names = [last] if last.endswith(suffixes) else None
            parent = parent if names else path
            here = local_copy(parent, names or [x for x in Folder(path).names() if x.endswith(suffixes)])
        if here.is_dir():
            found += sorted(
                file for file in here.rglob("*") if file.name.endswith(suffixes) and file.is_file()
            )
        elif here.is_file() and here.name.endswith(suffixes):
            found.append(here)
        else:
            raise DatasetError(f"{path} is neither a folder nor a {' or '.join(suffixes)} file")
    if not found:
        raise DatasetError(f"{' '.join(paths)}: no {' or '.join(suffixes)} files")
    return found


def local_copy(uri: str, names: Sequence[str]) -> Path:
    """Return the local folder `uri`, or a temporary copy of these files of a bucket's folder.

    The copy is deleted when the program ends.
    """
    if "://" not in uri:
        return Path(uri)
    copy = tempfile.TemporaryDirectory(prefix="streaming_convert-")
    atexit.register(copy.cleanup)
    folder = Folder(uri)
    for name in tqdm(names, desc=f"downloading {uri}", unit="file"):
        if ".." in Path(name).parts:
            raise DatasetError(f"{uri} holds a name that leads outside: {name}")
        folder.get(name, Path(copy.name, name))
    return Path(copy.name)
