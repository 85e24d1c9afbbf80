"""Image files decoded to uint8 pixels of the requested size, or rejected with a reason.

All pictures that this project reads from files are opened here: those that are converted and those of a plain
folder that samples are compared with.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import methodcaller

import numpy as np
from PIL import ExifTags, Image, ImageCms, features

from recipe.pictures import to_array
from storage.manifest import DatasetError

FORMATS = ("JPEG", "PNG", "WEBP")
FURTHER = {"gif": (".gif",), "bmp": (".bmp",), "tiff": (".tif", ".tiff"), "avif": (".avif",)}  # if asked for
FP16_MAX = 65504.0
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


@dataclass(frozen=True)
class Opener:
    """How the pictures of a source are opened.

    size: side of the square that they are brought to, None for as they are; keep_grey: a grey picture stays
    one channel; formats: of FURTHER, read beside JPEG, PNG and WebP. A Note is called for an animation, whose
    first frame is used, and for an unusable ICC profile.
    """

    size: int | None = None
    keep_grey: bool = False
    formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise DatasetError for AVIF where Pillow was built without it."""
        if "avif" in self.formats and not features.check("avif"):
            raise DatasetError("--formats avif: this Pillow reads none. Fix: pip install -U pillow")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The names of files that are pictures, by their ends."""
        return (*SUFFIXES, *(suffix for name in self.formats for suffix in FURTHER[name]))

    def decode(self, data: bytes, note: Note = ignore) -> np.ndarray:
        """Decode the content of a picture's file to (3, size, size) uint8 in sRGB, or (3, H, W).

        EXIF orientation is applied; an embedded ICC profile is converted to sRGB; CMYK, palette and grey
        become RGB, or grey (1, ...), 16 bit becomes 8 by rounding, transparency becomes white. Raises
        Rejected for anything but one whole image of at most MAX_PIXELS pixels in a format that is read.
        """
        if not data:
            raise Rejected("empty file")
        formats = (*FORMATS, *map(str.upper, self.formats))
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except Image.DecompressionBombError as error:
            raise Rejected("decompression bomb: " + str(error)) from error
        except Exception as error:
            *first, last = [name.replace("WEBP", "WebP") for name in formats]
            raise Rejected(f"not a {', '.join(first)} or {last} image") from error
        refuse_bomb(image.width, image.height)
        try:
            frames = getattr(image, "n_frames", 1)
            image.load()
            upright = _upright(image)
        except Exception as error:  # a damaged file can raise nearly anything from inside its decoder
            raise Rejected(f"truncated or damaged: {error}") from error
        pixels = self.fit(upright, note)
        if frames > 1 and image.format != "MPO":  # a camera's JPEG with a preview or a depth map behind it
            note(f"{'several pages' if image.format == 'TIFF' else 'animated'}, the first frame was taken")
        return pixels

    def fit(self, image: Image.Image, note: Note = ignore) -> np.ndarray:
        """Return a picture of any mode as `decode` does one from a file. Raises Rejected."""
        grey = self.keep_grey and Image.getmodebase(image.mode) == "L"
        try:
            image = to_mode(image, "L" if grey else "RGB", note)
        except Rejected:
            raise
        except Exception as error:  # as above
            raise Rejected(f"truncated or damaged: {error}") from error
        return to_array(centre_crop(image, self.size) if self.size else image)


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image by its EXIF orientation; unreadable EXIF data is ignored."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a damaged block can raise nearly anything
        return image
    return image if turn is None else image.transpose(turn)


def refuse_bomb(width: int, height: int) -> None:
    """Raise Rejected for a picture of more than MAX_PIXELS pixels, or of none."""
    if not width * height:
        raise Rejected(f"a picture of {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise Rejected(f"decompression bomb: {width}x{height} pixels, at most {MAX_PIXELS} allowed")


def to_mode(image: Image.Image, mode: str, note: Note = ignore) -> Image.Image:
    """Convert to 8-bit "RGB" or "L" in sRGB, with transparency composited on white."""
    if image.mode == "F":
        raise Rejected("holds numbers with fractions, which have no common scale")
    profile = image.info.get("icc_profile", b"")  # None if the profile of the file is damaged
    grey = Image.getmodebase(image.mode) == "L"
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip instead of scale
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise Rejected("holds numbers beyond 16 bits")
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
    refuse_bomb(*scaled)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
