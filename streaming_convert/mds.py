"""Streaming datasets, this program's and those of others, as sources of pictures or latents."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from recipe.pictures import to_image
from storage import Folder, MissingError
from storage.foreign import KINDS, Shard, guess, read_index
from storage.foreign import columns as encodings_of
from storage.manifest import INDEX, MANIFEST, DatasetError, open_dataset, read_manifest, stored_file
from streaming_convert.images import ADM_CROP, FP16_MAX, Note, Opener, Rejected, ignore, refuse_bomb
from streaming_convert.sources import Source
from streaming_convert.tables import Columns, Rows, as_source, local_copy
from streaming_convert.writer import PLAN

MODES = ("1", "L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16")  # of `pil`; P lacks its palette
READING = threading.Lock()  # of one shard at a time, which all loading threads then share


def mds(
    uri: str,
    columns: Columns,
    opener: Opener,
    classes: str | None = None,
    channels: int = 4,
    encoder: dict | None = None,
) -> Source:
    """Open a Streaming dataset as a source, to store it in other shards, encoded, scaled or in part.

    A remote one is first downloaded. The other arguments are for datasets of other programs (see `foreign`).
    """
    names = set(Folder(uri).names())
    ours = (MANIFEST, f"train/{MANIFEST}", f"val/{MANIFEST}", PLAN)
    if INDEX in names and names.isdisjoint(ours):
        return foreign(uri, columns, opener, classes, channels, encoder)
    if columns.given():
        raise DatasetError(f"--{next(iter(columns.given()))}: {uri} is a dataset of this program")
    return own(uri, replace(opener, keep_grey=True))


def dataset_folders(uri: str) -> dict[str, str]:
    """Return {name: URI} of the finished splits of `uri`, which is a converter's --out or a split itself."""
    names = Folder(uri).names()
    splits = {name: f"{uri}/{name}" for name in ("train", "val") if f"{name}/{MANIFEST}" in names}
    if MANIFEST in names:
        splits = {uri.rsplit("/", 1)[-1]: uri}
    if not splits:
        read_manifest(uri)  # raises an error that says what is missing
    return splits


def own(uri: str, opener: Opener) -> Source:
    """Open a finished dataset of this program as a source; pictures are scaled as `opener` says."""
    folders = dataset_folders(uri)
    if len(folders) > 1:
        raise DatasetError(f"{uri} holds {' and '.join(folders)}: name one of them")
    (folder,) = folders.values()
    manifest, entries = open_dataset(folder)
    latents, size = manifest.column == "latents", opener.size
    if latents and size:
        raise DatasetError(f"--size: {folder} holds latents, which cannot be scaled")
    if manifest.text:
        print(f"{folder}: its embeddings of captions are not copied; --text-encoder makes them again")
    told = ["label"] if manifest.caption_bytes is None else ["label", "caption"]
    shards = Shards(folder, entries, [manifest.column, *told])
    found = shards.values(told)
    for number, label in enumerate(found["label"]):
        manifest.check_label(label, f"{folder}: sample {number}")

    def load(key: str, note: Note = ignore) -> np.ndarray:
        cell = shards.cell(key, manifest.column)
        return decoded(*cell) if latents else picture(*cell, opener, note)

    return Source(
        name="mds",
        keys=shards.keys,
        labels=np.array(found["label"], np.int64),
        class_names=manifest.class_names,
        shape=(manifest.shape[0], size, size) if size else tuple(manifest.shape),
        load=load,
        versions=shards.versions,
        column=manifest.column,
        crop=ADM_CROP if size else manifest.crop,
        encoder=manifest.encoder if latents else None,
        flips=manifest.flips,
        captions=found.get("caption"),
    )


def foreign(
    uri: str, columns: Columns, opener: Opener, classes: str | None, channels: int, encoder: dict | None
) -> Source:
    """Open a Streaming dataset of another program as a source.

    columns: of which a sample is made; where none is given, those whose name and encoding speak for
    themselves. channels: of latents that are stored as bytes; encoder: what made them.
    """
    entries = read_index(uri)
    columns = chosen(uri, encodings_of(entries[0]), columns)
    named = columns.given()
    shards = Shards(uri, entries, list(named.values()))

    def load(key: str, note: Note = ignore) -> np.ndarray:
        if columns.latents:
            return latents(*shards.cell(key, columns.latents), channels)
        return picture(*shards.cell(key, columns.image), opener, note)

    found = shards.values([name for role, name in named.items() if role in ("label", "caption")])
    told = {role: found[name] for role, name in named.items() if name in found}
    rows = Rows(shards.keys, shards.versions, load, told)
    return as_source("mds", rows, opener.size, classes, encoder if columns.latents else None)


