"""Streaming datasets that other programs have written: index.json and shards, without our manifest.

Only what the converter asks for is decoded, and nothing by unpickling (Streaming's encoding `pkl`).
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from storage import Folder
from storage.outside import LARGEST, OutsideError, conform, short

INDEX = "index.json"
PICTURES = ("jpeg", "png", "pil")  # encodings that hold a picture and nothing else
ARRAYS = ("bytes", "ndarray")
WHOLE = ("int", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "str_int")
# The encodings from which each part of a sample is read.
KINDS = {"image": (*PICTURES, *ARRAYS), "latents": ARRAYS, "label": (*WHOLE, "str"), "caption": ("str",)}
# The names by which columns are found where nobody gives them.
NAMES = {
    "image": ("image", "img", "jpg", "jpeg", "png", "picture", "x"),
    "label": ("label", "labels", "fine_label", "y", "class", "cls", "target"),
    "caption": ("caption", "captions", "text", "prompt", "sentences"),
}

Loose = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
Size = Annotated[int, Field(ge=0, lt=2**32)]


class File(TypedDict):
    """The index's description of a file; `hashes` may be empty."""

    __pydantic_config__ = Loose
    basename: str
    bytes: Size
    hashes: dict[str, str]


class Shard(TypedDict):
    """An entry of the index. The stored file is zip_data if there is one, else raw_data."""

    __pydantic_config__ = Loose
    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[Size | None]
    compression: NotRequired[str | None]
    format: Literal["mds"]
    raw_data: File
    samples: Size
    version: Literal[2]
    zip_data: NotRequired[File | None]


class Index(TypedDict):
    """The content of index.json."""

    __pydantic_config__ = Loose
    shards: Annotated[list[Shard], Field(min_length=1)]
    version: Literal[2]


def stored_file(entry: Shard) -> File:
    """Return the index's description of the file in which a shard is stored."""
    return entry.get("zip_data") or entry["raw_data"]


def read_index(uri: str) -> list[Shard]:
    """Return the shards that the index of the folder `uri` lists.

    Raises StorageError, and OutsideError for an index that is no index, names files outside the folder, or
    lists shards of different columns.
    """
    where = f"{uri}/{INDEX}"
    entries = conform(Index, Folder(uri).read(INDEX, LARGEST), where)["shards"]
    for entry in entries:
        name = stored_file(entry)["basename"]
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise OutsideError(f"{where} names a file outside its folder: {short(name)}")
        if entry["raw_data"]["bytes"] < 4 * (entry["samples"] + 2):
            raise OutsideError(f"{where}: {short(name)}: {entry['samples']} samples do not fit its bytes")
        lengths = {len(entry[f"column_{key}"]) for key in ("names", "encodings", "sizes")}
        if len(lengths) > 1 or columns(entry) != columns(entries[0]):
            raise OutsideError(f"{where}: {short(name)}: its columns are not those of the first shard")
    return entries


def columns(entry: Shard) -> dict[str, str]:
    """Return the encodings of a shard's columns by their names."""
    return dict(zip(entry["column_names"], entry["column_encodings"], strict=False))


def guess(found: dict[str, str]) -> dict[str, str]:
    """Return which columns are probably the image, or else latents, the label and the caption."""

    def stored_as(kinds: tuple[str, ...]) -> list[str]:
        return [name for name, encoding in found.items() if encoding.partition(":")[0] in kinds]

    guessed = by_name({role: stored_as(KINDS[role]) for role in NAMES}, stored_as(PICTURES))
    latents = [name for name in stored_as(ARRAYS) if name.startswith("latent")]
    return guessed if "image" in guessed or not latents else {**guessed, "latents": latents[0]}


def by_name(fitting: dict[str, list[str]], pictures: list[str]) -> dict[str, str]:
    """Return the column of each part of a sample that has one of its usual names, among those that fit it.

    pictures: columns of which one is the image whatever its name, if none has a usual one.
    """
    usual = {
        role: [column for name in names for column in fitting[role] if column.lower() == name]
        for role, names in NAMES.items()
    }
    usual["image"] += pictures
    return {role: columns[0] for role, columns in usual.items() if columns}


def advice(uri: str) -> str:
    """Return what to say of a Streaming dataset of another program: its columns, and how to convert it.

    Raises StorageError or OutsideError where `uri` is none.
    """
    found = columns(read_index(uri)[0])
    shown = ", ".join(f"{name}: {encoding}" for name, encoding in found.items())
    options = " ".join(f"--{role} {name}" for role, name in guess(found).items())
    size = "" if "--latents" in options else " --size 64"
    command = f"python -m streaming_convert mds {uri} {options}{size} --out FOLDER"
    return f"a Streaming dataset of another program ({short(shown)}). Fix: {command}"
