"""Speed of loading and converting: `python -m benchmarks.loader` prints it and exits 1 if a bar is missed.

Training loader: shards of [8, 32, 32] float16 latents and labels through Composer's loader, beside a plain
torch Dataset over the same samples in an uncompressed ZIP of .npy files. Conversion to 256 px with one
worker, of JPEGs of that size and of ImageNet's usual size, beside the bare loop of decoding, scaling and
writing. Both sides run in pairs (`benchmarks.paired`), and files come from the page cache.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks import paired, seconds
from eval import command_line
from recipe.data import DataConfig, train_loader
from streaming_convert.__main__ import main as convert
from streaming_convert.images import centre_crop

BATCH = 128
WARM_UP = 8  # batches
SAMPLES, PHOTOS, PAIRS = 20_000, 600, 5  # latents, JPEGs, and measured pairs
PHOTO_SIZES = ((256, 256), (500, 375))  # the latter is ImageNet's usual size
LOADER_RATIO, CONVERSION_RATIO = 0.8, 1 / 1.3  # bars on our speed over the other side's
LOADER_RATE, CONVERSION_RATE = 8000, 300  # bars in samples per second


class ZipDataset(Dataset):
    """The dataset format of the released code: one .npy member per sample, labels in dataset.json."""

    def __init__(self, path: Path) -> None:
        self.path, self._zip = path, None
        with zipfile.ZipFile(path) as file:
            self.labels = json.loads(file.read("dataset.json"))["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if self._zip is None:  # opened in the worker: processes must not share a file position
            self._zip = zipfile.ZipFile(self.path)
        name, label = self.labels[index]
        with self._zip.open(name) as file:
            return np.load(file), label


def write_zip(path: Path, samples: int) -> None:
    """Write random float16 latents [8, 32, 32], mean and then deviation, into a ZIP."""
    rng = np.random.default_rng(0)
    names = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in range(samples)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name in names:
            buffer = io.BytesIO()
            np.save(buffer, np.abs(rng.standard_normal((8, 32, 32), np.float32)).astype(np.float16))
            file.writestr(name, buffer.getvalue())
        labels = [[name, i % 1000] for i, name in enumerate(names)]
        file.writestr("dataset.json", json.dumps({"labels": labels}))


def rate(batches: Iterable) -> float:
    """Return samples per second over one epoch after the first batches, in which the workers start."""
    iterator = iter(batches)
    for _ in range(WARM_UP):
        next(iterator)
    start = time.perf_counter()
    count = sum(1 for _ in iterator)
    return count * BATCH / (time.perf_counter() - start)


def loader_rates(folder: Path, workers: int) -> tuple[float, float, float]:
    """Return samples per second of the training loader and of the ZIP, and their ratio."""
    data = DataConfig(local=str(folder / "mds" / "train"), batch_size=BATCH, workers=workers)
    ours, samples = train_loader(data, seed=0), ZipDataset(folder / "latents.zip")
    options = {"shuffle": True, "drop_last": True, "persistent_workers": workers > 0}
    plain = DataLoader(samples, BATCH, num_workers=workers, **options)
    return paired(lambda: rate(ours), lambda: rate(plain), PAIRS)


def write_photos(folder: Path, count: int, width: int, height: int) -> None:
    """Write smooth JPEGs with some grain into a new folder."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.integers(-12, 13, (height, width, 1))
        pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05}.jpg", quality=90)


def conversion_rates(folder: Path) -> tuple[float, float, float]:
    """Return images per second of one conversion worker and of the bare loop, and their ratio."""
    photos = sorted(folder.iterdir())

    def timed(work: Callable[[Path], object]) -> float:
        with tempfile.TemporaryDirectory(dir=folder.parent) as out:
            return len(photos) / seconds(lambda: work(Path(out)))

    def ours(out: Path) -> None:
        words = ["images", str(folder), "--unlabelled", "--size", "256", "--workers", "1"]
        convert([*words, "--out", str(out)])

    def bare(out: Path) -> None:
        with open(out / "pixels", "wb") as file:
            for photo in photos:
                file.write(np.asarray(centre_crop(Image.open(photo).convert("RGB"), 256)).tobytes())

    return paired(lambda: timed(ours), lambda: timed(bare), PAIRS)


def print_rate(name: str, ours: float, other: str, theirs: float, ratio: float, met: bool) -> bool:
    """Print one line and return whether its bar is met."""
    print(f"{name}: {ours:.0f}/s, {other} {theirs:.0f}/s, ratio {ratio:.2f}{'' if met else '  BAR MISSED'}")
    return met


def main(arguments: list[str]) -> int:
    """Run all comparisons in a temporary folder (about 1 GB). Returns 1 if a bar is missed, else 0."""
    command_line("benchmarks.loader", __doc__).parse_args(arguments)
    met = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_zip(folder / "latents.zip", SAMPLES)
        words = ["zip", str(folder / "latents.zip"), "--out", str(folder / "mds")]
        convert([*words, "--workers", str(os.cpu_count())])
        for workers in (1, 2):
            ours, theirs, ratio = loader_rates(folder, workers)
            good = ratio >= LOADER_RATIO and (ours >= LOADER_RATE or workers > 1)
            met.append(print_rate(f"loader, {workers} workers", ours, "ZIP", theirs, ratio, good))
        for width, height in PHOTO_SIZES:
            name = f"{width}x{height}"
            write_photos(folder / name, PHOTOS, width, height)
            ours, theirs, ratio = conversion_rates(folder / name)
            good = ratio >= CONVERSION_RATIO or ours >= CONVERSION_RATE
            met.append(print_rate(f"conversion of {name}, 1 worker", ours, "bare loop", theirs, ratio, good))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