def chosen(uri: str, found: dict[str, str], columns: Columns) -> Columns:
    """Return the columns to read: `columns`, or where none is given those that are found by their names.

    Raises DatasetError for a column that is not there, or is stored in a way that is not read.
    """
    columns = columns.or_guessed(Columns(**guess(found)), uri)
    shown = ", ".join(f"{name}: {encoding}" for name, encoding in found.items())
    if bool(columns.image) == bool(columns.latents):
        raise DatasetError(f"{uri}: give --image or --latents, one of its columns ({shown})")
    for role, name in columns.given().items():
        if name not in found:
            raise DatasetError(f"--{role}: {uri} has no column {name!r}, only {shown}")
        if found[name].partition(":")[0] not in KINDS[role]:
            known = ", ".join(KINDS[role])
            raise DatasetError(f"--{role}: column {name!r} is stored as {found[name]}, not as one of {known}")
    return columns


# ---------------------------------------------------------------- shards


class Shards:
    """Some columns of a Streaming dataset, undecoded; the last two shards that were read stay in memory.

    keys: "shard/sample" of each sample; versions: checksums, or sizes, of the shards that hold them.
    """

    def __init__(self, uri: str, entries: list[Shard], columns: Sequence[str]) -> None:
        files = [stored_file(entry) for entry in entries]
        folder = Folder(str(local_copy(uri, [file["basename"] for file in files])))

        def read(number: int) -> list[dict[str, bytes]]:
            return [{name: row[name] for name in columns} for row in read_cells(folder, entries[number])]

        self.read, self.encodings = functools.lru_cache(maxsize=2)(read), encodings_of(entries[0])
        self.sizes = [entry["samples"] for entry in entries]
        self.keys = [f"{i}/{j}" for i, size in enumerate(self.sizes) for j in range(size)]
        sums = [next(iter(file["hashes"].values()), str(file["bytes"])) for file in files]
        self.versions = [text for text, size in zip(sums, self.sizes, strict=True) for _ in range(size)]

    def cell(self, key: str, column: str) -> tuple[str, bytes]:
        """Return the encoding of a column, and what a sample holds there."""
        i, j = map(int, key.split("/"))
        with READING:
            return self.encodings[column], self.read(i)[j][column]

    def values(self, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Return what all samples hold in these columns; Rejected where that is damaged."""
        found = {name: [] for name in columns}
        numbers = range(len(self.sizes))
        for i in tqdm(numbers, "reading labels", unit="shard", disable=len(numbers) < 100):
            for name, values in found.items():
                values += [_decoded_or_not(self.encodings[name], row[name]) for row in self.read(i)]
        return found


def _decoded_or_not(encoding: str, data: bytes) -> Any:  # noqa: ANN401
    try:
        return decoded(encoding, data)
    except Rejected as error:
        return error


def read_shard(folder: Folder, entry: Shard) -> list[dict[str, Any]]:
    """Return the samples of a shard, each {column: value}; `entry` is its entry in a trusted index."""
    encodings = encodings_of(entry)
    try:
        return [
            {name: decoded(encodings[name], cell) for name, cell in row.items()}
            for row in read_cells(folder, entry)
        ]
    except Rejected as error:  # the checksum is right, so the file was written like that
        raise DatasetError(f"{folder.uri}/{stored_file(entry)['basename']}: a cell {error}") from error


def read_cells(folder: Folder, entry: Shard) -> Iterator[dict[str, bytes]]:
    """Yield what each sample of a shard holds in its columns, undecoded.

    The file is read without the shared memory and caches of a StreamingDataset. Raises DatasetError if it is
    missing, damaged, or not divided as its index says.
    """
    from streaming.base.compression import decompress  # here, as importing Streaming takes seconds
    from streaming.base.hashing import get_hash, is_hash

    file = stored_file(entry)
    where = f"{folder.uri}/{file['basename']}"
    try:
        data = folder.read(file["basename"])
    except MissingError as error:
        raise DatasetError(f"{where}: the file is missing") from error
    hashes = {name: wanted for name, wanted in file["hashes"].items() if is_hash(name)}
    if len(data) != file["bytes"] or any(get_hash(name, data) != wanted for name, wanted in hashes.items()):
        raise DatasetError(f"{where}: the size or the checksum is not that of the index")
    if entry.get("zip_data"):
        try:
            data = decompress(entry.get("compression"), data)
        except Exception as error:  # each library has its own
            raise DatasetError(f"{where}: cannot be decompressed: {error}") from error
    if len(data) != entry["raw_data"]["bytes"]:
        raise DatasetError(f"{where}: {len(data)} bytes are not those of the index")
    try:
        for start, end in pairwise(np.frombuffer(data, np.uint32, entry["samples"] + 1, offset=4).tolist()):
            yield _split(data[start:end], entry)
    except ValueError as error:
        raise DatasetError(f"{where}: is not what its index says: {error}") from error


def _split(sample: bytes, entry: Shard) -> dict[str, bytes]:
    """Return what a sample holds in each column. Raises ValueError for a damaged one."""
    free = sum(not size for size in entry["column_sizes"])  # whose sizes stand at the sample's beginning
    lengths = iter(np.frombuffer(sample, np.uint32, free).tolist())
    cells, position = {}, 4 * free
    for name, size in zip(entry["column_names"], entry["column_sizes"], strict=True):
        end = position + (size or next(lengths))
        if end > len(sample):
            raise ValueError(f"column {name!r} ends at byte {end} of {len(sample)}")
        cells[name], position = sample[position:end], end
    return cells


# ---------------------------------------------------------------- cells


def decoded(encoding: str, data: bytes) -> Any:  # noqa: ANN401
    """Return what a cell holds. Raises Rejected where it is damaged."""
    from streaming.base.format.mds.encodings import mds_decode

    try:
        return mds_decode(encoding, data)
    except (ValueError, KeyError, IndexError, AttributeError, AssertionError) as error:
        raise Rejected(f"is no {encoding}: {error}") from error


def picture(encoding: str, data: bytes, opener: Opener, note: Note = ignore) -> np.ndarray:
    """Return the picture uint8 (C,H,W) that a cell holds. Raises Rejected."""
    kind = encoding.partition(":")[0]
    if kind == "pil":
        return opener.fit(_raw_picture(data), note)
    if kind != "ndarray":
        return opener.decode(data, note)
    pixels = decoded(encoding, data)
    if pixels.ndim == 3 and pixels.shape[0] not in (1, 3):
        pixels = pixels.transpose(2, 0, 1)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) not in (1, 3):
        raise Rejected(f"{pixels.dtype} {pixels.shape} is no picture: uint8 with 1 or 3 channels is")
    return opener.fit(to_image(np.ascontiguousarray(pixels)), note)


def _raw_picture(data: bytes) -> Image.Image:
    """Return the picture of Streaming's encoding `pil`: width, height, length of the mode, mode, pixels."""
    try:
        width, height, length = np.frombuffer(data, np.uint32, 3).tolist()
        mode, pixels = data[12 : 12 + length].decode(), data[12 + length :]
    except ValueError as error:
        raise Rejected(f"is no picture: {error}") from error
    if mode not in MODES:
        raise Rejected(f"a picture of mode {mode[:10]!r}, which is none of {', '.join(MODES)}")
    refuse_bomb(width, height)
    try:
        return Image.frombytes(mode, (width, height), pixels)
    except ValueError as error:
        raise Rejected(f"is no picture of {width}x{height} pixels: {error}") from error


def latents(encoding: str, data: bytes, channels: int) -> np.ndarray:
    """Return float16 (2c,h,w) of latents that are stored without deviations, which become 0. Raises Rejected.

    Bytes are float16 of `channels` square channels, as micro_diffusion and MosaicML's diffusion write them.
    """
    if encoding != "bytes":
        values = decoded(encoding, data)
    else:
        side = math.isqrt(len(data) // (2 * channels))
        if not data or 2 * channels * side**2 != len(data):
            raise Rejected(
                f"{len(data)} bytes are not float16 of {channels} square channels (see --channels)"
            )
        values = np.frombuffer(data, np.float16).reshape(channels, side, side)
    if values.ndim != 3 or values.dtype.kind != "f" or not (np.abs(values) <= FP16_MAX).all():
        raise Rejected(f"{values.dtype} {values.shape} are no latents: finite numbers (c,h,w) are")
    return np.concatenate([values, np.zeros_like(values)]).astype(np.float16)
