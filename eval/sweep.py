"""Score weights over checkpoints x averages x NFE x w: `composer eval/sweep.py SWEEP.yaml [key=value]`.

Each finished cell is a line of FOLDER/results.jsonl; started again, the sweep skips the cells that are there.
It ends with a table (results.md) and two pictures (samples.png, metrics.png).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist, get_device
from streaming import StreamingDataset
from torch import Tensor
from tqdm import tqdm

from eval.features import FeatureExtractor, SmallImageClassifier, load_extractor
from eval.metrics import FeatureMoments, frechet_distance
from eval.report import write_report
from eval.sample import Generator, spread_labels
from recipe.config import ConfigError, load_config
from recipe.weights import commit, read_facts
from streaming_convert.manifest import read_manifest

Moments = tuple[Tensor, Tensor]


@dataclass
class SweepConfig:
    """weights: files, or folders of exports; latest: only the newest export of each folder; averages: `ema`
    and/or `net`; w: empty for the guidance weight of training; reference: dataset folder of the real images;
    samples: 0 for as many as there are real images; extractor: see eval/features.py, `classifier` is trained
    on the reference. The floor is the distance between halves of the reference, averaged over `floor_splits`.
    """

    folder: str
    weights: list[str]
    reference: str
    latest: bool = False
    averages: list[str] = field(default_factory=lambda: ["ema"])
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4])
    w: list[float] = field(default_factory=list)
    samples: int = 0
    batch_size: int = 256
    seed: int = 0
    extractor: str = "classifier"
    extractor_weights: str | None = None
    floor_splits: int = 20

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: name at least one file or folder")
        if min(self.nfe, default=0) < 1:
            raise ValueError(f"nfe: {self.nfe} must be one or more numbers of at least 1")
        if any(w <= 0 for w in self.w):
            raise ValueError(f"w: {self.w} must be positive")
        if self.samples < 0 or self.batch_size < 1 or self.floor_splits < 1:
            raise ValueError("samples must not be negative; batch_size and floor_splits must be at least 1")


@dataclass(frozen=True)
class Cell:
    """One point of the grid; the digest makes a cell be scored again when the weights have changed."""

    weights: str
    sha256: str
    nfe: int
    w: float
    samples: int
    seed: int
    extractor: str


class Reference:
    """The real images and what they look like to the extractor."""

    def __init__(self, config: SweepConfig) -> None:
        self.manifest = read_manifest(config.reference)
        self.images, self.labels = load_images(config.reference)
        self.extractor = self._extractor(config)
        self.features = extract(self.extractor, self.images, config.batch_size)
        self.moments = moments(self.features)
        self.floor = floor(self.features, config.floor_splits, config.seed)
        self.accuracy = getattr(self.extractor, "accuracy", None)

    def _extractor(self, config: SweepConfig) -> FeatureExtractor:
        if config.extractor != "classifier":
            return load_extractor(config.extractor, config.extractor_weights)
        path = config.extractor_weights or f"{config.folder}/classifier"
        with dist.run_local_rank_zero_first():
            return SmallImageClassifier.train(self.images, self.labels, path=path)


def load_images(folder: str) -> tuple[Tensor, Tensor]:
    """All images (N, C, H, W) uint8 and labels (N,) of a local dataset folder, in order."""
    dataset = StreamingDataset(local=folder, batch_size=1, shuffle=False)
    samples = [dataset[i] for i in range(len(dataset))]
    images = torch.stack([torch.tensor(s["image"]) for s in samples])
    return images, torch.tensor([int(s["label"]) for s in samples])


def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int) -> Tensor:
    """Features (N, F), float64."""
    return torch.cat([extractor(part) for part in images.split(batch_size)])


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features (N, F)."""
    metric = FeatureMoments(features.shape[1])
    metric.sync_on_compute = False
    metric.update(features)
    return metric.compute()


def floor(features: Tensor, splits: int, seed: int) -> float:
    """Mean Frechet distance between random halves of the same data: what perfect samples would score."""
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator)
        halves = (moments(features[half]) for half in order.chunk(2))
        (mean1, cov1), (mean2, cov2) = halves
        distances.append(frechet_distance(mean1, cov1, mean2, cov2))
    return sum(distances) / splits


