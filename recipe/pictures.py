"""Pictures: latents to pixels, grids of samples, captions under them.

Arrays hold pixels as uint8 (C, H, W) with 1 or 3 channels, pictures as (H, W, 3). torch and matplotlib are
imported where they are needed, since loading them takes seconds.
"""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

    from recipe.normalizer import Normalizer

CAPTION_WIDTH, LINE_HEIGHT = 128, 12  # pixels; letters are 6 wide
CAPTION_LINES = 3


# ---------------------------------------------------------------- latents and values to pixels


def to_uint8(values: Tensor) -> Tensor:
    """Round pixel values in 0..255 units to the nearest uint8."""
    return values.round().clamp(0, 255).byte()


def false_colours(latents: Tensor) -> Tensor:
    """Show the first channels of latents (B, C, H, W), of mean 0 and deviation 1, as colours.

    Grey is 0, and two standard deviations on either side reach black and white. Returns uint8 (B, 3, H, W),
    or one channel where the latents have fewer than three.
    """
    return to_uint8(127.5 + 63.75 * latents[:, : 3 if latents.shape[1] >= 3 else 1])


def decode(vae: Any, latents: Tensor, encoder: dict[str, Any] | None = None, batch_size: int = 1) -> Tensor:
    """Decode latents (B, c, h, w), as they are stored, to pixel values (B, 3, H, W) in 0..255, not rounded.

    vae: an autoencoder of diffusers, which works in its own type, `batch_size` at a time; gradients flow
    through it. encoder: facts of the dataset's manifest: `scaling`, by which the latents were multiplied
    after `shift` was subtracted.
    """
    import torch

    encoder = encoder or {}
    latents = latents / encoder.get("scaling", 1.0) + encoder.get("shift", 0.0)
    scale, offset = pixel_range(vae)
    parts = latents.to(vae.device, vae.dtype).split(batch_size)
    return torch.cat([scale * (vae.decode(part).sample.float() + offset) for part in parts])


def pixel_range(vae: Any) -> tuple[float, float]:
    """Return s and o of pixels x / s - o as an autoencoder takes them: -1 to 1, or 0 to 1 for an RAE."""
    return (255.0, 0.0) if type(vae).__name__ == "AutoencoderRAE" else (127.5, 1.0)


def to_pixels(
    x0: Tensor, normalizer: Normalizer, column: str, vae: Any | None, encoder: dict[str, Any] | None = None
) -> Tensor:
    """Turn a network's output (B, C, H, W) into uint8 pixels (B, 1 or 3, ...), latents without `vae` into
    false colours.

    column: what the network was trained on, "image" or "latents"; encoder: see `decode`.
    """
    if column == "image":
        return to_uint8(normalizer.invert(x0))
    if vae is None:
        return false_colours(x0)
    return to_uint8(decode(vae, normalizer.invert(x0), encoder))


# ---------------------------------------------------------------- drawing


def to_array(image: Image.Image) -> np.ndarray:
    """Return the pixels as (C, H, W) uint8."""
    pixels = np.asarray(image)
    # Contiguous, because sums over channels and writing take 5 times as long on interleaved channels.
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def to_image(pixels: np.ndarray) -> Image.Image:
    """Return the image of pixels (C, H, W) with 1 or 3 channels: the inverse of `to_array`."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def grid(images: Tensor | np.ndarray, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """Draw images, uint8 (N, C, H, W) on the CPU, row by row as one picture (rows, columns, 3).

    Each is enlarged by the whole number `scale` and stands in a white frame, `gap` pixels wide.
    """
    images = np.asarray(images).repeat(scale, 2).repeat(scale, 3)
    columns = min(columns, len(images))
    frames = ((0, -len(images) % columns), (0, 0), (gap, 0), (gap, 0))
    cells = np.pad(images, frames, constant_values=255)
    _, channels, height, width = cells.shape
    rows = cells.reshape(-1, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = rows.reshape(-1, columns * width, channels)
    picture = np.pad(picture, ((0, gap), (0, gap), (0, 0)), constant_values=255)
    return picture.repeat(3 // channels, 2)


def captioned(pixels: np.ndarray, caption: str) -> np.ndarray:
    """Draw pixels (C, H, W) above the first lines of a caption, enlarged to about CAPTION_WIDTH."""
    picture = to_image(pixels)
    times = max(1, CAPTION_WIDTH // picture.width)
    picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    canvas = Image.new(picture.mode, (picture.width, picture.height + CAPTION_LINES * LINE_HEIGHT), "white")
    canvas.paste(picture)
    caption, file = lettering(caption)
    size = LINE_HEIGHT - 2
    font = ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)
    letters = picture.width // (6 if caption.isascii() else size)
    lines = textwrap.wrap(caption, letters, max_lines=CAPTION_LINES, placeholder=" ...")
    for i, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((1, picture.height + i * LINE_HEIGHT), line, "black", font)
    return to_array(canvas)


# ---------------------------------------------------------------- letters of any script


def lettering(text: str) -> tuple[str, str | None]:
    """Return the text as it can be drawn, and the font file to draw it with; None for the default font.

    This is the first font that has all letters: matplotlib's own, then those of the system. If there is none,
    the letters that matplotlib's font lacks become escapes such as \\u732b.
    """
    if text.isascii():
        return text, None
    import matplotlib
    from matplotlib import font_manager

    needed = {ord(letter) for letter in text if letter.isprintable()}
    own = str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
    for file in (own, *sorted(font_manager.findSystemFonts())):
        if needed <= _letters(file):
            return text, file
    known = _letters(own)
    escaped = (x if ord(x) in known or x.isspace() else x.encode("unicode_escape").decode() for x in text)
    return "".join(escaped), own


@cache
def _letters(file: str) -> frozenset[int]:
    """Return the code points that a font file has outlines for; none if it is damaged or has only bitmaps."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(file)
        return frozenset(face.get_charmap() if face.scalable else ())
    except (OSError, RuntimeError):
        return frozenset()
