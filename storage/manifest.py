"""The description of a converted dataset, `manifest.json`; it is written last, so it exists if all else does.

A dataset folder, local or in a bucket, holds `index.json` and `shard.*.mds` (MosaicML Streaming's format) and
this file. Training reads it for the class names and the per-channel statistics; `verify` checks it.

`open_dataset` is the only way to a dataset's shards: an index could name any decoder of Streaming (one of
them unpickles) and any file, so it is compared with the manifest before anything of it is used.
"""

import base64
import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import xxhash
from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from storage import Folder, Folders, MissingError, StorageError, foreign
from storage.foreign import INDEX, stored_file
from storage.outside import LARGEST, DatasetError, check_kind, conform, parse_json, short

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
STORED_DTYPE = {"image": "uint8", "latents": "float16"}
STORED_BYTES = {"uint8": 1, "float16": 2}
WORK = ".parts"  # bookkeeping of an unfinished conversion, inside the dataset folder
RESULTS = ("num_samples", "class_counts", "channel_mean", "channel_std", "rejected", "shards")
RESULTS += ("caption_bytes",)
OPTIONAL = ("caption_bytes", "text")  # only where there are captions
SHARD = re.compile(r"shard\.\d{5,9}\.mds(\.[a-z0-9]{1,9})?")
SHARD_BYTES = 2**32  # what the offsets of a shard can reach

Strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=2**48)]
Side = Annotated[int, Field(ge=1, le=2**16)]
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Size = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


class Input(TypedDict):
    """The input of a conversion; `Manifest` describes the keys."""

    __pydantic_config__ = Strict
    split: str
    splits: list[str]
    samples: Count
    flips: bool
    xxh64: Checksum


class Stored(TypedDict):
    """The manifest's entry for the file of a shard."""

    __pydantic_config__ = Strict
    bytes: Annotated[int, Field(ge=0, lt=SHARD_BYTES)]
    xxh64: Checksum
    samples: Annotated[int, Field(ge=1, lt=SHARD_BYTES)]


class TextFacts(TypedDict):
    """The text encoder of a dataset with embeddings; `Manifest` describes the keys."""

    __pydantic_config__ = Strict
    encoder: str
    sha256: str
    tokens: Side
    width: Side
    empty: str
    cut: NotRequired[Count]


