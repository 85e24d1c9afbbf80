"""From an image file's bytes to uint8 pixels of the requested size, or a stated reason why not."""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million: a larger picture is taken for a decompression bomb
ADM_CROP = "ADM centre crop"
UPRIGHT = {  # what undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

warnings.filterwarnings("ignore", module="PIL")  # on huge or damaged files, into the progress bar


class Rejected(Exception):
    """This sample cannot be converted; the message is the reason that `rejected.jsonl` gives."""


def decode(data: bytes, size: int | None = None, keep_grey: bool = False) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP file to (3, size, size) uint8, or (3, H, W) without `size`.

    EXIF orientation is applied; CMYK, palette and grey become RGB, 16 bit becomes 8 by rounding, transparency
    becomes white; `keep_grey` makes a grey image (1, ...). Raises Rejected for anything but one whole image
    of at most MAX_PIXELS pixels.
    """
    if not data:
        raise Rejected("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Rejected("decompression bomb: " + str(error)) from error
    except Exception as error:
        raise Rejected("not a JPEG, PNG or WebP image") from error
    _refuse_bomb(image.width, image.height)
    try:
        grey = keep_grey and Image.getmodebase(image.mode) == "L"
        image.load()
        image = to_mode(_upright(image), "L" if grey else "RGB")
    except Exception as error:  # a damaged file can raise nearly anything from inside its decoder
        raise Rejected(f"truncated or damaged: {error}") from error
    return to_array(centre_crop(image, size) if size else image)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation asks; unreadable EXIF asks for nothing."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a damaged block can raise nearly anything
        return image
    return image if turn is None else image.transpose(turn)


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Rejected(f"decompression bomb: {width}x{height} pixels, at most {MAX_PIXELS} allowed")


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converts to 8-bit "RGB" or "L", compositing transparency on white."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip instead of scale
        levels = np.asarray(image).astype(np.uint32)
        levels[levels == image.info.get("transparency", -1)] = 65535  # white
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)  # which would copy


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The (size, size) middle of the image, scaled as by ADM's loader (guided-diffusion, image_datasets.py).

    The short side is halved with a box filter while it is at least twice `size`, then scaled bicubically.
    Raises Rejected if that gives more than MAX_PIXELS pixels, as of a very thin image.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    _refuse_bomb(*scaled)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels as (C, H, W) uint8."""
    pixels = np.asarray(image)
    # Contiguous, because summing and writing channels takes 5 times as long where they interleave.
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def to_image(pixels: np.ndarray) -> Image.Image:
    """The inverse of `to_array`, for 1 or 3 channels."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
