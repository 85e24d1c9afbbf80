"""What a converted dataset says about itself: `manifest.json`, written last, so its presence means complete.

A dataset folder, local or in a bucket, holds `index.json` and `shard.*.mds` (MosaicML Streaming's format) and
this file. Training reads it for the class names and the per-channel statistics; `verify` checks it.

`open_dataset` is the only way to a dataset's shards: an index may name any decoder that Streaming has (one of
them unpickles) and any file, so nothing of it is used before it is what the manifest describes.
"""

import base64
import dataclasses
import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Literal

import xxhash
from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from storage import Folder, MissingError, StorageError
from storage.outside import LARGEST, OutsideError, conform, parse_json, short

MANIFEST, INDEX = "manifest.json", "index.json"
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


class DatasetError(ValueError):
    """The input, the target or the request is wrong in a way that the user can mend; shown as one line."""


class Input(TypedDict):
    """What went into a conversion; see `Manifest`."""

    __pydantic_config__ = Strict
    split: str
    splits: list[str]
    samples: Count
    flips: bool
    xxh64: Checksum


class Stored(TypedDict):
    """What the manifest says of a shard's file."""

    __pydantic_config__ = Strict
    bytes: Annotated[int, Field(ge=0, lt=SHARD_BYTES)]
    xxh64: Checksum
    samples: Annotated[int, Field(ge=1, lt=SHARD_BYTES)]


class TextFacts(TypedDict):
    """The text encoder of a dataset with embeddings; see `Manifest`."""

    __pydantic_config__ = Strict
    encoder: str
    sha256: str
    tokens: Side
    width: Side
    empty: str
    cut: NotRequired[Count]


