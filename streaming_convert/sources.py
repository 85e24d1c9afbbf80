"""Sources of samples: each function lists one kind of input, and how to load one of its samples."""

import io
import os
import re
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image, ImageDraw, ImageFont, features

from recipe.pictures import to_image
from storage.manifest import DatasetError
from streaming_convert import captions, labels
from streaming_convert.images import ADM_CROP, FP16_MAX, FURTHER, SUFFIXES, Note, Opener, Rejected, ignore

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt")  # of labels or captions, which may lie among the images
EMOJI_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_LIST = "/usr/share/unicode/emoji/emoji-test.txt"
EMOJI_STRIKE = 109  # pixels per em of the only bitmaps in the font
EMOJI_WIDTH = 136  # of these bitmaps
PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".ppm", ".svg")
# Names of splits, not of classes.
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
MAX_FILE_BYTES = 2**28  # limit of one picture, array or caption, both compressed and not
PLAIN_ZIP = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # other methods have no bound on the unpacked size


@dataclass(frozen=True)
class Source:
    """A listed input: `load(keys[i])` returns an array of `shape` with label `labels[i]`, or raises Rejected.

    load: also takes a Note, which is called for what is unusual in a picture that can be used.
    column: "image" (uint8, C,H,W) or "latents" (float16, 2c,h,w) as `load` returns it.
    versions: sizes or checksums of the input files, by which changes are noticed.
    crop: how images were brought to `shape`, in words; "none" if they already had it.
    encoder: facts about the encoder that made the latents, for a source of latents.
    flips: whether mirror images are among the samples.
    captions: the caption of each sample, or why it has none; a key is repeated for each of its captions.
    """

    name: str
    keys: list[str]
    labels: np.ndarray
    class_names: list[str]
    shape: tuple[int, ...]
    load: Callable[..., np.ndarray]
    versions: list[str] | None = None
    column: str = "image"
    crop: str = "none"
    encoder: dict | None = None
    flips: bool = False
    captions: list[str | Rejected] | None = None

    def take(self, positions: np.ndarray) -> "Source":
        """Return the same source with only the samples at these positions."""
        lists = {name: getattr(self, name) for name in ("keys", "versions", "captions")}
        taken = {name: values and [values[i] for i in positions] for name, values in lists.items()}
        return replace(self, labels=self.labels[positions], **taken)

    def with_captions(self, each: "captions.Captions") -> "Source":
        """Return the same source with a sample for each caption, from the captions of each sample."""
        texts = [captions.texts(one) for one in each]
        positions = np.repeat(np.arange(len(texts)), [len(several) for several in texts])
        return replace(self.take(positions), captions=[one for several in texts for one in several])


def subset(source: Source, only: list[str] | None, limit: int | None, seed: int) -> Source:
    """Keep the classes `only`, numbered in that order, and `limit` random samples in their old order."""
    if only:
        unknown = [name for name in only if name not in source.class_names]
        if unknown:
            raise DatasetError("--only: " + labels.unknown_class(unknown[0], source.class_names))
        if len(set(only)) < len(only):
            raise DatasetError(f"--only names a class twice: {' '.join(only)}")
        new = {source.class_names.index(name): label for label, name in enumerate(only)}
        source = source.take(np.flatnonzero(np.isin(source.labels, list(new))))
        relabelled = np.array([new[label] for label in source.labels.tolist()], np.int64)
        source = replace(source, labels=relabelled, class_names=list(only))
    if limit is not None and limit < len(source.keys):
        source = source.take(np.sort(np.random.default_rng(seed).permutation(len(source.keys))[:limit]))
    if not source.keys:
        raise DatasetError("no samples are left to convert")
    return source


