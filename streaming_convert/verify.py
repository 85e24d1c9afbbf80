"""Checks a finished dataset against its index and its manifest, sample by sample."""

from collections import Counter

import numpy as np
from tqdm import tqdm

from storage import Folder, MissingError
from storage.manifest import STORED_DTYPE, DatasetError, Manifest, read_manifest
from streaming_convert.shards import Shard, list_shards, open_shard, read_index
from streaming_convert.writer import REJECTED, Moments


def verify(uri: str) -> list[str]:
    """Problems of one split; none if it is sound.

    Checked are the size and checksum of every shard; number, shape, type and label range of its samples; that
    latents are finite and deviations not negative; that embeddings of captions are finite, and zero beyond a
    length within theirs; and the manifest's shard list, counts of classes, rejected samples and lengths of
    captions, mean and deviation.
    Raises DatasetError if there is no manifest or no index to check against.
    """
    manifest = read_manifest(uri)
    folder = Folder(uri)
    entries = read_index(folder)
    try:
        return _problems(folder, manifest, entries)
    except DatasetError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return [f"index.json or manifest.json is damaged: {error!r}"]


def _problems(folder: Folder, manifest: Manifest, entries: list[dict]) -> list[str]:
    counts, lengths, moments = Counter(), Counter(), Moments(manifest.column)
    problems = _check_listing(entries, manifest)
    for entry in tqdm(entries, desc=f"verifying {folder.uri}", unit="shard", dynamic_ncols=True):
        try:
            problems += _check_samples(open_shard(folder, entry), manifest, counts, lengths, moments)
        except DatasetError as error:
            problems.append(str(error))
    return problems or _check_totals(manifest, counts, lengths, _count_rejected(folder), moments)


def _count_rejected(folder: Folder) -> int:
    try:
        return len(folder.read(REJECTED).splitlines())
    except MissingError:
        return 0


def _check_listing(entries: list[dict], manifest: Manifest) -> list[str]:
    """Whether index and manifest agree on names, sizes, checksums and numbers of samples."""
    listed = list_shards(entries)
    names = sorted(set(listed) | set(manifest.shards))
    return [f"{n}: index and manifest disagree" for n in names if listed.get(n) != manifest.shards.get(n)]


def _check_samples(
    shard: Shard, manifest: Manifest, counts: Counter, lengths: Counter, moments: Moments
) -> list[str]:
    """Problems of the samples of one shard, which are added to the counts, lengths and moments."""
    problems = []
    classes, columns = len(manifest.class_names) or 1, manifest.columns
    for i in range(len(shard)):
        sample = shard[i]
        if sample.keys() != columns.keys():
            return [f"{shard.name}: the columns are {sorted(sample)}, not {' and '.join(columns)}"]
        value, label = sample[manifest.column], sample["label"]
        if value.dtype != STORED_DTYPE[manifest.column] or list(value.shape) != manifest.shape:
            problems.append(f"{shard.name}, sample {i}: {value.dtype} {value.shape}, not {manifest.shape}")
            continue
        if not 0 <= label < classes:
            problems.append(f"{shard.name}, sample {i}: label {label} is not in 0..{classes - 1}")
        if not np.isfinite(value).all():
            problems.append(f"{shard.name}, sample {i}: not finite")
        elif manifest.column == "latents" and (value[len(value) // 2 :] < 0).any():
            problems.append(f"{shard.name}, sample {i}: a negative deviation")
        if manifest.text and (problem := _check_text(sample["text"], sample["text_length"], manifest.text)):
            problems.append(f"{shard.name}, sample {i}: {problem}")
        if manifest.caption_bytes is not None:
            lengths[str(len(sample["caption"].encode()))] += 1
        counts[int(label)] += 1
        moments.add(value[None])
    return problems


def _check_text(text: np.ndarray, length: int, stated: dict) -> str | None:
    """What is wrong with the embedding of one caption."""
    shape = (stated["tokens"], stated["width"])
    if text.dtype != np.float16 or text.shape != shape or not 1 <= length <= len(text):
        return f"text {text.dtype} {text.shape} of length {length}, not {shape} and 1 to {shape[0]}"
    if not np.isfinite(text).all() or text[length:].any():
        return "text is not finite, or not zero beyond its length"
    return None


def _check_totals(
    manifest: Manifest, counts: Counter, lengths: Counter, rejected: int, moments: Moments
) -> list[str]:
    """Whether the samples add up to what the manifest says."""
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
