"""Images => numbers: features of real and of generated images, accumulated over ranks, and their metrics.

The Frechet distance needs only moments, whose memory does not grow with the number of images. The kernel
distance, precision and recall need all features, the Inception score all logits; they are kept if asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from eval.features import FeatureExtractor, SmallImageClassifier, load_extractor
from eval.metrics import (
    FeatureMoments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from eval.reference import MDSImages, open_images, read_statistics

METRICS = {"fd": 2, "kid": 2, "is": 10, "precision_recall": 4}  # and the samples that each needs
NEED_FEATURES = {"kid", "precision_recall"}
STATISTICS = (".npz", ".pkl")


class FeatureSet:
    """Features of one set of images; every rank adds its share, and all ranks get the same results."""

    def __init__(self, extractor: FeatureExtractor, keep_features: bool, keep_logits: bool) -> None:
        self.extractor = extractor
        device = getattr(extractor, "device", "cpu")
        self._moments = FeatureMoments(
            extractor.num_features, torch.zeros(extractor.num_features, device=device)
        )
        self._keep = {"features": keep_features, "logits": keep_logits}
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {"features": [], "logits": []}
        self._matches = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, images: Tensor, index: Tensor, labels: Tensor | None = None) -> None:
        """uint8 images (B, C, H, W); index: int64 (B,), their places in the set; labels: asked of them."""
        features, logits = features_and_logits(self.extractor, images)
        self._moments.update(features)
        for name, rows in (("features", features), ("logits", logits)):
            if self._keep[name]:
                self._kept[name].append((index, rows.cpu()))
        if labels is not None and logits is not None:
            self._matches += (logits.argmax(1) == labels.to(logits.device)).sum()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (F,) and covariance (F, F) over all ranks."""
        return self._moments.compute()

    def rows(self, name: str) -> Tensor:
        """The kept `features` (N, F) or `logits` (N, K) of all ranks, in the order of the index."""
        gathered = [pair for part in dist.all_gather_object(self._kept[name]) for pair in part]
        index, rows = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        return rows[index.argsort()]

    def matches(self) -> int:
        """How many images the extractor's own classifier finds to be of the class that was asked for."""
        total = self._matches.clone()
        dist.all_reduce(total)
        return int(total)