@dataclass
class Manifest:
    """The description of one split. Without its results it is the plan that a conversion follows.

    column: "image" (uint8, C,H,W) or "latents" (float16, 2c,h,w: posterior mean, then standard deviation).
    input: {split, splits, samples, flips, xxh64}: this split, all splits of the dataset, and what went in:
        number of samples, whether mirror images were among them, checksum of the list of files and labels.
    flips: whether the dataset holds mirror images.
    channel_mean, channel_std: of what training sees before it normalises, one value per channel: pixels in
        0..255 units; for latents the c channels of mean + std * noise.
    shards: {file name: {bytes, xxh64, samples}}, of the file as stored.
    caption_bytes: {"17": 3}: three captions have 17 bytes of UTF-8; None without captions, {} in a plan.
    text: {encoder, sha256, tokens, width, empty, cut}: the text encoder's name and hash, the shape of an
        embedding, the empty prompt's own (base64 of little-endian float16, its valid tokens x width), and how
        many captions were longer than `tokens`; None without a text encoder.
    """

    __pydantic_config__ = Strict
    source: str
    input: Input
    command: str
    column: Literal["image", "latents"]
    shape: Annotated[list[Side], Field(min_length=3, max_length=3)]
    class_names: list[str]
    encoder: dict[str, str | int | float | None]
    crop: str
    flips: bool
    compression: str | None
    shard_samples: Annotated[int, Field(ge=1, lt=SHARD_BYTES)]
    schema_version: int = SCHEMA_VERSION
    num_samples: Count = 0
    class_counts: list[Count] = field(default_factory=list)
    channel_mean: list[float] = field(default_factory=list)
    channel_std: list[Annotated[float, Field(ge=0)]] = field(default_factory=list)
    rejected: Count = 0
    shards: dict[str, Stored] = field(default_factory=dict)
    caption_bytes: dict[Size, Count] | None = None
    text: TextFacts | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The MDS type of each column of a sample, by name."""
        shape = ",".join(map(str, self.shape))
        columns = {self.column: f"ndarray:{STORED_DTYPE[self.column]}:{shape}", "label": "int64"}
        if self.caption_bytes is not None:
            columns["caption"] = "str"
        if self.text:
            shape = f"{self.text['tokens']},{self.text['width']}"
            columns |= {"text": f"ndarray:float16:{shape}", "text_length": "int64"}
        return columns

    @property
    def sizes(self) -> dict[str, int | None]:
        """The bytes that each column's value takes in a shard; None for a caption, whose length varies."""
        value = STORED_BYTES[STORED_DTYPE[self.column]] * math.prod(self.shape)
        text = 2 * self.text["tokens"] * self.text["width"] if self.text else None
        known = {self.column: value, "label": 8, "caption": None, "text": text, "text_length": 8}
        return {name: known[name] for name in self.columns}

    @property
    def channels(self) -> int:
        """The number of channels that a network sees: of latents only the means."""
        return self.shape[0] // (1 if self.column == "image" else 2)

    def check_label(self, label: int, where: str) -> None:
        """Raise DatasetError, naming `where`, if a label is not a class; without classes all labels are 0."""
        classes = len(self.class_names) or 1
        if not 0 <= label < classes:
            raise DatasetError(f"{where}: label {label} is not in 0..{classes - 1}")

    @property
    def copies(self) -> int:
        """The number of times that an input sample is stored: 2 if this conversion adds its mirror image."""
        return 2 if self.flips and not self.input["flips"] else 1

    def to_json(self) -> bytes:
        """Return the content of the file; equal manifests give equal bytes."""
        return (json.dumps(_values(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, where: str, plan: bool = False) -> "Manifest":
        """Parse `text`, read from `where` (named in errors); a `plan` has no results yet.

        Raises DatasetError with the first key whose value cannot be, in itself or beside the others.
        """
        values = parse_json(text, where)
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise DatasetError(f"{where}: schema_version is {short(version)}, expected {SCHEMA_VERSION}")
        check_kind(cls, text, where)
        manifest = cls(**values)
        check_names(manifest.shards, where)
        if problem := contradiction(manifest, plan):
            raise DatasetError(f"{where}: {problem}")
        return manifest


def contradiction(manifest: Manifest, plan: bool) -> str | None:
    """Return what is wrong with the first key that contradicts another (counts, sums), or None."""
    if manifest.column == "latents" and manifest.shape[0] % 2:
        return f"shape: {manifest.shape} of latents, whose means and deviations have as many channels"
    if len(set(manifest.class_names)) < len(manifest.class_names):
        return "class_names: one of them occurs twice"
    if manifest.text and (problem := _empty_prompt(manifest.text)):
        return f"text.empty: {problem}"
    if plan:
        return None
    lengths = {"class_counts": len(manifest.class_names), "channel_mean": manifest.channels}
    for key, wanted in {**lengths, "channel_std": manifest.channels}.items():
        if len(found := getattr(manifest, key)) != wanted:
            return f"{key}: has {len(found)} values, not {wanted}"
    sums = {"shards": sum(shard["samples"] for shard in manifest.shards.values())}
    if manifest.class_names:
        sums["class_counts"] = sum(manifest.class_counts)
    if manifest.caption_bytes is not None:
        sums["caption_bytes"] = sum(manifest.caption_bytes.values())
    for key, found in sums.items():
        if found != manifest.num_samples or not found:
            return f"{key}: adds up to {found} samples, num_samples is {manifest.num_samples}"
    return None


def _empty_prompt(text: TextFacts) -> str | None:
    """Return what is wrong with the embedding of the empty prompt, or None."""
    try:
        size = len(base64.b64decode(text["empty"], validate=True))
    except ValueError as error:
        return str(error)
    token = 2 * text["width"]
    return None if size % token == 0 and 0 < size <= token * text["tokens"] else f"has {size} bytes"


def check_names(names: Iterable[str], where: str) -> None:
    """Raise DatasetError if a name that `where` lists is not the name of a shard in the same folder."""
    for name in names:
        if not SHARD.fullmatch(name):
            raise DatasetError(f"{where} names a file that is not a shard of its folder: {short(name)}")


def read_manifest(uri: str) -> Manifest:
    """Read the manifest of the dataset folder `uri` (a local path, or s3://, gs://, oci://).

    Raises DatasetError if there is none: the folder is empty, or its conversion has not finished.
    """
    try:
        return _read_manifest(Folder(uri))
    except StorageError as error:
        raise DatasetError(str(error)) from error


def _read_manifest(folder: Folder) -> Manifest:
    """Read the manifest in a folder. Raises DatasetError, StorageError."""
    uri = folder.uri
    try:
        return Manifest.from_json(folder.read(MANIFEST, LARGEST), f"{uri}/{MANIFEST}")
    except MissingError as error:
        raise DatasetError(f"{uri} holds no {MANIFEST}: {_without_manifest(folder)}") from error


def _without_manifest(folder: Folder) -> str:
    """Return what a folder without manifest is, and what to do with it. Raises StorageError."""
    names, uri = set(folder.names()), folder.uri
    if f"train/{MANIFEST}" in names or f"train/{INDEX}" in names:
        return f"that is in its splits, so name one of them: {uri}/train"
    if INDEX in names and not any(name.startswith(f"{WORK}/") for name in names):
        try:
            return f"it is {foreign.advice(uri)}"
        except DatasetError as error:
            return str(error)
    return "not a dataset, or its conversion did not finish"


class File(TypedDict):
    """The index's description of a file: its name, size in bytes and checksum."""

    __pydantic_config__ = Strict
    basename: str
    bytes: Annotated[int, Field(ge=0, lt=SHARD_BYTES)]
    hashes: TypedDict("Hashes", {"xxh64": Checksum})


class Shard(TypedDict):
    """An entry of the index. The stored file is zip_data if the shard is compressed, else raw_data."""

    __pydantic_config__ = Strict
    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[int | None]
    compression: str | None
    format: Literal["mds"]
    hashes: list[str]
    raw_data: File
    samples: Annotated[int, Field(ge=1, lt=SHARD_BYTES)]
    size_limit: int | str | None
    version: Literal[2]
    zip_data: File | None


class Index(TypedDict):
    """The content of index.json."""

    __pydantic_config__ = Strict
    shards: list[Shard]
    version: Literal[2]


def list_shards(entries: list[Shard]) -> dict[str, Stored]:
    """Convert entries of the index to the manifest's form: {file name: {bytes, xxh64, samples}}."""
    return {stored_file(entry)["basename"]: _stored(entry) for entry in entries}


def _stored(entry: Shard) -> Stored:
    file = stored_file(entry)
    return {"bytes": file["bytes"], "xxh64": file["hashes"]["xxh64"], "samples": entry["samples"]}


def open_dataset(uri: str, folders: Folders | None = None) -> tuple[Manifest, list[Shard]]:
    """Return the manifest of the dataset folder `uri` and the shards of its index, in the order of samples.

    folders: those that are open, which the dataset's joins. Raises DatasetError if one of the two is missing
    or invalid, or if they contradict each other.
    """
    try:
        folder = (Folders() if folders is None else folders)[uri]
        manifest = _read_manifest(folder)
        return manifest, read_index(folder.read(INDEX, LARGEST), manifest, f"{folder.uri}/{INDEX}")
    except StorageError as error:
        raise DatasetError(str(error)) from error


def read_index(text: bytes, manifest: Manifest, where: str) -> list[Shard]:
    """Return the shards of an index, read from `where` (named in errors), if it agrees with the manifest.

    Raises DatasetError with the shard and the key that contradicts the manifest.
    """
    entries = conform(Index, text, where)["shards"]
    check_names((file["basename"] for entry in entries for file in files_of(entry)), where)
    for entry in entries:
        if problem := _disagreement(entry, manifest):
            raise DatasetError(f"{where}: {stored_file(entry)['basename']}: {problem}")
    listed = list_shards(entries)
    if len(listed) < len(entries) or len(listed) < len(manifest.shards):
        raise DatasetError(f"{where}: lists {len(entries)} shards, {MANIFEST} {len(manifest.shards)}")
    return entries


def files_of(entry: Shard) -> list[File]:
    """Return the descriptions of a shard's files: uncompressed and, if there is one, compressed."""
    return [file for file in (entry["raw_data"], entry["zip_data"]) if file]


def _disagreement(entry: Shard, manifest: Manifest) -> str | None:
    """Return how an entry of the index contradicts the manifest or itself, or None."""
    names = entry["column_names"]
    stated = manifest.shards.get(stored_file(entry)["basename"])
    if stated is None:
        return f"{MANIFEST} does not list it"
    found = {**_stored(entry), "compression": entry["compression"], "columns": sorted(names)}
    wanted = {**stated, "compression": manifest.compression, "columns": sorted(manifest.columns)}
    for key, value in (("encodings", manifest.columns), ("sizes", manifest.sizes)):
        values = entry[f"column_{key}"]
        found[key] = dict(zip(names, values, strict=False)) if len(values) == len(names) else values
        wanted[key] = value
    for key, value in found.items():
        if value != wanted[key]:
            return f"{key}: {short(value)}, {MANIFEST} says {short(wanted[key])}"
    if bool(entry["zip_data"]) != bool(entry["compression"]):
        return "compression: without the compressed file, or the other way round"
    least = 4 * (2 + entry["samples"]) + entry["samples"] * sum(size or 4 for size in manifest.sizes.values())
    if entry["raw_data"]["bytes"] < least:
        return f"raw_data.bytes: {entry['raw_data']['bytes']}, its samples take {least} at least"
    return None


def _values(manifest: Manifest) -> dict:
    """Return the manifest's keys and values, without the optional ones that are not set."""
    values = dataclasses.asdict(manifest)
    return {key: value for key, value in values.items() if key not in OPTIONAL or value is not None}


def _decisive(plan: Manifest) -> dict:
    """Return the keys that decide the bytes of a dataset: not results, the command or folders of models."""
    values = _values(plan)
    values["encoder"].pop("model", None)
    if plan.text:
        values["text"] = {key: plan.text[key] for key in ("sha256", "tokens", "width")}
    return {key: value for key, value in values.items() if key not in (*RESULTS, "command")}


def fingerprint(plan: Manifest) -> str:
    """Return a checksum (xxh64) that two plans share if they describe the same dataset."""
    return xxhash.xxh64(json.dumps(_decisive(plan), sort_keys=True)).hexdigest()


def difference(plan: Manifest, other: Manifest) -> str | None:
    """Return where two plans describe different datasets, as text, or None."""
    here, there = _decisive(plan), _decisive(other)
    for key in {**here, **there}:
        if here.get(key) != there.get(key):
            return f"`{key}` is {short(there.get(key))} there and {short(here.get(key))} here"
    return None
