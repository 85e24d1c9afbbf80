"""Reference statistics: `python -m eval.reference SOURCE --extractor NAME --out stats.npz` makes them,
`read_statistics` reads them and those that others publish.

SOURCE is a dataset folder of `streaming_convert` with an image column, or any folder of images.
"""

import argparse
import math
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from streaming import StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.features import EXTRACTORS, FeatureExtractor, load_extractor
from eval.metrics import FeatureMoments
from eval.restricted import Global, Node, RefusedPickle, read_file

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
NUMPY = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
NUMPY_GLOBALS = NUMPY | {"numpy.ndarray", "numpy.dtype"}
MAX_ARRAY_BYTES = 2**28  # a covariance of 5,000 features
# What zipfile and numpy raise on damaged files.
NPZ_ERRORS = (ValueError, KeyError, OSError, EOFError, MemoryError, RuntimeError, struct.error, zlib.error)
NPZ_ERRORS += (NotImplementedError, TypeError, tokenize.TokenError, zipfile.BadZipFile)


class MDSImages(Dataset):
    """The image column of a dataset folder, each sample exactly once (a StreamingDataset iterated pads)."""

    def __init__(self, folder: Path) -> None:
        self.samples = StreamingDataset(local=str(folder), batch_size=1)
        if "image" not in self.samples[0]:
            raise ValueError(f"{folder}: no column `image`, found {', '.join(self.samples[0])}")

    def __len__(self) -> int:
        return self.samples.size  # the dataset's own length is this rank's share of it

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.samples[index]["image"].copy())


class ImageFiles(Dataset):
    """Every image below a folder, as RGB; all of one size."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise ValueError(f"{folder}: no index.json and no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        with Image.open(self.files[0]) as image:
            self.size = image.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        file = self.files[index]
        try:
            with Image.open(file) as image:
                pixels = np.array(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file}: not a readable image ({error})") from error
        if pixels.shape[1::-1] != self.size:
            raise ValueError(f"{file}: is {pixels.shape[1::-1]} pixels, the first image is {self.size}")
        return torch.from_numpy(pixels).permute(2, 0, 1)


def open_images(source: str | Path) -> Dataset:
    """The images of a dataset folder or image folder, as uint8 tensors (C, H, W).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there are no images in it.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    return MDSImages(folder) if (folder / "index.json").is_file() else ImageFiles(folder)


def feature_moments(batches: Iterable[Tensor], extractor: FeatureExtractor) -> FeatureMoments:
    """Moments of the features of uint8 images, given in batches (N, C, H, W)."""
    moments = None
    for images in batches:
        features = extractor(images)
        moments = moments or FeatureMoments(features.shape[1], shift=features.mean(0))
        moments.update(features)
    if moments is None:
        raise ValueError("no images")
    return moments


def write_statistics(path: str | Path, moments: FeatureMoments, extractor: str, source: str) -> None:
    """Writes mu (F,) and sigma (F, F) in float64, and what they are statistics of, as .npz."""
    mean, covariance = moments.compute()
    arrays = {"mu": mean.cpu().numpy(), "sigma": covariance.cpu().numpy(), "num_samples": int(moments.count)}
    np.savez(path, **arrays, extractor=extractor, source=source)


