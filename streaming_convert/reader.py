"""Finished datasets: read as a source, verified sample by sample, shown as a picture."""

import functools
from collections import Counter
from contextlib import suppress
from itertools import pairwise

import numpy as np
import xxhash
from PIL import Image
from tqdm import tqdm

from recipe.pictures import captioned, decode, false_colours, grid, to_uint8
from storage import Folder, MissingError
from storage.manifest import (
    INDEX,
    MANIFEST,
    DatasetError,
    Manifest,
    Shard,
    open_dataset,
    read_manifest,
    stored_file,
)
from streaming_convert.images import ADM_CROP, Note, ignore
from streaming_convert.sources import Source, scaled
from streaming_convert.tables import local_copy
from streaming_convert.writer import PLAN, REJECTED, Moments


def dataset_folders(uri: str) -> dict[str, str]:
    """Return {name: URI} of the finished splits of `uri`, which is a converter's --out or a split itself."""
    uri = uri.rstrip("/")
    names = Folder(uri).names()
    splits = {name: f"{uri}/{name}" for name in ("train", "val") if f"{name}/{MANIFEST}" in names}
    if MANIFEST in names:
        splits = {uri.rsplit("/", 1)[-1]: uri}
    if not splits:
        read_manifest(uri)  # raises an error that says what is missing
    return splits


def is_own(uri: str) -> bool:
    """Return True unless `uri` is a Streaming dataset of another program: an index without manifests."""
    names = set(Folder(uri).names())
    ours = (MANIFEST, f"train/{MANIFEST}", f"val/{MANIFEST}", PLAN)
    return INDEX not in names or any(name in names for name in ours)


def read_shard(folder: Folder, entry: Shard) -> list[dict]:
    """Return the samples of a shard, each {column: value}; `entry` is its entry in the index.

    The file is read without the shared memory and caches of a StreamingDataset. Raises DatasetError if it is
    missing or damaged.
    """
    from streaming.base.compression import decompress  # here, as importing Streaming takes seconds
    from streaming.base.format.mds import MDSReader

    file = stored_file(entry)
    name = file["basename"]
    try:
        data = folder.read(name)
    except MissingError as error:
        raise DatasetError(f"{name}: the file is missing") from error
    if len(data) != file["bytes"] or xxhash.xxh64(data).hexdigest() != file["hashes"]["xxh64"]:
        raise DatasetError(f"{name}: the size or the checksum is not that of the index")
    if entry["compression"]:
        data = decompress(entry["compression"], data)
        if len(data) != entry["raw_data"]["bytes"]:
            raise DatasetError(f"{name}: the size without compression is not that of the index")
    reader = MDSReader.from_json("", None, entry)
    try:
        offsets = np.frombuffer(data, np.uint32, entry["samples"] + 1, offset=4)
        return [reader.decode_sample(data[start:end]) for start, end in pairwise(offsets)]
    except ValueError as error:  # the checksum is right, so the file was written like that
        raise DatasetError(f"{name}: does not hold samples of the columns of the index: {error}") from error


def mds(uri: str, size: int | None = None) -> Source:
    """Open a finished dataset as a source, to store it in other shards, encoded, scaled or in part.

    A remote dataset is first downloaded to the temporary folder.
    """
    folders = dataset_folders(uri)
    if len(folders) > 1:
        raise DatasetError(f"{uri} holds {' and '.join(folders)}: name one of them")
    (folder,) = folders.values()
    manifest = read_manifest(folder)
    if manifest.column == "latents" and size:
        raise DatasetError(f"--size: {folder} holds latents, which cannot be scaled")
    if manifest.text:
        print(f"{folder}: its embeddings of captions are not copied; --text-encoder makes them again")
    _, entries = open_dataset(folder)
    store = Folder(str(local_copy(folder, [MANIFEST, INDEX, *manifest.shards])))
    shard = functools.lru_cache(maxsize=2)(lambda number: read_shard(store, entries[number]))
    keys, numbers = [], []
    versions, texts = [], []
    for i, entry in enumerate(tqdm(entries, desc="reading labels", unit="shard", disable=len(entries) < 100)):
        keys += [f"{i}/{j}" for j in range(entry["samples"])]
        numbers += [sample["label"] for sample in shard(i)]
        for j, sample in enumerate(shard(i)):
            manifest.check_label(sample["label"], f"{folder}: {stored_file(entry)['basename']}, sample {j}")
        texts += [sample["caption"] for sample in shard(i) if manifest.caption_bytes is not None]
        versions += [stored_file(entry)["hashes"]["xxh64"]] * entry["samples"]

    def load(key: str, note: Note = ignore) -> np.ndarray:
        i, j = map(int, key.split("/"))
        return scaled(shard(i)[j][manifest.column], size)

    return Source(
        name="mds",
        keys=keys,
        labels=np.array(numbers, np.int64),
        class_names=manifest.class_names,
        shape=(manifest.shape[0], size, size) if size else tuple(manifest.shape),
        load=load,
        versions=versions,
        column=manifest.column,
        crop=ADM_CROP if size else manifest.crop,
        encoder=manifest.encoder if manifest.column == "latents" else None,
        flips=manifest.flips,
        captions=texts or None,
    )


def verify(uri: str) -> list[str]:
    """Return the problems of one split; none if it is sound.

    This checks the size and checksum of every shard, the number and labels of its samples, that latents are
    finite and deviations not negative, that embeddings of captions are finite and zero beyond the caption,
    and the manifest's shards, class counts, rejected samples, lengths of captions, mean and deviation. If
    index and manifest are invalid or contradict each other, nothing else is read.
    """
    try:
        manifest, entries = open_dataset(uri)
    except DatasetError as error:
        return [str(error)]
    return _problems(Folder(uri), manifest, entries)


