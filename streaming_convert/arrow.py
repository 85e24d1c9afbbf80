"""Parquet and Arrow files as sources: those of Hugging Face's hub and `datasets`, and img2dataset's.

They are read by pyarrow, which executes nothing that a file holds, one group of rows at a time.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.manifest import DatasetError
from storage.outside import OutsideError, parse_json
from streaming_convert.images import Note, Opener, Rejected, ignore
from streaming_convert.sources import PARTS, Source, refuse_huge
from streaming_convert.tables import Columns, Rows, as_source, label_of, local_files

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".arrow")
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow
READING = threading.Lock()  # of one group at a time, which all loading threads then share
NAMES = {
    "image": ("image", "img", "jpg", "png", "picture"),
    "label": ("label", "labels", "fine_label", "y", "class", "cls"),
    "caption": ("caption", "text", "prompt", "sentences", "captions"),
}  # by which columns are found where nobody names them


def parquet(
    paths: Sequence[str],
    columns: Columns,
    opener: Opener,
    classes: str | None = None,
    split: str | None = None,
) -> Source:
    """List the rows of Parquet or Arrow files, or of folders of them; those of a bucket are first copied.

    columns: of which a sample is made; where none is given, those whose name and type speak for themselves.
    split: of folders that hold several. Class names are those that `datasets` wrote into the files.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise DatasetError("parquet needs pyarrow: pip install 'terminal-velocity[data]'") from error
    files = of_split(
        [file for file in local_files(paths, SUFFIXES) if not file.name.startswith("cache-")], split
    )
    schema = schema_of(files[0])
    columns = columns.or_guessed(guess(schema), paths[0])
    if not columns.image:
        raise DatasetError(f"{paths[0]}: give --image, one of its columns {', '.join(schema.names)}")
    for file in files:
        if missing := set(columns.given().values()).difference(schema_of(file).names):
            raise DatasetError(
                f"{file} has no column {missing.pop()!r}, only {', '.join(schema_of(file).names)}"
            )
        if columns.label and class_names(schema_of(file), columns.label) != class_names(
            schema, columns.label
        ):
            raise DatasetError(f"{file}: the classes of {columns.label!r} are not those of {files[0]}")
    starts = [np.cumsum([0, *groups(file)]) for file in files]
    keys = [f"{i}/{row}" for i, start in enumerate(starts) for row in range(start[-1])]

    def load(key: str, note: Note = ignore) -> np.ndarray:
        i, row = map(int, key.split("/"))
        number = int(np.searchsorted(starts[i], row, "right")) - 1
        with READING:
            group = read_group(files[i], number, columns.image, os.getpid())
        cell = group[row - int(starts[i][number])].as_py()
        return opener.file(content(cell), note)

    told = {
        role: [value for file in files for value in read_column(file, name)]
        for role, name in columns.given().items()
        if role != "image"
    }
    versions = [
        f"{file.name} {file.stat().st_size}"
        for file, start in zip(files, starts, strict=True)
        for _ in range(start[-1])
    ]
    marks = told.get("label") and [label_of(one, key) for key, one in zip(keys, told["label"], strict=True)]
    names = columns.label and class_names(schema, columns.label)
    rows = Rows(keys, versions, load, marks, told.get("caption"), names)
    return as_source("parquet", rows, opener.size, classes)


def of_split(files: list[Path], split: str | None) -> list[Path]:
    """Return the files of a split: `train/0.arrow`, `train-00000-of-00002.parquet`.

    Raises DatasetError where there are none, and for files of several splits if none is named.
    """
    names = "|".join(map(re.escape, PARTS if split is None else [split]))
    parts: dict[str, list[Path]] = {}
    for file in files:
        found = (
            re.match(rf"({names})(?=[-_.]|$)", name, re.IGNORECASE) for name in (file.name, file.parent.name)
        )
        parts.setdefault(next((match[1].lower() for match in found if match), ""), []).append(file)
    if split is not None and split.lower() not in parts:
        raise DatasetError(f"--split {split}: none of {len(files)} files is called so, such as {files[0]}")
    if split is None and len(parts) > 1:
        raise DatasetError(
            f"{files[0].parent} holds {' and '.join(filter(None, sorted(parts)))}: name one with --split"
        )
    return parts[split.lower()] if split is not None else files


@lru_cache(maxsize=64)
def opened(file: Path, process: int) -> pq.ParquetFile | pa.Table:
    """Return an open Parquet file, or the table of an Arrow file, which stays on the disk.

    process: the number of the calling one, since none may use what another has opened.
    """
    import pyarrow as pa
    from pyarrow import parquet as pq

    try:
        if file.suffix == ".parquet":
            return pq.ParquetFile(file, pre_buffer=False)
        source = pa.memory_map(str(file))
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:  # `datasets` writes streams
            table = pa.ipc.open_stream(source).read_all()
            source.seek(max(0, source.size() - len(END)))
            if source.read() != END:
                raise DatasetError(f"{file} was cut short: it has no end of a stream") from None
            return table
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(f"cannot read {file} as Parquet or Arrow: {reason}") from error


def schema_of(file: Path) -> pa.Schema:
    """Return the names and types of a file's columns."""
    found = opened(file, os.getpid())
    return found.schema_arrow if file.suffix == ".parquet" else found.schema


def groups(file: Path) -> list[int]:
    """Return the number of rows of each group of a file."""
    found = opened(file, os.getpid())
    if file.suffix == ".parquet":
        return [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)]
    return [batch.num_rows for batch in found.to_batches()]


@lru_cache(maxsize=2)
def read_group(file: Path, number: int, column: str, process: int) -> pa.Array | pa.ChunkedArray:
    """Return one column of a group of rows; process: see `opened`. Raises DatasetError for a damaged file."""
    import pyarrow as pa

    found = opened(file, process)
    try:
        if file.suffix == ".parquet":  # without threads, which a fork would lose
            return found.read_row_group(number, [column], use_threads=False).column(column)
        return found.to_batches()[number].column(column)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: {' '.join(str(error).split())[:200]}") from error


def read_column(file: Path, column: str) -> list[Any]:
    """Return all values of a column, as Python's objects."""
    parts = range(len(groups(file)))
    try:
        return [one for number in parts for one in read_group(file, number, column, os.getpid()).to_pylist()]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file}: column {column!r} holds text that is not UTF-8") from error


def content(cell: Any) -> bytes:  # noqa: ANN401
    """Return the file of a picture that a cell holds, bare or as {bytes, path}. Raises Rejected."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise Rejected("holds no picture, at most the path of one")
    refuse_huge(len(data))
    return data


def guess(schema: pa.Schema) -> Columns:
    """Return which columns are probably the picture, the label and the caption."""
    import pyarrow as pa

    def is_text(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def fits(role: str, kind: pa.DataType) -> bool:
        if role == "image":
            bare = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
            return bare or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
        if role == "label":
            return pa.types.is_integer(kind) or is_text(kind)
        return is_text(kind) or (pa.types.is_list(kind) and is_text(kind.value_type))

    kinds = dict(zip(schema.names, schema.types, strict=True))
    found = {}
    for role, names in NAMES.items():
        known = [name for name in names if name in kinds and fits(role, kinds[name])]
        if known or (role == "image" and (known := [name for name in kinds if fits(role, kinds[name])])):
            found[role] = known[0]
    return Columns(**found)


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the names of the classes that `datasets` has written beside a column, or None."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = parse_json(text, "its description")["info"]["features"][column]["names"]
    except (OutsideError, KeyError, TypeError, IndexError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
