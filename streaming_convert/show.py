"""Pictures of a finished dataset's samples, to look at before training on them."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from storage import Folder
from storage.manifest import read_manifest
from streaming_convert.images import to_array, to_image
from streaming_convert.shards import open_shard, read_index

CAPTION_WIDTH, CAPTION_LINES, LINE_HEIGHT = 128, 3, 12  # pixels, below a picture; letters are 6 wide


def sample_grid(uri: str, columns: int = 10, rows: int = 10, vae: str | None = None) -> Image.Image:
    """A grid of samples spread evenly over the split `uri`, in the order in which they are stored.

    Latents are decoded from their means if `vae` (a folder or hub name) is given; without, their first three
    channels are shown, scaled from mean -2 to mean +2 standard deviations. Captions stand under the pictures,
    which are made larger by a whole number, up to CAPTION_WIDTH.
    """
    manifest = read_manifest(uri)
    samples = _spread(uri, min(columns * rows, manifest.num_samples))
    values = np.stack([sample[manifest.column] for sample in samples])
    if manifest.column == "latents":
        means = values[:, : values.shape[1] // 2].astype(np.float32)
        values = (
            _decode(means, vae) if vae else _false_colour(means, manifest.channel_mean, manifest.channel_std)
        )
    if manifest.caption_bytes is not None:
        captions = [sample["caption"] for sample in samples]
        values = np.stack([captioned(*pair) for pair in zip(values, captions, strict=True)])
    _, channels, height, width = values.shape
    grid = np.full((channels, rows * height, columns * width), 255, np.uint8)
    for i, value in enumerate(values):
        top, left = i // columns * height, i % columns * width
        grid[:, top : top + height, left : left + width] = value
    return to_image(grid)


def captioned(pixels: np.ndarray, caption: str) -> np.ndarray:
    """The picture (C, H, W), enlarged, above the first lines of its caption; letters may lack in the font."""
    picture = to_image(pixels)
    times = max(1, CAPTION_WIDTH // picture.width)
    picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    canvas = Image.new(picture.mode, (picture.width, picture.height + CAPTION_LINES * LINE_HEIGHT), "white")
    canvas.paste(picture)
    lines = textwrap.wrap(caption, picture.width // 6, max_lines=CAPTION_LINES, placeholder=" ...")
    font = ImageFont.load_default(size=LINE_HEIGHT - 2)
    for i, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((1, picture.height + i * LINE_HEIGHT), line, "black", font)
    return to_array(canvas)


def _spread(uri: str, count: int) -> list[dict]:
    """`count` samples, evenly spaced over the dataset; reads only the shards that hold them."""
    samples = []
    folder = Folder(uri)
    entries = read_index(folder)
    ends = np.cumsum([entry["samples"] for entry in entries])
    chosen = np.linspace(0, ends[-1] - 1, count).round().astype(int)
    for number, entry in enumerate(entries):
        inside = chosen[np.searchsorted(ends, chosen, side="right") == number]
        shard = open_shard(folder, entry) if len(inside) else None
        samples += [shard[i - ends[number] + entry["samples"]] for i in inside]
    return samples


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