def first_good(keys: list[str], load: Callable[[str], np.ndarray], where: str) -> np.ndarray:
    """Return the first of 100 samples, spread over all, that can be loaded; if none, raise DatasetError."""
    for key in (tried := keys[:: 1 + len(keys) // 100]):
        try:
            return load(key)
        except Rejected as error:
            reason = f"{key}: {error}"
    raise DatasetError(f"{where}: none of {len(tried)} samples can be used; {reason}")


def digits() -> Source:
    """List scikit-learn's 1797 handwritten digits, 8x8, with their values 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    return Source(
        name="digits",
        keys=[str(i) for i in range(len(pixels))],
        labels=data.target.astype(np.int64),
        class_names=[str(name) for name in data.target_names],
        shape=pixels.shape[1:],
        load=lambda key, note=ignore: pixels[int(key)],
    )


def image_folder(
    folder: str,
    opener: Opener,
    label_file: str | None = None,
    classes: str | None = None,
    unlabelled: bool = False,
    allow_empty: bool = False,
    told: captions.Told | None = None,
) -> Source:
    """List JPEG, PNG and WebP files in one folder per class, or anywhere with a label or caption file.

    Without a label file the first folder level names the classes, in alphabetical order, which for ImageNet's
    synsets is ImageNet's own; a file `classes` (ImageNet's LOC_synset_mapping.txt) sets another order.
    labels.csv, labels.json and dataset.json in `folder` are found automatically. A class folder without
    images is an error, or with `allow_empty` a class without samples. With captions (`told`) files need no
    label if none of them lies in a subfolder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"{folder} is not a folder")
    files = Archive(folder)
    keys = list_images(files, opener.suffixes)
    own = (str(root / name) for name in labels.LABEL_FILES if (root / name).is_file())
    label_file = label_file or next(own, None)
    names = labels.read_classes(classes) if classes else None
    numbers, class_names = np.zeros(len(keys), np.int64), []
    if label_file and not unlabelled:
        given = labels.from_file(label_file, keys)
        if not names:
            labels.refuse_values(given)
        numbers, class_names = labels.number(given, names)
    elif not unlabelled and (not told or any("/" in key for key in keys)):
        given, folders = labels.from_folders(folder, keys, allow_empty)
        if not names:
            _refuse_parts(folder, keys)
        numbers, class_names = labels.number(given, names or folders)
    source = Source(
        name="images",
        keys=keys,
        labels=numbers,
        class_names=class_names,
        shape=(3, opener.size, opener.size),
        load=lambda key, note=ignore: opener.decode(files.read(key), note),
        versions=[files.size(key) for key in keys],
        crop=ADM_CROP,
    )
    return _captioned(source, files, told)


def _refuse_parts(folder: str, keys: list[str]) -> None:
    """Raise DatasetError if the first folders are named like the splits of a dataset, not like classes."""
    parts = sorted({key.split("/")[0] for key in keys})
    if PARTS.issuperset(part.lower() for part in parts):
        first = next((part for part in parts if part.lower().startswith("train")), parts[0])
        raise DatasetError(
            f"{folder}: {' and '.join(parts)} look like parts of a dataset, not like classes. Fix: convert "
            f"{folder}/{first} alone (--val sets samples aside), or name them in --classes FILE if they are"
        )


def _captioned(source: Source, files: "Archive", told: captions.Told | None) -> Source:
    """Return the source with a sample for each caption, read from a file or beside the pictures."""
    if not told:
        return source
    if told.file == captions.BESIDE:
        return source.with_captions(captions.beside(source.keys, files.names, files.read))
    here, inside = Path(told.file), files.path / told.file
    if here.is_file() and inside.is_file() and not here.samefile(inside):
        raise DatasetError(f"--captions {told.file}: is here and in {files.path}: give its whole path")
    file = inside if inside.is_file() else here
    return source.with_captions(captions.from_file(str(file), source.keys, told.key))


