"""Streaming datasets of other programs as sources: pictures, arrays or latents, labels and captions."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from recipe.pictures import to_image
from storage import StorageError, foreign
from storage.manifest import DatasetError
from storage.outside import OutsideError
from streaming_convert.images import Note, Opener, Rejected, ignore, refuse_bomb
from streaming_convert.sources import FP16_MAX, Source
from streaming_convert.tables import Columns, Rows, as_source, local_copy

MODES = ("1", "L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16")  # of `pil`; P lacks its palette
ALLOWED = {"image": (*foreign.PICTURES, *foreign.ARRAYS), "latents": foreign.ARRAYS}
ALLOWED |= {"label": (*foreign.WHOLE, "str"), "caption": ("str",)}
READING = threading.Lock()  # of one shard at a time, which all loading threads then share


def streaming(
    uri: str,
    columns: Columns,
    opener: Opener,
    classes: str | None = None,
    channels: int = 4,
    encoder: dict | None = None,
) -> Source:
    """Open a Streaming dataset of another program as a source; a remote one is first downloaded.

    columns: of which a sample is made; where none is given, those whose name and encoding speak for
    themselves. channels: of latents that are stored as bytes; encoder: what made them.
    """
    try:
        entries = foreign.read_index(uri)
    except (StorageError, OutsideError) as error:
        raise DatasetError(str(error)) from error
    columns = chosen(uri, foreign.columns(entries[0]), columns)
    folder = local_copy(uri, [foreign.stored_file(entry)["basename"] for entry in entries])
    shard = functools.lru_cache(maxsize=2)(lambda number: list(read_shard(folder, entries[number], columns)))
    kinds = foreign.columns(entries[0])

    def load(key: str, note: Note = ignore) -> np.ndarray:
        i, j = map(int, key.split("/"))
        with READING:
            row = shard(i)[j]
        if columns.latents:
            return latents(kinds[columns.latents], row["latents"], channels)
        return picture(kinds[columns.image], row["image"], opener, note)

    keys, versions, told = [], [], {"label": [], "caption": []}
    for i, entry in enumerate(tqdm(entries, "reading labels", unit="shard", disable=len(entries) < 100)):
        file = foreign.stored_file(entry)
        keys += [f"{i}/{j}" for j in range(len(shard(i)))]
        versions += [next(iter(file["hashes"].values()), str(file["bytes"]))] * entry["samples"]
        for role in told.keys() & columns.given():
            told[role] += [value(kinds[columns.given()[role]], row[role]) for row in shard(i)]
    rows = Rows(keys, versions, load, told["label"] or None, told["caption"] or None)
    return as_source("mds", rows, opener.size, classes, encoder if columns.latents else None)


def chosen(uri: str, found: dict[str, str], columns: Columns) -> Columns:
    """Return the columns to read: `columns`, or where none is given those that are found by their names.

    Raises DatasetError for a column that is not there, or is stored in a way that is not read.
    """
    columns = columns.or_guessed(Columns(**foreign.guess(found)), uri)
    shown = ", ".join(f"{name}: {encoding}" for name, encoding in found.items())
    if bool(columns.image) == bool(columns.latents):
        raise DatasetError(f"{uri}: give --image or --latents, one of its columns ({shown})")
    for role, name in columns.given().items():
        if name not in found:
            raise DatasetError(f"--{role}: {uri} has no column {name!r}, only {shown}")
        if found[name].partition(":")[0] not in ALLOWED[role]:
            known = ", ".join(ALLOWED[role])
            raise DatasetError(f"--{role}: column {name!r} is stored as {found[name]}, not as one of {known}")
    return columns


def read_shard(folder: Path, entry: foreign.Shard, columns: Columns) -> Iterator[dict[str, bytes]]:
    """Yield what each sample of a shard holds in the chosen columns, undecoded, by what it becomes.

    Raises DatasetError if the file is missing, damaged, or not divided as its index says.
    """
    from streaming.base.compression import decompress  # here, as importing Streaming takes seconds
    from streaming.base.hashing import get_hash, is_hash

    file = foreign.stored_file(entry)
    path = folder / file["basename"]
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a name may hold what no file's can
        raise DatasetError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    hashes = {name: wanted for name, wanted in file["hashes"].items() if is_hash(name)}
    if len(data) != file["bytes"] or any(get_hash(name, data) != wanted for name, wanted in hashes.items()):
        raise DatasetError(f"{path}: the size or the checksum is not that of the index")
    if entry.get("zip_data"):
        try:
            data = decompress(entry.get("compression"), data)
        except Exception as error:  # each library has its own
            raise DatasetError(f"{path}: cannot be decompressed: {error}") from error
    if len(data) != entry["raw_data"]["bytes"]:
        raise DatasetError(f"{path}: {len(data)} bytes are not those of the index")
    try:
        offsets = np.frombuffer(data, np.uint32, entry["samples"] + 1, offset=4).tolist()
        for start, end in zip(offsets, offsets[1:], strict=False):
            yield dict(cells(data[start:end], entry, columns))
    except ValueError as error:
        raise DatasetError(f"{path}: is not what its index says: {error}") from error


def cells(sample: bytes, entry: foreign.Shard, columns: Columns) -> Iterator[tuple[str, bytes]]:
    """Yield (what it becomes, bytes) of a sample's chosen columns. Raises ValueError for a damaged sample."""
    wanted = {name: role for role, name in columns.given().items()}
    free = sum(not size for size in entry["column_sizes"])  # whose sizes stand at the sample's beginning
    lengths = iter(np.frombuffer(sample, np.uint32, free).tolist())
    position = 4 * free
    for name, size in zip(entry["column_names"], entry["column_sizes"], strict=True):
        end = position + (size or next(lengths))
        if end > len(sample):
            raise ValueError(f"column {name!r} ends at byte {end} of {len(sample)}")
        if name in wanted:
            yield wanted[name], sample[position:end]
        position = end


