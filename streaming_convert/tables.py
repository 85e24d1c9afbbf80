"""What datasets of other programs have in common: rows with a picture, perhaps a label, perhaps captions."""

from __future__ import annotations

import atexit
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from storage import Folder
from storage.manifest import DatasetError
from streaming_convert import labels
from streaming_convert.images import ADM_CROP, Rejected
from streaming_convert.sources import Source, first_good


@dataclass(frozen=True)
class Columns:
    """The names of the columns that become a sample's image or latents, label and caption."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None
    latents: str | None = None

    def given(self) -> dict[str, str]:
        """Return those that have a name, by what they become."""
        return {one.name: name for one in fields(self) if (name := getattr(self, one.name))}

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
    told: perhaps "label", a whole number or a name of each, and "caption", a text, a list of several, or why
    there is none.
    """

    keys: list[str]
    versions: list[str]
    load: Callable[..., np.ndarray]
    told: dict[str, list[Any]] = field(default_factory=dict)
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
    if "label" in rows.told:
        marks = [label_of(one, key) for key, one in zip(rows.keys, rows.told["label"], strict=True)]
        known = labels.read_classes(classes) if classes else rows.class_names
        if not known:
            labels.refuse_values(marks)
        numbers, names = labels.number(marks, known)
    elif classes:
        raise DatasetError("--classes: there are no labels")
    source = Source(
        name=name,
        keys=rows.keys,
        labels=numbers,
        class_names=names,
        shape=first_good(rows.keys, rows.load, name).shape,
        load=rows.load,
        versions=rows.versions,
        column="image" if encoder is None else "latents",
        crop=ADM_CROP if size else "none",
        encoder=encoder,
    )
    return source.with_captions(rows.told["caption"]) if "caption" in rows.told else source


def label_of(value: Any, key: str) -> int | str:  # noqa: ANN401
    """Return a label: a whole number, or a name. Raises DatasetError, naming the sample."""
    if isinstance(value, str) and not re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", value):
        return value
    if isinstance(value, bool) or not isinstance(value, int | np.integer | str):
        why = value if isinstance(value, Rejected) else f"{value} is neither a whole number nor a name"
        raise DatasetError(f"{key}: --label: {why}")
    return int(value)


def local_files(paths: Sequence[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files with these suffixes that `paths` name or hold, each folder's in the order of names.

    paths: files and folders, here or in buckets, from which they are first copied to the temporary folder.
    Raises DatasetError where there are none, StorageError.
    """
    found = []
    for path in paths:
        here = Path(path)
        if "://" in path and path.endswith(suffixes):
            parent, _, name = path.rpartition("/")
            here = local_copy(parent, [name])
        elif "://" in path:
            here = local_copy(path, [name for name in Folder(path).names() if name.endswith(suffixes)])
        if here.is_dir():
            files = sorted(file for file in here.rglob("*") if file.is_file())
            found += [file for file in files if file.name.endswith(suffixes)]
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