def list_images(files: "Archive", suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """Return the sorted names of the files with these suffixes, and print which others are left out."""
    keys = sorted(name for name in files.names if name.lower().endswith(suffixes))
    others = [name for name in files.names.difference(keys) if not name.lower().endswith(TABLES)]
    read = ", ".join(suffixes)
    if pictures := [name for name in others if name.lower().endswith(PICTURES)]:
        ends = {Path(name).suffix.lower() for name in pictures}
        asked = " ".join(name for name, known in FURTHER.items() if ends.intersection(known))
        fix = f"Convert with --formats {asked}" if asked else "Make PNGs of them"
        print(
            f"warning: {files.path}: {_counted(pictures)} are left out, since only {read} files are read. "
            f"{fix} if they belong to the data."
        )
    if rest := set(others).difference(pictures):
        print(f"{files.path}: {_counted(rest)} are left out, since only {read} files are read.")
    if not keys:
        raise DatasetError(f"{files.path} holds no {read} files")
    return keys


def _counted(names: Iterable[str]) -> str:
    """Count the files of each suffix, as text: "3 .gif and 1 .tif files"."""
    counts = Counter(Path(name).suffix.lower() or "unnamed" for name in names)
    return " and ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items())) + " files"


def _walk(root: Path) -> Iterator[str]:
    """Yield the names of files below `root`, except hidden ones; links are followed unless they lead up."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        subfolders[:] = [
            name
            for name in subfolders
            if not labels.hidden(name) and not here.is_relative_to((here / name).resolve())
        ]
        for name in files:
            if not labels.hidden(name):
                yield Path(folder, name).relative_to(root).as_posix()


def archive(
    path: str, size: int | None = None, unlabelled: bool = False, told: captions.Told | None = None
) -> Source:
    """List a dataset of the released code: a ZIP or folder of PNG or NPY files, with labels in dataset.json.

    NPY files hold uint8 pixels (C,H,W), or float latents (2c,h,w): the posterior's mean, then its deviation.
    The first good file sets shape and kind; `size` crops and scales pixels.
    """
    files = Archive(path)
    keys = list_images(files, (*SUFFIXES, ".npy"))
    rows = None if unlabelled else files.labels()
    numbers, class_names = np.zeros(len(keys), np.int64), []
    if rows is not None:
        numbers, class_names = labels.number(labels.match(rows, keys, f"{path}: dataset.json"))
    first = first_good(keys, lambda key: files.sample(key, Opener(size, keep_grey=True)), path)
    opener = Opener(size, keep_grey=len(first) == 1)
    latents = first.dtype == np.float16
    if latents and (problem := _negative_deviation(first)):
        raise DatasetError(
            f"{path}: {problem}. Latents are means and then, in as many channels again, standard deviations. "
            "Fix: append zeros to latents that are means alone, and exp(logvar / 2) to means with a logvar"
        )
    if latents and size:
        raise DatasetError(f"--size: {path} holds latents, which cannot be scaled")

    def load(key: str, note: Note = ignore) -> np.ndarray:
        sample = files.sample(key, opener, note)
        if problem := _negative_deviation(sample):
            raise Rejected(problem)
        return sample

    source = Source(
        name="zip",
        keys=keys,
        labels=numbers,
        class_names=class_names,
        shape=first.shape,
        load=load,
        versions=[files.version(key) for key in keys],
        column="latents" if latents else "image",
        crop=ADM_CROP if size else "none",
        encoder={"name": "precomputed", "hash": None, "scaling": 1.0} if latents else None,
    )
    return _captioned(source, files, told)


def _negative_deviation(sample: np.ndarray) -> str | None:
    """Return what is wrong with float16 latents (2c,h,w) with negative deviations, else None."""
    if sample.dtype != np.float16 or not (sample[len(sample) // 2 :] < 0).any():
        return None
    return f"the last {len(sample) // 2} of {len(sample)} channels, the deviations, hold negative values"


def read_regular(path: Path) -> bytes:
    """Read a regular file, or the one that a link leads to, of at most MAX_FILE_BYTES. Raises Rejected.

    Pipes and devices are not opened: a pipe would block and a device may have no end.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Rejected("not a regular file")
        refuse_huge(found.st_size)
        with path.open("rb") as file:
            return file.read()
    except OSError as error:
        raise Rejected(f"cannot be read: {error.strerror}") from error


def refuse_huge(size: int) -> None:
    """Raise Rejected for a file of more than MAX_FILE_BYTES bytes."""
    if size > MAX_FILE_BYTES:
        raise Rejected(f"holds {size:,} bytes, at most {MAX_FILE_BYTES:,} are read")


class Archive:
    """The files of a ZIP or of a folder in the same layout; `names` are relative to it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._local = threading.local()  # an open ZIP has one file position, so each thread opens its own
        names = _walk(self.path) if self.path.is_dir() else self._zip().namelist()
        self.names = {name for name in names if not any(map(labels.hidden, name.split("/")))}

    def _zip(self) -> zipfile.ZipFile:
        if getattr(self._local, "pid", None) != os.getpid():
            try:
                if self.path.exists() and not self.path.is_file():
                    raise zipfile.BadZipFile("not a regular file")
                self._local.zip, self._local.pid = zipfile.ZipFile(self.path), os.getpid()
            except (OSError, zipfile.BadZipFile) as error:
                raise DatasetError(f"cannot read {self.path} as a folder or a ZIP file: {error}") from error
        return self._local.zip

    def read(self, name: str) -> bytes:
        """Read one file. Raises Rejected if it is damaged, not regular or larger than MAX_FILE_BYTES."""
        if self.path.is_dir():
            return read_regular(self.path / name)
        archive = self._zip()
        try:
            member = archive.getinfo(name)
            refuse_huge(member.file_size)
            if member.compress_type not in PLAIN_ZIP:
                raise Rejected("is compressed by another method than Deflate")
            with archive.open(member) as file:  # read() unpacks only this many bytes and checks the CRC
                return file.read(member.file_size)
        except Rejected:
            raise
        except Exception as error:  # damage and encryption raise many kinds
            raise Rejected(f"cannot be read: {error}") from error

    def size(self, name: str) -> str:
        """Return the size in bytes of one file of a folder, or "missing" for a dangling link."""
        path = self.path / name
        return str(path.stat().st_size) if path.exists() else "missing"

    def version(self, name: str) -> str:
        """Return a checksum of one file; sizes would not do, as a dataset's NPY files all have the same."""
        if self.path.is_dir():
            try:
                return xxhash.xxh64(read_regular(self.path / name)).hexdigest()
            except Rejected as error:
                return str(error)
        return f"{self._zip().getinfo(name).CRC:08x}"

    def labels(self) -> dict[str, str | int] | None:
        """Read {file: label} from dataset.json; None if it says that there are no labels."""
        if "dataset.json" not in self.names:
            raise DatasetError(
                f"{self.path} holds no dataset.json with labels; pass --unlabelled to do without"
            )
        try:
            text = self.read("dataset.json")
        except Rejected as error:
            raise DatasetError(f"{self.path}: dataset.json {error}") from error
        return labels.parse_json(text, f"{self.path}: dataset.json")

    def sample(self, name: str, opener: Opener, note: Note = ignore) -> np.ndarray:
        """Load one image as uint8 (C,H,W), or latents as float16 (2c,h,w)."""
        data = self.read(name)
        if not name.lower().endswith(".npy"):
            return opener.decode(data, note)
        array = _array(data)
        return opener.fit(to_image(array)) if array.dtype == np.uint8 else array


def _array(data: bytes) -> np.ndarray:
    """Parse an NPY file into uint8 pixels or float16 latents (C,H,W) without leading axes of length 1."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        array = array.reshape(-1, *array.shape[-2:])
    except Exception as error:  # a damaged header can ask for any type, shape and memory
        raise Rejected(f"not an NPY file of images: {error}") from error
    pixels = array.dtype == np.uint8 and len(array) in (1, 3)
    latents = array.dtype.kind == "f" and len(array) % 2 == 0
    if array.ndim != 3 or not array.size or not (pixels or latents):
        wanted = "uint8 pixels (1 or 3 channels) nor float latents (mean, deviation)"
        raise Rejected(f"{array.dtype} {array.shape} is neither {wanted}")
    if pixels:
        return array
    if not (np.abs(array) <= FP16_MAX).all():
        raise Rejected("holds values that are not finite in float16")
    return array.astype(np.float16)


def emoji(size: int) -> Source:
    """List the fully qualified emoji of Unicode's emoji-test.txt, drawn in Noto Color Emoji on white.

    Groups are the classes, names the captions.
    """
    missing = [path for path in (EMOJI_FONT, EMOJI_LIST) if not Path(path).is_file()]
    if missing:
        raise DatasetError(f"{missing[0]} is missing: apt-get install fonts-noto-color-emoji unicode-data")
    layout = ImageFont.Layout.RAQM if features.check("raqm") else ImageFont.Layout.BASIC
    typeface = ImageFont.truetype(EMOJI_FONT, EMOJI_STRIKE, layout_engine=layout)
    listed = list(_listed_emoji(EMOJI_LIST))
    drawn = [emoji for emoji in listed if _is_one_glyph(typeface, emoji[0])]
    skipped = len(listed) - len(drawn)
    if skipped:
        why = "" if features.check("raqm") else "; Pillow lacks libraqm, which sequences of code points need"
        print(f"skipping {skipped} emoji that cannot be drawn as one picture{why}")
    keys, names = [key for key, _, _ in drawn], [name for _, _, name in drawn]
    numbers, class_names = labels.number([group for _, group, _ in drawn])
    lock, opener = threading.Lock(), Opener(size)  # FreeType faces are not thread-safe

    def load(key: str, note: Note = ignore) -> np.ndarray:
        with lock:
            return opener.fit(_draw_emoji(typeface, key))

    return Source("emoji", keys, numbers, class_names, (3, size, size), load, crop=ADM_CROP, captions=names)


def _listed_emoji(listing: str) -> Iterator[tuple[str, str, str]]:
    """Yield the code points ("1F1EF 1F1F5"), group ("Flags") and name ("flag: Japan") of each emoji."""
    group = ""
    for line in labels.read_text(listing).splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif found := re.match(r"([\w ]+?) *; fully-qualified *# \S+ E\S+ (.+)", line):
            yield found[1], group, found[2].strip()


def _emoji_text(key: str) -> str:
    return "".join(chr(int(code, 16)) for code in key.split())


def _is_one_glyph(typeface: ImageFont.FreeTypeFont, key: str) -> bool:
    """Return True if the font draws these code points as one picture: not as none, not side by side."""
    left, top, right, bottom = typeface.getbbox(_emoji_text(key))
    return bottom > top and right - left <= EMOJI_WIDTH


def _draw_emoji(typeface: ImageFont.FreeTypeFont, key: str) -> Image.Image:
    """Draw the emoji in the middle of a white square."""
    text = _emoji_text(key)
    left, top, right, bottom = typeface.getbbox(text)
    corner = (EMOJI_WIDTH - right - left) // 2, (EMOJI_WIDTH - bottom - top) // 2
    canvas = Image.new("RGB", (EMOJI_WIDTH, EMOJI_WIDTH), "white")
    ImageDraw.Draw(canvas).text(corner, text, font=typeface, embedded_color=True)
    return canvas