def value(encoding: str, data: bytes) -> int | str:
    """Return the label or caption that a cell holds. Raises DatasetError where it is damaged."""
    from streaming.base.format.mds.encodings import mds_decode

    try:
        found = mds_decode(encoding, data)
    except (ValueError, IndexError, AttributeError) as error:
        raise DatasetError(f"a cell is no {encoding}: {error}") from error
    return found if isinstance(found, str) else int(found)


def picture(encoding: str, data: bytes, opener: Opener, note: Note = ignore) -> np.ndarray:
    """Return the picture uint8 (C,H,W) that a cell holds. Raises Rejected."""
    kind = encoding.partition(":")[0]
    if kind == "pil":
        return opener.picture(_raw_picture(data), note)
    if kind != "ndarray":
        return opener.file(data, note)
    pixels = array(encoding, data)
    if pixels.ndim == 3 and pixels.shape[0] not in (1, 3):
        pixels = pixels.transpose(2, 0, 1)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) not in (1, 3):
        raise Rejected(f"{pixels.dtype} {pixels.shape} is no picture: uint8 with 1 or 3 channels is")
    return opener.picture(to_image(np.ascontiguousarray(pixels)), note)


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


def array(encoding: str, data: bytes) -> np.ndarray:
    """Return the array that a cell holds in Streaming's encoding `ndarray`. Raises Rejected."""
    from streaming.base.format.mds.encodings import mds_decode

    try:
        return mds_decode(encoding, data)
    except (ValueError, KeyError, IndexError, AssertionError) as error:
        raise Rejected(f"is no {encoding}: {error}") from error


def latents(encoding: str, data: bytes, channels: int) -> np.ndarray:
    """Return float16 (2c,h,w) of latents that are stored without deviations, which become 0. Raises Rejected.

    Bytes are float16 of `channels` square channels, as micro_diffusion and MosaicML's diffusion write them.
    """
    if encoding != "bytes":
        values = array(encoding, data)
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
