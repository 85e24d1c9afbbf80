"""Parquet and Arrow files as sources: those of Hugging Face's hub and `datasets`, and img2dataset's.

They are read by pyarrow, which executes nothing that a file holds, one group of rows at a time.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from storage.foreign import NAMES, by_name
from storage.manifest import DatasetError
from storage.outside import OutsideError, parse_json
from streaming_convert.images import Note, Opener, Rejected, ignore
from streaming_convert.sources import PARTS, Source, refuse_huge
from streaming_convert.tables import Columns, Rows, as_source, local_files

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".arrow")
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow
READING = threading.Lock()  # of one group at a time, which all loading threads then share


class Table(NamedTuple):
    """An open file: its columns' names and types, the rows of each of its groups, and what reads a column of
    one group.
    """

    schema: pa.Schema
    groups: list[int]
    read: Callable[[int, str], pa.Array | pa.ChunkedArray]


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
    found = [file for file in local_files(paths, SUFFIXES) if not file.name.startswith("cache-")]
    files = of_split(found, split)
    schema = opened(files[0], os.getpid()).schema
    columns = columns.or_guessed(guess(schema), paths[0])
    if not columns.image:
        raise DatasetError(f"{paths[0]}: give --image, one of its columns {', '.join(schema.names)}")
    names = class_names(schema, columns.label)
    for file in files:
        here = opened(file, os.getpid()).schema
        if missing := set(columns.given().values()).difference(here.names):
            raise DatasetError(f"{file} has no column {missing.pop()!r}, only {', '.join(here.names)}")
        if class_names(here, columns.label) != names:
            raise DatasetError(f"{file}: the classes of {columns.label!r} are not those of {files[0]}")
    told = {role: [] for role in columns.given() if role != "image"}
    keys, versions, starts = [], [], []
    for i, file in enumerate(files):
        starts.append(np.cumsum([0, *opened(file, os.getpid()).groups]))
        rows = range(starts[i][-1])
        keys += [f"{i}/{row}" for row in rows]
        versions += [f"{file.name} {file.stat().st_size}" for _ in rows]
        for role, values in told.items():
            values += read_column(file, columns.given()[role])

    def load(key: str, note: Note = ignore) -> np.ndarray:
        i, row = map(int, key.split("/"))
        number = int(np.searchsorted(starts[i], row, "right")) - 1
        with READING:
            group = read_group(files[i], number, columns.image, os.getpid())
        cell = group[row - int(starts[i][number])].as_py()
        return opener.decode(content(cell), note)

    return as_source("parquet", Rows(keys, versions, load, told, names), opener.size, classes)


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
def opened(file: Path, process: int) -> Table:
    """Open a Parquet or an Arrow file, of which the latter stays on the disk.

    process: the number of the calling one, since none may use what another has opened.
    """
    import pyarrow as pa

    try:
        return _parquet_file(file) if file.suffix == ".parquet" else _arrow_file(file)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(f"cannot read {file} as Parquet or Arrow: {reason}") from error


def _parquet_file(file: Path) -> Table:
    from pyarrow import parquet as pq

    found = pq.ParquetFile(file, pre_buffer=False)
    groups = [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)]

    def read(number: int, column: str) -> pa.ChunkedArray:
        # without threads, which a fork would lose
        return found.read_row_group(number, [column], use_threads=False).column(column)

    return Table(found.schema_arrow, groups, read)


def _arrow_file(file: Path) -> Table:
    import pyarrow as pa

    source = pa.memory_map(str(file))
    try:
        found = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:  # `datasets` writes streams
        found = pa.ipc.open_stream(source).read_all()
        source.seek(max(0, source.size() - len(END)))
        if source.read() != END:
            raise DatasetError(f"{file} was cut short: it has no end of a stream") from None
    batches = found.to_batches()
    groups = [batch.num_rows for batch in batches]
    return Table(found.schema, groups, lambda number, column: batches[number].column(column))


@lru_cache(maxsize=2)
def read_group(file: Path, number: int, column: str, process: int) -> pa.Array | pa.ChunkedArray:
    """Return one column of a group of rows; process: see `opened`. Raises DatasetError for a damaged file."""
    import pyarrow as pa

    try:
        return opened(file, process).read(number, column)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: {' '.join(str(error).split())[:200]}") from error


def read_column(file: Path, column: str) -> list[Any]:
    """Return all values of a column, as Python's objects."""
    parts = range(len(opened(file, os.getpid()).groups))
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
    fitting = {role: [name for name, kind in kinds.items() if fits(role, kind)] for role in NAMES}
    return Columns(**by_name(fitting, fitting["image"]))


def class_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """Return the names of the classes that `datasets` has written beside a column, or None."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = parse_json(text, "its description")["info"]["features"][column]["names"]
    except (OutsideError, KeyError, TypeError, IndexError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
