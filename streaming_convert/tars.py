"""Tars in webdataset's layout, which img2dataset writes too, as sources: 000.jpg, 000.txt, 000.cls, 000.json.

Only the headers are read at first; a sample is then read from its place in the file. Nothing is unpickled.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from storage.manifest import DatasetError
from storage.outside import OutsideError, parse_json
from streaming_convert import labels
from streaming_convert.images import Note, Opener, Rejected, ignore
from streaming_convert.sources import Source, refuse_huge
from streaming_convert.tables import Columns, Rows, as_source, local_files


class Place(NamedTuple):
    """The place of a file's content in its tar."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the content. Raises Rejected."""
        refuse_huge(self.size)
        try:
            with open(self.tar, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise Rejected(f"cannot be read: {error.strerror}") from error
        if len(data) < self.size:
            raise Rejected("the tar ends before the file does")
        return data


Sample = dict[str, Place]  # by the endings of the names: "jpg", "seg.png"


def webdataset(paths: Sequence[str], columns: Columns, opener: Opener, classes: str | None = None) -> Source:
    """List the samples of tars, or of folders of them; those of a bucket are first copied.

    columns: endings of files or keys of the .json; where none is given, the commonest picture, `cls` and
    `txt`.
    """
    samples: dict[str, Sample] = {}
    found = local_files(paths, (".tar",))
    for number, tar in enumerate(tqdm(found, "reading headers", unit="tar", disable=len(found) < 10)):
        for key, sample in read_headers(tar).items():
            samples[f"{number}/{key}"] = sample
    endings = Counter(ending for sample in samples.values() for ending in sample)
    columns = columns.or_guessed(guess([ending for ending, _ in endings.most_common()], opener), paths[0])
    if not columns.image:
        raise DatasetError(f"{paths[0]}: give --image, one of {', '.join(endings)}")
    pictures = {key: sample for key, sample in samples.items() if columns.image in sample}
    if len(pictures) < len(samples):
        print(f"{paths[0]}: {len(samples) - len(pictures)} samples without .{columns.image} are left out")

    def load(key: str, note: Note = ignore) -> np.ndarray:
        return opener.decode(pictures[key][columns.image].read(), note)

    told = {
        role: [cell(sample, name) for sample in pictures.values()]
        for role, name in columns.given().items()
        if role != "image"
    }
    versions = [str(sample[columns.image].size) for sample in pictures.values()]
    return as_source("webdataset", Rows(list(pictures), versions, load, told), opener.size, classes)


def read_headers(path: Path) -> dict[str, Sample]:
    """Return the samples of a tar by their names: files whose names are the same up to the first dot.

    Raises DatasetError for what is no tar, a compressed one, or one that was cut short.
    """
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                stem, _, ending = name.partition(".")
                if member.isreg() and not member.issparse() and not labels.hidden(name):
                    place = Place(path, member.offset_data, member.size)
                    samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[ending.lower()] = place
            archive.fileobj.seek(archive.offset)  # where reading stopped: at the end, in an empty block
            end = archive.fileobj.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError) as error:
        raise DatasetError(f"cannot read {path} as a tar (uncompressed): {error}") from error
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise DatasetError(f"{path} is damaged or was cut short: no end of a tar follows its last whole file")
    return samples


def guess(endings: Sequence[str], opener: Opener) -> Columns:
    """Return the endings of picture, label and caption among these, of which the commonest is first."""
    pictures = [ending for ending in endings if f".{ending}".endswith(opener.suffixes)]
    known = {role: ending for role, ending in (("label", "cls"), ("caption", "txt")) if ending in endings}
    return Columns(image=next(iter(pictures), None), **known)


def cell(sample: Sample, name: str) -> Any:  # noqa: ANN401
    """Return the text of the file that ends in `name`, or that key's value in the .json, or Rejected."""
    try:
        if name in sample:
            return sample[name].read().decode("utf-8-sig").strip()
        if "json" in sample:
            content = parse_json(sample["json"].read(), "its .json")
            if isinstance(content, dict) and content.get(name) is not None:
                return content[name]
    except (Rejected, OutsideError, UnicodeDecodeError) as error:
        return Rejected(f"{name}: {error}")
    return Rejected(f"no .{name}, nor a key {name!r} in its .json")