def _problems(folder: Folder, manifest: Manifest, entries: list[Shard]) -> list[str]:
    counts, lengths = Counter(), Counter()
    problems, moments = [], Moments(manifest.column)
    for entry in tqdm(entries, desc=f"verifying {folder.uri}", unit="shard", dynamic_ncols=True):
        name = stored_file(entry)["basename"]
        try:
            samples = read_shard(folder, entry)
        except DatasetError as error:
            problems.append(str(error))
            continue
        for i, sample in enumerate(samples):
            wrong = _check_sample(sample, manifest)
            problems += [f"{name}, sample {i}: {problem}" for problem in wrong]
            if not wrong:
                counts[int(sample["label"])] += 1
                moments.add(sample[manifest.column][None])
                if manifest.caption_bytes is not None:
                    lengths[str(len(sample["caption"].encode()))] += 1
    rejected = 0
    with suppress(MissingError):
        rejected = len(folder.read(REJECTED).splitlines())
    return problems or _check_totals(manifest, counts, lengths, rejected, moments)


def _check_sample(sample: dict, manifest: Manifest) -> list[str]:
    value, label = sample[manifest.column], sample["label"]
    problems, classes = [], len(manifest.class_names) or 1
    if not 0 <= label < classes:
        problems.append(f"label {label} is not in 0..{classes - 1}")
    if not np.isfinite(value).all():
        problems.append("not finite")
    elif manifest.column == "latents" and (value[len(value) // 2 :] < 0).any():
        problems.append("a negative deviation")
    if manifest.text and (problem := _check_text(sample["text"], sample["text_length"], manifest.text)):
        problems.append(problem)
    return problems


def _check_text(text: np.ndarray, length: int, stated: dict) -> str | None:
    """Return what is wrong with the embedding of one caption, or None."""
    if not 1 <= length <= stated["tokens"]:
        return f"text of length {length}, not 1 to {stated['tokens']}"
    if not np.isfinite(text).all() or text[length:].any():
        return "text is not finite, or not zero beyond its length"
    return None


def _check_totals(
    manifest: Manifest, counts: Counter, lengths: Counter, rejected: int, moments: Moments
) -> list[str]:
    """Return where totals over all samples differ from the manifest."""
    mean, std = moments.mean_std()
    found = {
        "num_samples": counts.total(),
        "class_counts": [counts[label] for label in range(len(manifest.class_names))],
        "rejected": rejected,
        "caption_bytes": dict(lengths) or None,
    }
    problems = [
        f"{key}: the manifest says {getattr(manifest, key)}, there are {value}"
        for key, value in found.items()
        if getattr(manifest, key) != value
    ]
    for key, value in {"channel_mean": mean, "channel_std": std}.items():
        stated = getattr(manifest, key)
        if len(stated) != len(value) or not np.allclose(stated, value, rtol=1e-6, atol=1e-9):
            problems.append(f"{key}: the manifest says {stated}, the shards give {value}")
    return problems


def sample_grid(uri: str, columns: int = 10, rows: int = 10, vae: str | None = None) -> Image.Image:
    """Draw a grid of samples, evenly spread over the split `uri`, in the order in which they are stored.

    The means of latents are decoded by `vae` (a folder or hub name); without one, their first three channels
    are shown, scaled from mean -2 to mean +2 standard deviations. Captions stand under their pictures, which
    are enlarged by a whole number, up to CAPTION_WIDTH.
    """
    manifest, entries = open_dataset(uri)
    samples = _spread(Folder(uri), entries, min(columns * rows, manifest.num_samples))
    values = np.stack([sample[manifest.column] for sample in samples])
    if manifest.column == "latents":
        values = _latent_pictures(values[:, : manifest.channels].astype(np.float32), manifest, vae)
    if manifest.caption_bytes is not None:
        captions = [sample["caption"] for sample in samples]
        values = np.stack([captioned(*pair) for pair in zip(values, captions, strict=True)])
    cells = np.full((columns * rows, *values.shape[1:]), 255, np.uint8)
    cells[: len(values)] = values
    picture = Image.fromarray(grid(cells, columns, gap=0))
    return picture.convert("L") if values.shape[1] == 1 else picture


def _spread(folder: Folder, entries: list[Shard], count: int) -> list[dict]:
    """Return `count` samples, evenly spaced over the dataset, and read only the shards that hold them."""
    samples, start = [], 0
    chosen = np.linspace(0, sum(entry["samples"] for entry in entries) - 1, count).round().astype(int)
    for entry in entries:
        end = start + entry["samples"]
        if len(inside := chosen[(start <= chosen) & (chosen < end)]):
            shard = read_shard(folder, entry)
            samples += [shard[i - start] for i in inside]
        start = end
    return samples


def _latent_pictures(means: np.ndarray, manifest: Manifest, vae: str | None) -> np.ndarray:
    """Return uint8 pictures of latents (N, c, h, w), decoded by the autoencoder `vae` or in false colours."""
    import torch  # here, as importing it takes seconds

    from recipe.pretrained import load_vae

    latents = torch.from_numpy(means)
    if vae is not None:
        with torch.inference_mode():
            return to_uint8(decode(load_vae(vae), latents, manifest.encoder)).cpu().numpy()
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (manifest.channel_mean, manifest.channel_std))
    return false_colours((latents - mean) / std).numpy()
