"""Score weights over checkpoints x averages x NFE x w: `composer eval/sweep.py SWEEP.yaml [key=value]`.

Each finished cell is a line of FOLDER/results.jsonl; started again, the sweep skips the cells that are there.
It ends with a table (results.md), pictures (metrics.png, samples.png) and both on one page (report.html).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.utils import dist, get_device
from torch import Tensor
from tqdm import tqdm

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.features import EXTRACTORS
from eval.find import Export, find_weights
from eval.protocols import PROTOCOLS, choose_labels, describe
from eval.report import read_lines, write_report
from eval.sample import DTYPES, Generator, check_guidance
from eval.score import (
    METRICS,
    NEED_FEATURES,
    FeatureSet,
    Reference,
    check_metrics,
    compare,
    make_extractor,
    open_reference,
)
from recipe.config import ConfigError, load_config
from recipe.weights import commit
from streaming_convert.manifest import read_manifest
from streaming_convert.store import DatasetError

CHOICES = {"protocol": tuple(PROTOCOLS), "dtype": DTYPES, "extractor": tuple(EXTRACTORS)}
WANDB = ("off", "online", "offline")


@dataclass
class SweepConfig:
    """weights: files, or folders or buckets of exports; latest: only the newest of each; averages: `ema`,
    `net` and/or `posthoc:LENGTH` (recipe/posthoc.py); w: empty for the guidance weight of training.

    protocol: a key of eval/protocols.py; samples: 0 for the protocol's number; reference: dataset folder or
    folder of the real images, or a file of statistics; labels: dataset folder whose class counts the protocol
    means (null: as the weights say, or the reference); metrics: of `fd`, `kid`, `is`, `precision_recall`;
    extractor: see eval/features.py, `classifier` is trained on the reference; dtype: of the sampling network;
    vae: folder of the autoencoder, for latents. The floor is the distance between halves of the reference,
    averaged over `floor_splits` (0: none).
    """

    folder: str
    weights: list[str]
    reference: str
    latest: bool = False
    averages: list[str] = field(default_factory=lambda: ["ema"])
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4])
    w: list[float] = field(default_factory=list)
    protocol: str = "matched"
    samples: int = 0
    labels: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["fd"])
    batch_size: int = 256
    seed: int = 0
    dtype: str = "fp32"
    vae: str | None = None
    extractor: str = "classifier"
    extractor_weights: str | None = None
    floor_splits: int = 20
    wandb: str = "off"
    wandb_project: str = "terminal-velocity"

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: name at least one file or folder")
        if min(self.nfe, default=0) < 1:
            raise ValueError(f"nfe: {self.nfe} must be one or more numbers of at least 1")
        if not all(0 < w < math.inf for w in self.w):
            raise ValueError(f"w: {self.w} must be positive")
        if self.samples < 0 or self.floor_splits < 0 or self.batch_size < 1:
            raise ValueError("samples and floor_splits must not be negative; batch_size must be at least 1")
        for name, allowed in (*CHOICES.items(), ("wandb", WANDB)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if "fd" not in self.metrics or not set(self.metrics) <= set(METRICS):
            others = ", ".join(name for name in METRICS if name != "fd")
            raise ValueError(f"metrics: {self.metrics} must hold fd, and may hold {others}")


@dataclass(frozen=True)
class Cell:
    """One point of the grid and all that its numbers depend on; a row with the same values is finished.
    The digests make a cell be scored again when weights, reference, classifier or labels have changed.
    """

    weights: str
    sha256: str
    nfe: int
    w: float
    protocol: str
    samples: int
    seed: int
    dtype: str
    reference: str
    extractor: str
    metrics: str
    floor_splits: int
    inputs: str


def cells(config: SweepConfig, setup: Setup) -> Iterator[tuple[Export, Cell]]:
    """The grid: the newest weights first, then w, then NFE."""
    shared = (config.protocol, setup.samples, config.seed, config.dtype, config.reference, config.extractor)
    shared += (",".join(sorted(config.metrics)), config.floor_splits)
    for export in setup.exports:
        labels = choose(config, export.facts, torch.arange(setup.samples))
        inputs = hashlib.sha256(setup.reference.digest.encode() + labels.numpy().tobytes()).hexdigest()
        for w in config.w or [export.facts["method"]["guidance"][0]]:
            for nfe in config.nfe:
                stem, digest = str(export.path.with_suffix("")), export.facts["sha256"]
                yield export, Cell(stem, digest, nfe, w, *shared, inputs)


def choose(config: SweepConfig, facts: dict[str, Any], seeds: Tensor) -> Tensor:
    """Labels (n,) of the protocol; class counts come from `labels`, else the weights, else the reference."""
    source = config.labels or config.reference
    counts = facts["data"].get("class_counts", []) if config.labels is None else []
    if not counts and (config.labels or Path(source, "manifest.json").is_file()):
        counts = read_manifest(source).class_counts
    return choose_labels(config.protocol, facts["model"]["classes"], counts, seeds)


def score(config: SweepConfig, reference: Reference, cell: Cell, generator: Generator) -> dict[str, Any]:
    """One row of results; the samples are shared among the ranks."""
    began, facts = time.time(), generator.facts
    seeds = cell.seed + torch.arange(cell.samples)
    labels = choose(config, facts, seeds)
    keep_features = bool(NEED_FEATURES & set(config.metrics))
    found = FeatureSet(reference.extractor, keep_features, keep_logits="is" in config.metrics)
    ranks = dist.get_global_rank(), dist.get_world_size()
    is_classifier = config.extractor == "classifier"
    for images, index in generator.batches(labels, seeds, cell.nfe, cell.w, config.batch_size, *ranks):
        found.add(images, index, labels[index] if is_classifier else None)
    return {
        **asdict(cell),
        **compare(found, reference, config.metrics, cell.seed),
        "class_agreement": found.matches() / cell.samples if is_classifier else None,
        "floor": reference.floor,
        "classifier_accuracy": getattr(reference.extractor, "accuracy", None),
        "labels": PROTOCOLS[cell.protocol].labels,
        "rounding": PROTOCOLS[cell.protocol].rounding,
        "objective": facts["method"]["objective"],
        "average": facts["average"],
        "step": facts["step"],
        "train_seconds": facts["train_seconds"],
        "seconds": round(time.time() - began, 2),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Adds a line; first ends one that a kill cut short."""
    with path.open("a+b") as file:
        file.seek(0)
        unfinished = not file.read().endswith(b"\n") and file.tell() > 0
        file.write((b"\n" if unfinished else b"") + json.dumps(row).encode() + b"\n")


