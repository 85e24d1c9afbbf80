"""Real images in dataset folders, and statistics: what training and sweeps measure samples by."""

import hashlib
import math
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from streaming import LocalDataset
from streaming.base.compression import decompress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from recipe.data import collate
from recipe.features import (
    EXTRACTORS,
    FeatureExtractor,
    FeatureSet,
    Pixels,
    SmallImageClassifier,
    load_extractor,
)
from recipe.pretrained import hash_weights
from recipe.restricted import Global, Node, RefusedPickle, read_file
from recipe.text import Text, TextConfig
from storage.manifest import Shard, open_dataset

NUMPY = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
NUMPY_GLOBALS = NUMPY | {"numpy.ndarray", "numpy.dtype"}
STATISTICS = (".npz", ".pkl")
MAX_ARRAY_BYTES = 2**28  # a covariance of 5,000 features


def unpack(folder: Path, shard: Shard) -> None:
    """Unpack a compressed shard that has no plain file yet; several ranks may do it at once."""
    target = folder / shard["raw_data"]["basename"]
    if shard["compression"] and not target.is_file():
        part = target.with_suffix(f".{os.getpid()}.part")
        packed = folder / shard["zip_data"]["basename"]
        content = decompress(shard["compression"], packed.read_bytes())
        if len(content) != shard["raw_data"]["bytes"]:
            raise ValueError(f"{packed}: the size without compression is not that of the index")
        part.write_bytes(content)
        part.rename(target)


class MDSImages(Dataset):
    """The image column of a dataset folder; compressed shards are unpacked beside themselves.

    No StreamingDataset: iterated it pads, and its shared memory is for ranks that train together.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest, shards = open_dataset(str(folder))
        if self.manifest.column != "image":
            raise ValueError(f"{folder}: no column `image`, found {', '.join(self.manifest.columns)}")
        for shard in shards:
            unpack(folder, shard)
        self.folder, self.samples = str(folder), LocalDataset(str(folder))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.row(index)["image"].copy())

    def row(self, index: int) -> dict[str, Any]:
        """Return all columns of a sample.

        Raises ValueError where its shard holds something else, and IndexError, which ends a loop over the
        samples, behind the last one.
        """
        if index >= len(self):
            raise IndexError(index)
        where = f"{self.folder}: sample {index}"
        try:
            row = self.samples[index]
        except (ValueError, IndexError) as error:
            raise ValueError(f"{where}: is not what its index says: {error}") from error
        self.manifest.check_label(row["label"], where)
        return row

    def rows(self, index: Tensor) -> list[dict[str, Any]]:
        """Return all columns of these samples."""
        return [self.row(i) for i in index.tolist()]

    def labels(self, index: Tensor, classes: int) -> Tensor:
        """Return the labels (n,) of these samples; 0 for a network without classes."""
        return torch.tensor([int(row["label"]) for row in self.rows(index)]).clamp(max=classes)

    def text(self, index: Tensor, config: TextConfig) -> Text:
        """Return the captions of these samples as a network with `config` takes them."""
        batch = collate(self.rows(index), config)
        return Text(batch["text"], batch["text_length"])


def content_digest(source: str, extractor: FeatureExtractor) -> str:
    """Return a hash of the real images and the extractor's weights, as far as files tell them apart.

    A dataset folder's index has checksums; of other folders, names and sizes count.
    """
    path = Path(source)
    if (path / "index.json").is_file():
        content = (path / "index.json").read_bytes()
    elif path.is_dir():
        content = repr(sorted((str(p), p.stat().st_size) for p in path.rglob("*"))).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content + hash_weights(extractor.network).encode()).hexdigest()


def statistics_for(path: str, extractor: FeatureExtractor) -> tuple[Tensor, Tensor]:
    """Read statistics, which must be of the extractor's features, from a file. Raises OSError, ValueError."""
    moments = read_statistics(path)
    if (known := len(moments[0])) != (wanted := extractor.num_features):
        raise ValueError(f"reference: {path} is of {known} features, extractor {extractor.name} has {wanted}")
    return moments


def measure(
    images: Dataset,
    extractor: FeatureExtractor,
    batch_size: int,
    keep: Collection[str] = (),
    workers: int = 0,
) -> FeatureSet:
    """Compute the features of a data set, shared among the ranks; workers: processes that decode images."""
    index = torch.arange(dist.get_global_rank(), len(images), dist.get_world_size())
    loader = DataLoader(Subset(images, index.tolist()), batch_size, num_workers=workers)
    found = FeatureSet(extractor, keep)
    bar = tqdm(loader, "features", unit="batch", disable=dist.get_global_rank() != 0)
    for batch, places in zip(bar, index.split(batch_size), strict=True):
        found.add(batch, places)
    return found


