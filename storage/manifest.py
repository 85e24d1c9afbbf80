"""What a converted dataset says about itself: `manifest.json`, written last, so its presence means complete.

A dataset folder, local or in a bucket, holds `index.json` and `shard.*.mds` (MosaicML Streaming's format) and
this file. Training reads it for the class names and the per-channel statistics; `verify` checks it.
"""

import dataclasses
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import xxhash

from storage import Folder, MissingError, StorageError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
STORED_DTYPE = {"image": "uint8", "latents": "float16"}
WORK = ".parts"  # bookkeeping of an unfinished conversion, inside the dataset folder
RESULTS = ("num_samples", "class_counts", "channel_mean", "channel_std", "rejected", "shards")
RESULTS += ("caption_bytes",)
OPTIONAL = ("caption_bytes", "text")  # only where there are captions


class DatasetError(ValueError):
    """The input, the target or the request is wrong in a way that the user can mend; shown as one line."""


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

    source: str
    input: dict
    command: str
    column: str
    shape: list[int]
    class_names: list[str]
    encoder: dict
    crop: str
    flips: bool
    compression: str | None
    shard_samples: int
    schema_version: int = SCHEMA_VERSION
    num_samples: int = 0
    class_counts: list[int] = field(default_factory=list)
    channel_mean: list[float] = field(default_factory=list)
    channel_std: list[float] = field(default_factory=list)
    rejected: int = 0
    shards: dict[str, dict] = field(default_factory=dict)
    caption_bytes: dict[str, int] | None = None
    text: dict | None = None

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
    def copies(self) -> int:
        """How often an input sample is stored: twice where this conversion adds its mirror image."""
        return 2 if self.flips and not self.input["flips"] else 1

    def to_json(self) -> bytes:
        """The file's bytes; equal manifests give equal bytes."""
        return (json.dumps(_values(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "Manifest":
        """Parses `text`, read from `where` (named in errors). Raises DatasetError if it is not a manifest."""
        try:
            values = json.loads(text)
            version = values.get("schema_version")
            if version != SCHEMA_VERSION:
                raise DatasetError(f"{where}: schema_version is {version}, expected {SCHEMA_VERSION}")
            manifest = cls(**values)
            check_inside(manifest.shards, where)
            return manifest
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{where} is not a dataset manifest: {error}") from error


def check_inside(names: Iterable[str], where: str) -> None:
    """Raises DatasetError if one of the file names that `where` lists leads out of the dataset's folder."""
    for path in map(PurePosixPath, map(str, names)):
        if path.is_absolute() or ".." in path.parts:
            raise DatasetError(f"{where} names a file outside its folder: {path}")


def read_manifest(uri: str) -> Manifest:
    """Reads the manifest of the dataset folder `uri` (a local path, or s3://, gs://, oci://).

    Raises DatasetError when there is none: the folder is empty, or its conversion has not finished.
    """
    try:
        return Manifest.from_json(Folder(uri).read(MANIFEST), f"{uri}/{MANIFEST}")
    except MissingError as error:
        reason = "not a dataset, or its conversion did not finish"
        with suppress(StorageError):
            Folder(uri).read(f"train/{MANIFEST}")
            reason = f"that is in its splits, so name one of them: {uri}/train"
        raise DatasetError(f"{uri} holds no {MANIFEST}: {reason}") from error
    except StorageError as error:
        raise DatasetError(str(error)) from error


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
            return f"`{key}` is {_short(there.get(key))} there and {_short(here.get(key))} here"
    return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."