@contextmanager
def wandb_run(config: SweepConfig) -> Iterator[Any]:
    """The Weights & Biases run of rank 0, or None where none was asked for."""
    if config.wandb == "off" or dist.get_global_rank() != 0:
        yield None
        return
    import wandb

    name = f"sweep-{Path(config.folder).name}"
    settings = {"project": config.wandb_project, "name": name, "mode": config.wandb, "dir": config.folder}
    with wandb.init(**settings, config=vars(config)) as run:
        yield run


class Setup(NamedTuple):
    """What every cell shares, found and checked before the first sample is drawn."""

    exports: list[Export]
    reference: Reference
    samples: int


def prepare(config: SweepConfig, device: torch.device) -> Setup:
    """Finds weights and reference, makes the extractor. Raises ConfigError where something does not fit."""
    folder = Path(config.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        exports = find_weights(config.weights, config.averages, config.latest, folder)
        images = open_reference(config.reference)
        extractor = make_extractor(config.extractor, config.extractor_weights, images, config.folder, device)
        samples = config.samples or PROTOCOLS[config.protocol].samples or len(images or ())
        check_metrics(config.metrics, images, extractor, samples)
        for _, facts in exports:
            choose(config, facts, torch.arange(samples))
            for w in config.w:
                check_guidance(facts, w)
        metrics = (config.metrics, config.batch_size, config.floor_splits, config.seed)
        reference = Reference(config.reference, images, extractor, *metrics)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    return Setup(exports, reference, samples)


def sweep(config: SweepConfig) -> list[dict[str, Any]]:
    """Scores every cell that has no result yet; returns the rows of this sweep's cells."""
    device = torch.device("cuda", dist.get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    setup = prepare(config, device)
    results = Path(config.folder) / "results.jsonl"
    finished = [read_lines(results)]
    dist.broadcast_object_list(finished, src=0)  # each node may have a folder of its own
    done = {tuple(r.get(k) for k in Cell.__dataclass_fields__): r for r in finished[0]}
    rows, generator, loaded, main_rank = [], None, None, dist.get_global_rank() == 0
    grid = list(cells(config, setup))
    with wandb_run(config) as run:
        for export, cell in tqdm(grid, "sweep", unit="cell", disable=not main_rank):
            row = done.get(tuple(asdict(cell).values()))
            if row is None:
                if loaded != export.path:
                    generator, loaded = make_generator(config, export.path, device), export.path
                row = score(config, setup.reference, cell, generator)
                if main_rank:
                    append_result(results, row)
            rows.append(row)
            if run is not None:
                run.log({key: value for key, value in row.items() if value is not None})
    if main_rank:
        newest = make_generator(config, rows[0]["weights"], device)
        protocol = describe(config.protocol, setup.samples)
        write_report(Path(config.folder), rows, setup.reference.images, newest, protocol)
    return rows


def make_generator(config: SweepConfig, path: str | Path, device: torch.device) -> Generator:
    """Weights that sample as the configuration says."""
    return Generator(path, device, config.dtype, PROTOCOLS[config.protocol].rounding, config.vae)


def main(arguments: list[str]) -> None:
    """Command line: SWEEP.yaml [key=value ...]."""
    if not arguments:
        raise SystemExit("usage: composer eval/sweep.py SWEEP.yaml [key=value ...]")
    dist.initialize_dist(get_device("gpu" if torch.cuda.is_available() else "cpu"))
    try:
        sweep(load_config(SweepConfig, arguments[0], arguments[1:]))
    except (ConfigError, DatasetError) as error:
        raise SystemExit(f"config error: {error}") from error
    except FloatingPointError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
