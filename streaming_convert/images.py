"""Image files decoded to uint8 pixels of the requested size, or rejected with a reason.

All pictures that this project reads from files are opened here: those that are converted and those of a plain
folder that samples are compared with.
"""

import io
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from operator import methodcaller

import numpy as np
from PIL import ExifTags, Image, ImageCms

from recipe.pictures import to_array

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million; a larger picture is rejected as a decompression bomb
ADM_CROP = "ADM centre crop"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PROFILED = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # mode of pixels by an ICC profile's colour space
UPRIGHT = {  # the transposition that undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

warnings.filterwarnings("ignore", module="PIL")  # its warnings would break the progress bar


class Rejected(Exception):
    """A sample cannot be converted; the message is its reason in `rejected.jsonl`."""


Note = Callable[[str], object]  # receives a sentence about what is unusual in a picture that can be used


def ignore(text: str) -> None:
    """Drop a note."""


def decode(data: bytes, size: int | None = None, keep_grey: bool = False, note: Note = ignore) -> np.ndarray:
    """Decode a JPEG, PNG or WebP file to (3, size, size) uint8 in sRGB, or (3, H, W) without `size`.

    EXIF orientation is applied; an embedded ICC profile is converted to sRGB; CMYK, palette and grey become
    RGB, 16 bit becomes 8 by rounding, transparency becomes white; `keep_grey` makes a grey image (1, ...).
    `note` is called for an animation, whose first frame is used, and for an unusable profile. Raises Rejected
    for anything but one whole image of at most MAX_PIXELS pixels.
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
        frames = getattr(image, "n_frames", 1)
        image.load()
        image = to_mode(_upright(image), "L" if grey else "RGB", note)
    except Exception as error:  # a damaged file can raise nearly anything from inside its decoder
        raise Rejected(f"truncated or damaged: {error}") from error
    if frames > 1 and image.format != "MPO":  # a camera's JPEG with a preview or a depth map behind it
        note("animated, the first frame was taken")
    return to_array(centre_crop(image, size) if size else image)


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image by its EXIF orientation; unreadable EXIF data is ignored."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a damaged block can raise nearly anything
        return image
    return image if turn is None else image.transpose(turn)


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Rejected(f"decompression bomb: {width}x{height} pixels, at most {MAX_PIXELS} allowed")


def to_mode(image: Image.Image, mode: str, note: Note = ignore) -> Image.Image:
    """Convert to 8-bit "RGB" or "L" in sRGB, with transparency composited on white."""
    profile = image.info.get("icc_profile", b"")  # None if the profile of the file is damaged
    grey = Image.getmodebase(image.mode) == "L"
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip instead of scale
        levels = np.asarray(image).astype(np.uint32)
        levels[levels == image.info.get("transparency", -1)] = 65535  # white
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode != "CMYK":
        image = image.convert("L" if grey else "RGB")
    if profile != b"":
        image = _to_srgb(image, profile, note)
    if alpha is not None:
        image = Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), alpha)
    return image if image.mode == mode else image.convert(mode)  # convert() would copy


def _to_srgb(image: Image.Image, profile: bytes | None, note: Note) -> Image.Image:
    """Convert an "L", "RGB" or "CMYK" image to sRGB; with an unusable profile, only note that."""
    try:
        mode, transform = _transform(profile)
    except Exception:  # a damaged profile can raise nearly anything
        note("its ICC profile is damaged: the colours were taken for sRGB")
        return image
    if image.mode != mode:
        note(f"its ICC profile is for {mode} and the pixels are {image.mode}: they were taken for sRGB")
        return image
    return image if transform is None else transform(image)


@lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, Callable[[Image.Image], Image.Image] | None]:
    """Return the mode of pixels that an ICC profile is for, and the conversion to sRGB, None for sRGB itself.

    A profile counts as sRGB if it changes no colour by more than one level of 255, whatever its name is.
    """
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = PROFILED[opened.profile.xcolor_space.strip()]
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.HIGHRESPRECALC
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    convert = partial(ImageCms.applyTransform, transform=transform)
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    probe = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 18, 3))
    if mode == "L":  # LittleCMS interpolates dark greys badly, so all 256 levels are converted
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        convert = methodcaller("point", list(convert(probe).convert("L").tobytes()))
    same = mode != "CMYK" and np.abs(np.subtract(convert(probe), probe, dtype=int)).max() <= 1
    return mode, None if same else convert


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale and crop the image to its (size, size) centre, as guided-diffusion's image_datasets.py.

    The short side is halved with a box filter while it is at least twice `size`, then scaled bicubically.
    Raises Rejected if that gives more than MAX_PIXELS pixels, as for a very thin image.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    _refuse_bomb(*scaled)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
