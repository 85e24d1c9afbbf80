"""Writes one shard, and reads finished ones without a StreamingDataset's shared memory and caches."""

import json

import numpy as np
import xxhash
from streaming import MDSWriter
from streaming.base.compression import decompress
from streaming.base.format.mds import MDSReader

from storage import Folder, MissingError
from storage.manifest import MANIFEST, DatasetError, check_inside, read_manifest


class ShardWriter(MDSWriter):
    """Streaming's writer, which copies the samples into the shard once instead of twice."""

    def encode_joint_shard(self) -> bytes:
        """The shard's bytes: number of samples, offsets, configuration, samples."""
        sizes = [len(sample) for sample in self.new_samples]
        start = 4 * (2 + len(sizes)) + len(self.config_data)
        header = np.array([len(sizes), *np.cumsum([start, *sizes])], np.uint32)
        return b"".join([header.tobytes(), self.config_data, *self.new_samples])


def dataset_folders(uri: str) -> dict[str, str]:
    """Names and URIs of the finished splits below `uri`, which is a converter's --out or one split itself."""
    uri = uri.rstrip("/")
    names = Folder(uri).names()
    splits = {name: f"{uri}/{name}" for name in ("train", "val") if f"{name}/{MANIFEST}" in names}
    if MANIFEST in names:
        splits = {uri.rsplit("/", 1)[-1]: uri}
    if not splits:
        read_manifest(uri)  # raises, saying what is missing
    return splits


def read_index(folder: Folder) -> list[dict]:
    """The entries of index.json, one per shard."""
    try:
        return json.loads(folder.read("index.json"))["shards"]
    except (MissingError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{folder.uri}/index.json is missing or damaged: {error}") from error


class Shard:
    """The samples of one MDS shard in memory: `shard[i]` is a dict of column values."""

    def __init__(self, entry: dict, data: bytes) -> None:
        """`entry` is the shard's in index.json, `data` its file. Raises DatasetError if they do not agree."""
        file = stored_file(entry)
        self.name = file["basename"]
        if len(data) != file["bytes"] or xxhash.xxh64(data).hexdigest() != file["hashes"]["xxh64"]:
            raise DatasetError(f"{self.name}: the size or the checksum is not that of the index")
        if entry["compression"]:
            data = decompress(entry["compression"], data)
            if len(data) != entry["raw_data"]["bytes"]:
                raise DatasetError(f"{self.name}: the size without compression is not that of the index")
        self._data = data
        self._offsets = np.frombuffer(data, np.uint32, entry["samples"] + 1, offset=4)
        self._reader = MDSReader.from_json("", None, entry)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict:
        return self._reader.decode_sample(self._data[self._offsets[index] : self._offsets[index + 1]])


def stored_file(entry: dict) -> dict:
    """What the index says of the file that holds a shard: its basename, bytes and hashes."""
    return entry["zip_data"] or entry["raw_data"]


def list_shards(entries: list[dict]) -> dict[str, dict]:
    """Entries of the index as the manifest has them: {file name: {bytes, xxh64, samples}}."""
    files = [(stored_file(entry), entry["samples"]) for entry in entries]
    return {
        file["basename"]: {"bytes": file["bytes"], "xxh64": file["hashes"]["xxh64"], "samples": samples}
        for file, samples in files
    }


def open_shard(folder: Folder, entry: dict) -> Shard:
    """Reads one shard of the dataset; DatasetError if its file is missing or damaged."""
    name = stored_file(entry)["basename"]
    check_inside([name], f"{folder.uri}/index.json")
    try:
        return Shard(entry, folder.read(name))
    except MissingError as error:
        raise DatasetError(f"{name}: the file is missing") from error