def labelled(images: MDSImages, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Load images (N, C, H, W) and labels (N,) of a dataset folder, all or those of `index`, in memory."""
    samples = images.rows(torch.arange(len(images)) if index is None else index)
    pixels = torch.stack([torch.tensor(s["image"]) for s in samples])
    return pixels, torch.tensor([int(s["label"]) for s in samples])


def make_extractor(
    name: str, weights: str | None, images: Dataset | None, folder: str, device: str | torch.device
) -> FeatureExtractor:
    """Make the extractor of a name such as `classifier:2` (seed), `pixels:4` (pool) or `image-model:FOLDER`.

    Without `weights` a classifier is trained on the reference and kept in `folder`. Raises FileNotFoundError,
    and ValueError, also where the reference has no labels for a classifier.
    """
    kind, _, argument = name.partition(":")
    if kind == "pixels":
        if images is None:
            raise ValueError("pixels need the real images, and the reference is a file of statistics")
        return Pixels(tuple(images[0].shape), int(argument or 1), device)
    if kind != "classifier" or weights is not None:
        return load_extractor(kind, weights or argument or None, device)
    if not isinstance(images, MDSImages):
        what = "file of statistics" if images is None else "plain folder of pictures"
        others = " or ".join(f"extractor={other}" for other in EXTRACTORS if other != "classifier")
        raise ValueError(
            "extractor: `classifier` is trained on the labels of a dataset folder, and the reference is a "
            f"{what}. Fix: set {others}, or extractor_weights to a classifier that was trained before, or "
            "convert the pictures (python -m streaming_convert images)"
        )
    seed = int(argument or 0)
    with dist.run_local_rank_zero_first():
        path = f"{folder}/classifier" + (f"-{seed}" if seed else "")
        return SmallImageClassifier.train(*labelled(images), seed, path).to(device)


def read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read mean (F,) and covariance (F, F), float64, from a file of statistics; nothing is executed.

    path: an .npz with mu and sigma (ours, ADM's, EDM's), or a .pkl in one of three layouts: {mu, sigma},
    {"fid": {mu, sigma}} (EDM2's), or sums {raw_mean, raw_cov, num_items} (StyleGAN3's FeatureStats). Raises
    OSError where it cannot be opened, ValueError where it is damaged, not finite or something else.
    """
    suffix = Path(path).suffix
    if suffix not in STATISTICS:
        raise ValueError(f"{path}: reference statistics are .npz or .pkl")
    mean, covariance = _read_npz(path) if suffix == ".npz" else _read_pickle(path)
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
        except Exception as error:  # zipfile and numpy raise many kinds on damaged files
            raise ValueError(f"{path}: not .npz statistics ({type(error).__name__}: {error})") from error


def _read_pickle(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    content = read_file(path, NUMPY_GLOBALS)
    if type(content) is dict and "fid" in content:
        content = content["fid"]
    match content:
        case {"mu": mean, "sigma": covariance}:
            return _array(mean, f"{path}: mu"), _array(covariance, f"{path}: sigma")
        case {"raw_mean": total, "raw_cov": total_outer, "num_items": int(count)} if 0 < count < 2**53:
            mean = _array(total, f"{path}: raw_mean") / count
            second = _array(total_outer, f"{path}: raw_cov") / count
            if second.shape != (mean.size, mean.size):
                raise RefusedPickle(f"{path}: raw_mean and raw_cov do not belong together")
            return mean, second - np.outer(mean, mean)
    raise RefusedPickle(f"{path}: neither {{mu, sigma}}, alone or under 'fid', nor raw sums of features")


def _array(node: object, where: str) -> np.ndarray:
    """Return the array that a pickled numpy array of little-endian floats describes."""
    match node:
        case Node(name, (Global("numpy.ndarray"), (0,), b"b"), (1, tuple(shape), dtype, bool(fortran), data)):
            known = name in NUMPY and type(data) is bytes
        case _:
            known = False
    if not known:
        raise RefusedPickle(f"{where}: not a numpy array")
    match dtype:
        case Node("numpy.dtype", (("f4" | "f8") as kind, False, True), (3, "<", None, None, None, -1, -1, 0)):
            size = int(kind[1])
        case _:
            raise RefusedPickle(f"{where}: not little-endian float32 or float64")
    whole = all(type(n) is int and n > 0 for n in shape)
    if len(shape) > 2 or not whole or math.prod(shape) * size != len(data):
        raise RefusedPickle(f"{where}: the shape does not fit the data")
    return np.frombuffer(data, f"<{kind}").reshape(shape, order="F" if fortran else "C")