def read_statistics(path: str | Path, metric: str = "fid") -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F), float64, from a file of reference statistics; executes nothing.

    Args:
        path: an .npz with mu and sigma (ours, ADM's, EDM's), or a .pkl in one of three layouts: {mu, sigma},
            {metric: {mu, sigma}} (EDM2's), or sums {raw_mean, raw_cov, num_items} (StyleGAN3's FeatureStats).
        metric: the key where a file has several.

    Raises:
        ValueError: the file is damaged, holds something else, or its statistics are not finite.
        OSError: the file cannot be opened.
    """
    suffix = Path(path).suffix
    if suffix not in (".npz", ".pkl"):
        raise ValueError(f"{path}: reference statistics are .npz or .pkl")
    mean, covariance = _read_npz(path) if suffix == ".npz" else _read_pickle(path, metric)
    mean, covariance = (torch.from_numpy(x.astype(np.float64)) for x in (mean, covariance))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"{path}: mean and covariance have shapes {shapes}, expected (F,) and (F, F)")
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError(f"{path}: the statistics are not finite")
    return mean, covariance


def _read_npz(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    with open(path, "rb") as file:
        try:
            members = zipfile.ZipFile(file).infolist()
            sizes = {member.filename: member.file_size for member in members}
            for name in ("mu", "sigma"):
                if not 0 < sizes.get(f"{name}.npy", 0) < MAX_ARRAY_BYTES:
                    raise ValueError(f"no array {name} of less than {MAX_ARRAY_BYTES} bytes")
            file.seek(0)
            arrays = np.load(file, allow_pickle=False)
            statistics = arrays["mu"], arrays["sigma"]
            if any(array.dtype not in (np.float32, np.float64) for array in statistics):
                raise ValueError("mu and sigma are not float32 or float64")
            return statistics
        except NPZ_ERRORS as error:
            raise ValueError(f"{path}: not .npz statistics ({type(error).__name__}: {error})") from error


def _read_pickle(path: str | Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    content = read_file(path, NUMPY_GLOBALS)
    try:
        return _pickled_moments(content, metric)
    except RefusedPickle as error:
        raise RefusedPickle(f"{path}: {error}") from error


def _pickled_moments(content: object, metric: str) -> tuple[np.ndarray, np.ndarray]:
    if type(content) is dict and metric in content:
        content = content[metric]
    match content:
        case {"mu": mean, "sigma": covariance}:
            return _array(mean, "mu"), _array(covariance, "sigma")
        case {"raw_mean": total, "raw_cov": total_outer, "num_items": int(count)} if 0 < count < 2**53:
            mean, second = _array(total, "raw_mean") / count, _array(total_outer, "raw_cov") / count
            if second.shape != (mean.size, mean.size):
                raise RefusedPickle("raw_mean and raw_cov do not belong together")
            return mean, second - np.outer(mean, mean)
    raise RefusedPickle(f"neither {{mu, sigma}}, alone or under {metric!r}, nor raw sums of features")


def _array(node: object, name: str) -> np.ndarray:
    """The array that a pickled numpy array of little-endian floats describes."""
    match node:
        case Node(
            function, (Global("numpy.ndarray"), (0,), b"b"), (1, tuple(shape), dtype, bool(fortran), data)
        ):
            known = function in NUMPY and type(data) is bytes
        case _:
            known = False
    if not known:
        raise RefusedPickle(f"{name}: not a numpy array")
    match dtype:
        case Node("numpy.dtype", (("f4" | "f8") as kind, False, True), (3, "<", None, None, None, -1, -1, 0)):
            itemsize = int(kind[1])
        case _:
            raise RefusedPickle(f"{name}: not little-endian float32 or float64")
    if (
        len(shape) > 2
        or any(type(n) is not int or n < 1 for n in shape)
        or math.prod(shape) * itemsize != len(data)
    ):
        raise RefusedPickle(f"{name}: the shape does not fit the data")
    return np.frombuffer(data, f"<{kind}").reshape(shape, order="F" if fortran else "C")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.reference", description=__doc__)
    parser.add_argument("source", help="dataset folder or folder of images")
    parser.add_argument("--extractor", choices=sorted(EXTRACTORS), required=True)
    parser.add_argument("--weights", help="the extractor's weights; fetched if possible when not given")
    parser.add_argument("--out", required=True, help="the .npz to write")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not args.out.endswith(".npz"):
        parser.error(f"--out: {args.out} must end in .npz")
    try:
        extractor = load_extractor(args.extractor, args.weights, args.device)
        loader = DataLoader(open_images(args.source), args.batch_size, num_workers=args.workers)
        moments = feature_moments(tqdm(loader, "features", unit="batch"), extractor)
        write_statistics(args.out, moments, args.extractor, args.source)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote the statistics of {int(moments.count):,} images to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