def features_and_logits(extractor: FeatureExtractor, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """From one pass where the extractor has both; None for logits where it has none."""
    if hasattr(extractor, "features_and_logits"):
        return extractor.features_and_logits(images)
    return extractor(images), None


class Reference:
    """The real images as the extractor sees them: a folder of them, or a file of statistics.

    digest: of the real images and the classifier, as far as their files say; others give other distances.
    floor: mean Frechet distance between random halves of the images, what perfect samples would score; None
    for a file or with floor_splits 0.
    """

    def __init__(
        self,
        source: str,
        images: Dataset | None,
        extractor: FeatureExtractor,
        metrics: list[str],
        batch_size: int,
        floor_splits: int = 0,
        seed: int = 0,
    ) -> None:
        self.extractor, self.images, self.features, self.floor = extractor, images, None, None
        self.digest = content_digest(source, extractor)
        if images is None:
            self.moments = read_statistics(source)
            if len(self.moments[0]) != extractor.num_features:
                raise ValueError(
                    f"reference: {source} is of {len(self.moments[0])} features, "
                    f"extractor {extractor.name} has {extractor.num_features}"
                )
            return
        keep = bool(NEED_FEATURES & set(metrics)) or floor_splits > 0
        found = FeatureSet(extractor, keep, keep_logits=False)
        for batch, index in shared_batches(images, batch_size):
            found.add(batch, index)
        self.moments = found.moments()
        self.features = found.rows("features") if keep else None
        if floor_splits:
            self.floor = floor(self.features, floor_splits, seed)


def content_digest(source: str, extractor: FeatureExtractor) -> str:
    """Of a statistics file, a dataset folder's index (it has checksums) or a folder's names and sizes."""
    path = Path(source)
    if path.is_dir():
        index = path / "index.json"
        sizes = [] if index.is_file() else sorted((str(p), p.stat().st_size) for p in path.rglob("*"))
        content = index.read_bytes() if index.is_file() else repr(sizes).encode()
    else:
        content = path.read_bytes()
    trained = asdict(extractor.settings) if isinstance(extractor, SmallImageClassifier) else {}
    return hashlib.sha256(content + repr(trained).encode()).hexdigest()


def shared_batches(images: Dataset, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """(images, index) of this rank's share of a data set."""
    index = torch.arange(dist.get_global_rank(), len(images), dist.get_world_size())
    loader = DataLoader(Subset(images, index.tolist()), batch_size)
    return zip(loader, index.split(batch_size), strict=True)


def labelled(images: Dataset) -> tuple[Tensor, Tensor]:
    """All images (N, C, H, W) and labels (N,) of a dataset folder, in memory. Raises ValueError."""
    if not isinstance(images, MDSImages):
        raise ValueError("reference: labels are needed, which only a dataset folder has")
    samples = [images.samples[i] for i in range(len(images))]
    pixels = torch.stack([torch.tensor(s["image"]) for s in samples])
    return pixels, torch.tensor([int(s["label"]) for s in samples])


def make_extractor(
    name: str, weights: str | None, images: Dataset | None, folder: str, device: str | torch.device
) -> FeatureExtractor:
    """The extractor of that name; without `weights` a `classifier` is trained on the reference and kept."""
    if name != "classifier" or images is None or weights is not None:
        return load_extractor(name, weights, device)
    with dist.run_local_rank_zero_first():
        return SmallImageClassifier.train(*labelled(images), path=f"{folder}/classifier").to(device)


def floor(features: Tensor, splits: int, seed: int) -> float:
    """Mean Frechet distance between random halves of the same features (N, F)."""
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator)
        one, other = (features[half] for half in order.chunk(2))
        distances.append(frechet_distance(one.mean(0), one.T.cov(), other.mean(0), other.T.cov()))
    return sum(distances) / splits


def compare(found: FeatureSet, reference: Reference, metrics: list[str], seed: int) -> dict[str, float]:
    """The metrics of a set of samples, by the names of their columns in results.jsonl.

    Kernel distance on 100 subsets of 1000 (or of all, if there are fewer); precision and recall against at
    most as many real images as there are samples, picked by the seed.
    """
    values: dict[str, Any] = {"frechet_distance": frechet_distance(*found.moments(), *reference.moments)}
    if NEED_FEATURES & set(metrics):
        features, real = found.rows("features"), reference.features
    if "kid" in metrics:
        size = min(1000, len(features), len(real))
        values["kid"], values["kid_std"] = kernel_distance(features, real, subset_size=size, seed=seed)
    if "precision_recall" in metrics:
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
        chosen = real[order[: len(features)]]
        values["precision"], values["recall"] = precision_recall(features, chosen)
    if "is" in metrics:
        score = inception_score(found.rows("logits"), seed=seed)
        values["inception_score"], values["inception_score_std"] = score
    return values


def open_reference(source: str) -> Dataset | None:
    """The images of a folder; None for a file of statistics."""
    return None if Path(source).suffix in STATISTICS else open_images(source)


def check_metrics(
    metrics: list[str], images: Dataset | None, extractor: FeatureExtractor, samples: int
) -> None:
    """Raises ValueError for a metric that this reference, extractor or number of samples cannot give."""
    fewest = max(METRICS[name] for name in metrics)
    if samples < fewest:
        raise ValueError(f"samples: {samples} must be at least {fewest} for metrics {', '.join(metrics)}")
    if images is None and NEED_FEATURES & set(metrics):
        wanted = ", ".join(sorted(NEED_FEATURES & set(metrics)))
        raise ValueError(
            f"metrics: {wanted} need a folder of real images, a statistics file has moments only"
        )
    if "is" in metrics and not hasattr(extractor, "features_and_logits"):
        raise ValueError(f"metrics: `is` needs class scores, extractor {extractor.name} has none")