@dataclass
class Manifest:
    """Description of one split. Without its results it is the plan that a conversion follows.

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
        """Names and MDS types of a sample's values."""
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
        """Bytes of each column's value in a shard, None for a caption, whose length varies."""
        value = STORED_BYTES[STORED_DTYPE[self.column]] * math.prod(self.shape)
        text = 2 * self.text["tokens"] * self.text["width"] if self.text else None
        known = {self.column: value, "label": 8, "caption": None, "text": text, "text_length": 8}
        return {name: known[name] for name in self.columns}

    @property
    def channels(self) -> int:
        """Channels of what a network sees: of latents the means alone."""
        return self.shape[0] // (1 if self.column == "image" else 2)

    def check_label(self, label: int, where: str) -> None:
        """Raises DatasetError if the label of the sample `where` is no class; without classes all are 0."""
        classes = len(self.class_names) or 1
        if not 0 <= label < classes:
            raise DatasetError(f"{where}: label {label} is not in 0..{classes - 1}")

    @property
    def copies(self) -> int:
        """How often an input sample is stored: twice where this conversion adds its mirror image."""
        return 2 if self.flips and not self.input["flips"] else 1

    def to_json(self) -> bytes:
        """The file's bytes; equal manifests give equal bytes."""
        return (json.dumps(_values(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, where: str, plan: bool = False) -> "Manifest":
        """Parses `text`, read from `where` (named in errors); a `plan` has no results yet.

        Raises DatasetError with the first key whose value cannot be, in itself or beside the others.
        """
        try:
            values = parse_json(text, where)
            version = values.get("schema_version") if isinstance(values, dict) else None
            if version != SCHEMA_VERSION:
                raise OutsideError(f"{where}: schema_version is {short(version)}, expected {SCHEMA_VERSION}")
            conform(cls, text, where)
        except OutsideError as error:
            raise DatasetError(str(error)) from error
        manifest = cls(**values)
        check_names(manifest.shards, where)
        if problem := contradiction(manifest, plan):
            raise DatasetError(f"{where}: {problem}")
        return manifest


def contradiction(manifest: Manifest, plan: bool) -> str | None:
    """The first key that does not fit the others: numbers of values, and sums. A plan has no results yet."""
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
    """What is wrong with the embedding of the empty prompt."""
    try:
        size = len(base64.b64decode(text["empty"], validate=True))
    except ValueError as error:
        return str(error)
    token = 2 * text["width"]
    return None if size % token == 0 and 0 < size <= token * text["tokens"] else f"has {size} bytes"


def check_names(names: Iterable[str], where: str) -> None:
    """Raises DatasetError if one of the names that `where` lists is not that of a shard in its own folder."""
    for name in names:
        if not SHARD.fullmatch(name):
            raise DatasetError(f"{where} names a file that is not a shard of its folder: {short(name)}")


def read_manifest(uri: str) -> Manifest:
    """Reads the manifest of the dataset folder `uri` (a local path, or s3://, gs://, oci://).

    Raises DatasetError when there is none: the folder is empty, or its conversion has not finished.
    """
    try:
        return Manifest.from_json(Folder(uri).read(MANIFEST, LARGEST), f"{uri}/{MANIFEST}")
    except MissingError as error:
        reason = "not a dataset, or its conversion did not finish"
        with suppress(StorageError):
            Folder(uri).read(f"train/{MANIFEST}")
            reason = f"that is in its splits, so name one of them: {uri}/train"
        raise DatasetError(f"{uri} holds no {MANIFEST}: {reason}") from error
    except StorageError as error:
        raise DatasetError(str(error)) from error


class File(TypedDict):
    """What the index says of a file: its name, bytes and checksum."""

    __pydantic_config__ = Strict
    basename: str
    bytes: Annotated[int, Field(ge=0, lt=SHARD_BYTES)]
    hashes: TypedDict("Hashes", {"xxh64": Checksum})


class Shard(TypedDict):
    """An entry of the index; zip_data is the file as stored where there is compression, raw_data else."""

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


def stored_file(entry: Shard) -> File:
    """What the index says of the file that holds a shard."""
    return entry["zip_data"] or entry["raw_data"]


def list_shards(entries: list[Shard]) -> dict[str, Stored]:
    """Entries of the index as the manifest has them: {file name: {bytes, xxh64, samples}}."""
    files = [(stored_file(entry), entry["samples"]) for entry in entries]
    return {
        file["basename"]: {"bytes": file["bytes"], "xxh64": file["hashes"]["xxh64"], "samples": samples}
        for file, samples in files
    }


def open_dataset(uri: str) -> tuple[Manifest, list[Shard]]:
    """The manifest of the dataset folder `uri` and its index's shards, in the order of their samples.

    Raises DatasetError where one is missing, wrong in itself, or says something else than the other.
    """
    manifest = read_manifest(uri)
    try:
        return manifest, read_index(Folder(uri).read(INDEX, LARGEST), manifest, f"{uri}/{INDEX}")
    except StorageError as error:
        raise DatasetError(str(error)) from error


def read_index(text: bytes, manifest: Manifest, where: str) -> list[Shard]:
    """The shards of an index, read from `where` (named in errors), that fits the manifest.

    Raises DatasetError with the shard and the key that does not.
    """
    try:
        entries = parse_json(text, where)
        conform(Index, text, where)
    except OutsideError as error:
        raise DatasetError(str(error)) from error
    entries = entries["shards"]
    check_names((file["basename"] for entry in entries for file in files_of(entry)), where)
    for entry in entries:
        if problem := _disagreement(entry, manifest):
            raise DatasetError(f"{where}: {stored_file(entry)['basename']}: {problem}")
    listed = list_shards(entries)
    if len(listed) < len(entries) or len(listed) < len(manifest.shards):
        raise DatasetError(f"{where}: lists {len(entries)} shards, {MANIFEST} {len(manifest.shards)}")
    return entries


def files_of(entry: Shard) -> list[File]:
    """The files that a shard may be in: as it is decoded, and compressed."""
    return [file for file in (entry["raw_data"], entry["zip_data"]) if file]


def _disagreement(entry: Shard, manifest: Manifest) -> str | None:
    """Where an entry of the index says something else than the manifest, or cannot be."""
    file, names = stored_file(entry), entry["column_names"]
    stated = manifest.shards.get(file["basename"])
    if stated is None:
        return f"{MANIFEST} does not know it"
    found = {"bytes": file["bytes"], "xxh64": file["hashes"]["xxh64"], "samples": entry["samples"]}
    found |= {"compression": entry["compression"], "columns": sorted(names)}
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
    """Its keys, without those of captions where there are none."""
    values = dataclasses.asdict(manifest)
    return {key: value for key, value in values.items() if key not in OPTIONAL or value is not None}


def _decisive(plan: Manifest) -> dict:
    """What decides the bytes of a dataset: not its results, the command's words or the models' folders."""
    values = _values(plan)
    values["encoder"].pop("model", None)
    if plan.text:
        values["text"] = {key: plan.text[key] for key in ("sha256", "tokens", "width")}
    return {key: value for key, value in values.items() if key not in (*RESULTS, "command")}


def fingerprint(plan: Manifest) -> str:
    """xxh64 that two plans share if they describe the same dataset."""
    return xxhash.xxh64(json.dumps(_decisive(plan), sort_keys=True)).hexdigest()


def difference(plan: Manifest, other: Manifest) -> str | None:
    """Says where two plans describe different datasets, or None."""
    here, there = _decisive(plan), _decisive(other)
    for key in {**here, **there}:
        if here.get(key) != there.get(key):
            return f"`{key}` is {short(there.get(key))} there and {short(here.get(key))} here"
    return None