def find_weights(config: SweepConfig) -> list[tuple[Path, dict[str, Any]]]:
    """(path, facts) of all weights asked for, newest first. Raises ConfigError where there are none."""
    found = []
    for name in config.weights:
        path = Path(name)
        files = sorted(path.glob("*.json"), reverse=True) if path.is_dir() else [path]
        try:
            exports = [(file, read_facts(file)) for file in files]
        except (OSError, ValueError) as error:
            raise ConfigError(f"weights: {error}") from error
        exports = [(file, facts) for file, facts in exports if facts["average"] in config.averages]
        if not exports:
            raise ConfigError(f"weights: {name} holds no weights with average in {config.averages}")
        found += [e for e in exports if e[1]["step"] == exports[0][1]["step"]] if config.latest else exports
    return found


def score(config: SweepConfig, reference: Reference, cell: Cell, generator: Generator) -> dict[str, Any]:
    """One row of results; the samples are shared among the ranks."""
    began = time.time()
    labels = spread_labels(reference.manifest.class_counts, cell.samples)
    seeds = cell.seed + torch.arange(cell.samples)
    metric, agree = FeatureMoments(reference.features.shape[1]), torch.zeros(1)
    batches = generator.batches(
        labels, seeds, cell.nfe, cell.w, config.batch_size, dist.get_global_rank(), dist.get_world_size()
    )
    for images, label in batches:
        metric.update(reference.extractor(images.cpu()))
        if hasattr(reference.extractor, "logits"):
            agree += (reference.extractor.logits(images.cpu()).argmax(1) == label).sum()
    dist.all_reduce(agree)
    mean, covariance = metric.compute()
    return {
        **asdict(cell),
        "frechet_distance": frechet_distance(mean, covariance, *reference.moments),
        "class_agreement": agree.item() / cell.samples if hasattr(reference.extractor, "logits") else None,
        "floor": reference.floor,
        "classifier_accuracy": reference.accuracy,
        "objective": generator.facts["method"]["objective"],
        "average": generator.facts["average"],
        "step": generator.facts["step"],
        "train_seconds": generator.facts["train_seconds"],
        "seconds": round(time.time() - began, 2),
        "commit": commit(),
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished cells; a last line cut short by a kill does not count."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Adds a line; first ends one that a kill cut short."""
    with path.open("a+b") as file:
        file.seek(0)
        unfinished = not file.read().endswith(b"\n") and file.tell() > 0
        file.write((b"\n" if unfinished else b"") + json.dumps(row).encode() + b"\n")


def sweep(config: SweepConfig) -> list[dict[str, Any]]:
    """Scores every cell that has no result yet; returns the rows of this sweep's cells."""
    path = Path(config.folder) / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    exports = find_weights(config)
    reference = Reference(config)
    samples = config.samples or len(reference.images)
    done = {tuple(r[k] for k in Cell.__dataclass_fields__): r for r in read_results(path)}
    dist.barrier()
    rows = []
    bar = tqdm(total=len(exports) * len(config.nfe) * max(1, len(config.w)), unit="cell", desc="sweep")
    for file, facts in exports:
        generator = None
        for w in config.w or [facts["method"]["guidance"][0]]:
            for nfe in config.nfe:
                stem = str(file.with_suffix(""))
                cell = Cell(stem, facts["sha256"], nfe, w, samples, config.seed, config.extractor)
                row = done.get(tuple(asdict(cell).values()))
                if row is None:
                    generator = generator or Generator(file)
                    row = score(config, reference, cell, generator)
                    if dist.get_global_rank() == 0:
                        append_result(path, row)
                rows.append(row)
                bar.update()
    bar.close()
    if dist.get_global_rank() == 0:
        write_report(Path(config.folder), rows, reference.images, reference.labels)
    return rows


def main(arguments: list[str]) -> None:
    """Command line: SWEEP.yaml [key=value ...]."""
    if not arguments:
        raise SystemExit("usage: composer eval/sweep.py SWEEP.yaml [key=value ...]")
    dist.initialize_dist(get_device("gpu" if torch.cuda.is_available() else "cpu"))
    try:
        sweep(load_config(SweepConfig, arguments[0], arguments[1:]))
    except ConfigError as error:
        raise SystemExit(f"config error: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
