"""Pictures of a finished dataset's samples, to look at before training on them."""

import numpy as np
from PIL import Image

from storage import Folder
from storage.manifest import read_manifest
from streaming_convert.images import to_image
from streaming_convert.shards import open_shard, read_index


def sample_grid(uri: str, columns: int = 10, rows: int = 10, vae: str | None = None) -> Image.Image:
    """A grid of samples spread evenly over the split `uri`, in the order in which they are stored.

    Latents are decoded from their means if `vae` (a folder or hub name) is given; without, their first three
    channels are shown, scaled from mean -2 to mean +2 standard deviations.
    """
    manifest = read_manifest(uri)
    values = _spread(uri, manifest.column, min(columns * rows, manifest.num_samples))
    if manifest.column == "latents":
        means = values[:, : values.shape[1] // 2].astype(np.float32)
        values = (
            _decode(means, vae) if vae else _false_colour(means, manifest.channel_mean, manifest.channel_std)
        )
    _, channels, height, width = values.shape
    grid = np.full((channels, rows * height, columns * width), 255, np.uint8)
    for i, value in enumerate(values):
        top, left = i // columns * height, i % columns * width
        grid[:, top : top + height, left : left + width] = value
    return to_image(grid)


def _spread(uri: str, column: str, count: int) -> np.ndarray:
    """`count` samples (N, C, H, W), evenly spaced over the dataset; reads only the shards that hold them."""
    values = []
    folder = Folder(uri)
    entries = read_index(folder)
    ends = np.cumsum([entry["samples"] for entry in entries])
    chosen = np.linspace(0, ends[-1] - 1, count).round().astype(int)
    for number, entry in enumerate(entries):
        inside = chosen[np.searchsorted(ends, chosen, side="right") == number]
        shard = open_shard(folder, entry) if len(inside) else None
        values += [shard[i - ends[number] + entry["samples"]][column] for i in inside]
    return np.stack(values)


def _false_colour(means: np.ndarray, centre: list[float], spread: list[float]) -> np.ndarray:
    channels = 3 if means.shape[1] >= 3 else 1
    centre, spread = (np.array(values)[:channels, None, None] for values in (centre, spread))
    return (((means[:, :channels] - centre) / spread + 2) / 4 * 255).clip(0, 255).astype(np.uint8)


def _decode(means: np.ndarray, model: str) -> np.ndarray:
    import torch

    from streaming_convert.encoders import load_vae

    vae = load_vae(model)
    with torch.inference_mode():
        images = [vae.decode(torch.from_numpy(mean[None]).to(vae.device)).sample for mean in means]
    return ((torch.cat(images).cpu() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).numpy()
