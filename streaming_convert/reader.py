"""Finished datasets, verified sample by sample, or shown as a picture."""

from contextlib import suppress

import numpy as np
from PIL import Image
from tqdm import tqdm

from recipe.pictures import captioned, decode, false_colours, grid, to_uint8
from storage import Folder, MissingError
from storage.manifest import DatasetError, Manifest, Shard, open_dataset, stored_file
from streaming_convert.mds import read_shard
from streaming_convert.writer import REJECTED, Totals


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
    problems, totals = [], Totals(manifest)
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
                totals.add(sample)
    return problems or _check_totals(folder, manifest, totals)


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


def _check_totals(folder: Folder, manifest: Manifest, totals: Totals) -> list[str]:
    """Return where totals over all samples differ from the manifest."""
    found, problems = {**totals.results(), "rejected": 0}, []
    with suppress(MissingError):
        found["rejected"] = len(folder.read(REJECTED).splitlines())
    for key, value in found.items():
        stated = getattr(manifest, key)
        same = stated == value
        if key.startswith("channel"):
            same = len(stated) == len(value) and np.allclose(stated, value, rtol=1e-6, atol=1e-9)
        if not same:
            problems.append(f"{key}: the manifest says {stated}, there are {value}")
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
