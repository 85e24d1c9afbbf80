"""Score weights over checkpoints x averages x NFE x w: `composer eval/sweep.py SWEEP.yaml [key=value]`.

Each finished cell is a line of FOLDER/results.jsonl; started again, the sweep skips the cells that are there.
It ends with a table (results.md), pictures (metrics.png, samples.png) and both on one page (report.html).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple

import torch
from composer.utils import dist, get_device
from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.export import Export, find_weights
from eval.reference import Captions, HeldOut, Reference, open_images
from eval.report import newest_of_each_folder, parse_lines, reportable, write_report
from eval.sample import PROTOCOLS, choose_labels, describe
from recipe.config import ConfigError, load_config
from recipe.ema import MAX_LENGTH, length_of
from recipe.features import EXTRACTORS, FeatureExtractor, FeatureSet, Pixels, SmallImageClassifier
from recipe.generator import DTYPES, Generator, check_guidance, check_interval, default_guidance
from recipe.manual import answer
from recipe.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from recipe.objectives import from_facts
from recipe.objectives.frechet import KNOWN
from recipe.pretrained import hash_weights
from recipe.reference import STATISTICS, make_extractor
from recipe.settings import (
    CountOrZero,
    FileName,
    Filled,
    Interval,
    LocalPath,
    Many,
    Place,
    Positive,
    Says,
    Seed,
    Settings,
    Wandb,
)
from recipe.weights import commit
from storage.manifest import DatasetError, read_manifest

METRICS = {"fd": 2, "kid": 2, "is": 10, "precision_recall": 4}  # and the samples that each needs
KEEP = {"kid": "features", "precision_recall": "features", "is": "logits"}


def average(name: str) -> str:
    """Return a name that is `ema`, `net` or `posthoc:LENGTH`. Raises ValueError for any other."""
    if name not in ("ema", "net"):
        length_of(name)
    return name


Average = Annotated[
    str,
    AfterValidator(average),
    Says(f"must be ema, net or posthoc:LENGTH with a length in (0, {MAX_LENGTH:.3f}]"),
]
Extractor = Annotated[
    str,
    Field(pattern=f"^({'|'.join(EXTRACTORS)}|{KNOWN.pattern})$"),
    Says(
        "must be classifier, classifier:SEED (from 1), pixels, pixels:POOL, inception-2015, dinov2-vitl14 "
        "(both also with :WEIGHTS) or image-model:FOLDER"
    ),
]


@dataclass
class SweepConfig(Settings):
    """One table of scores: weights by guidance weights by numbers of steps."""

    folder: LocalPath = Field(description="Folder of the results, the report and what is fetched for them.")
    weights: Filled[Place] = Field(description="Files, folders or buckets of exported weights.")
    reference: Place = Field(
        description="Dataset folder or folder of the real images, or a file of their statistics."
    )
    latest: bool = Field(False, description="Whether only the newest weights of each folder are scored.")
    averages: Filled[Average] = Field(
        ["ema"], description="Which averages of the weights are scored: ema, net, posthoc:LENGTH."
    )
    nfe: Filled[Annotated[int, Field(ge=1, le=10_000)]] = Field(
        [1, 2, 4], description="Numbers of sampling steps."
    )
    w: Many[Positive] = Field(
        [],
        description="Guidance weights of sampling; empty means the one at which the weights were finished, "
        "or else the one nearest to 1 of their training.",
    )
    interval: list[Interval] = Field(
        [],
        description="Guidance intervals [t_min, t_max] of sampling, for weights that take one; empty means "
        "the one at which they were finished, or else guidance at every time.",
    )
    protocol: Literal[tuple(PROTOCOLS)] = Field(
        "matched", description="How many samples, of which labels, and how pixels are rounded."
    )
    samples: CountOrZero = Field(0, description="Number of samples of a cell; 0 means the protocol's.")
    labels: Place | None = Field(
        None,
        description="Dataset folder whose class counts the protocol means; null takes those of the weights, "
        "or of the reference.",
    )
    held_out: Place | None = Field(
        None,
        description="Folder of real images that the weights were not trained on, to tell whether samples are "
        "new or copied; reference is then what they were trained on.",
    )
    prompts: Many[Literal["own", "shuffled", "empty"]] = Field(
        [],
        description="What weights with prompts are asked for, a cell each: the caption of the sample's own "
        "reference image, that of another image, or nothing.",
    )
    clip: LocalPath | None = Field(
        None, description="Folder or hub name of a CLIP that scores samples against their prompts."
    )
    metrics: Many[Literal[tuple(METRICS)]] = Field(
        ["fd"], description="What is measured, always with fd, the Frechet distance."
    )
    batch_size: int = Field(256, ge=1, le=10**6, description="Samples drawn at once on each rank.")
    seed: Seed = Field(0, description="Seed of the first sample; sample i has the seed plus i.")
    dtype: Literal[tuple(DTYPES)] = Field("fp32", description="Arithmetic of the sampling network.")
    vae: LocalPath | None = Field(
        None, description="Folder of the autoencoder that decodes latents; null takes that of the weights."
    )
    extractor: Filled[Extractor] = Field(
        ["classifier"],
        description="Networks whose features are compared; a classifier is trained on the reference. All "
        "metrics are of the first, further ones add distances.",
    )
    extractor_weights: LocalPath | None = Field(
        None, description="Weights of the first extractor; null fetches or, for a classifier, trains them."
    )
    floor_splits: int = Field(
        20,
        ge=0,
        le=10**6,
        description="Number of random halvings of the reference over which the distance between the halves, "
        "the floor, is averaged; 0 for no floor.",
    )
    wandb: Wandb = Field("off", description="Whether the table is logged to Weights & Biases, and how.")
    wandb_project: FileName = Field("terminal-velocity", description="Project in Weights & Biases.")

    @model_validator(mode="after")
    def combinations(self) -> SweepConfig:
        """Raise ConfigError for settings that need others."""
        if "fd" not in self.metrics:
            raise ConfigError(f"metrics: {self.metrics} must hold fd")
        if self.clip and not self.prompts:
            raise ConfigError("clip: scores prompts, of which there are none")
        if self.held_out is not None and not self.floor_splits:
            raise ConfigError("held_out: needs floor_splits of at least 1")
        if len(set(self.extractor)) < len(self.extractor):
            raise ConfigError(f"extractor: {self.extractor} names one of them twice")
        if len(self.extractor) > 1 and Path(self.reference).suffix in STATISTICS:
            raise ConfigError(
                f"extractor: {self.extractor} need a folder of real images as reference, a file of "
                "statistics is of one extractor"
            )
        return self

    @property
    def keep(self) -> set[str]:
        """What must be kept of every sample besides moments: `features`, `logits`."""
        kept = {KEEP[name] for name in self.metrics if name in KEEP}
        return kept | {"features"} if self.held_out or self.prompts else kept


def cells(setup: Setup) -> Iterator[tuple[Export, Tensor, dict[str, Any]]]:
    """Yield weights, labels (n,) of the samples and all that a cell's numbers depend on, for every cell.

    The newest weights come first, then the order is by w, by interval and by NFE.

    A row of results with the same values is finished; the digests make a cell be scored again when weights,
    reference, classifier or labels have changed.
    """
    config, judges = setup.config, setup.judges
    asked = "none" if config.prompts else ""  # of weights without prompts
    seen = [real.digest for one in judges.values() for real in (one.reference, one.held_out) if real]
    digest = "".join(seen) + (config.clip or "")
    for export, labels in zip(setup.exports, setup.labels, strict=True):
        inputs = hashlib.sha256(digest.encode() + labels.numpy().tobytes()).hexdigest()
        encoder = text_encoder(export)
        trained = {f"trained_on{key}": True for key, one in judges.items() if one.trained(export.facts)}
        own_w, own_interval = default_guidance(export.facts)
        guidance, intervals = config.w or [own_w], config.interval or [own_interval]
        prompts = config.prompts if encoder else [asked]
        for w, interval, nfe, asking in product(guidance, intervals, config.nfe, prompts):
            cell = {
                "weights": str(export.path.with_suffix("")),
                "sha256": export.facts["sha256"],
                "nfe": nfe,
                "w": w,
                "prompts": asking,
                "encoder": encoder,
                "protocol": config.protocol,
                "samples": setup.samples,
                "seed": config.seed,
                "dtype": config.dtype,
                "reference": config.reference,
                "extractor": ", ".join(config.extractor),
                "metrics": ",".join(sorted(config.metrics)),
                "floor_splits": config.floor_splits,
                "inputs": inputs,
                **trained,
                **({} if interval is None else {"interval": interval}),
            }
            yield export, labels, cell


def text_encoder(export: Export) -> str:
    """Return the name of what encodes prompts for these weights; empty for weights without prompts."""
    text = export.facts["model"].get("text")
    if text is None or text["encoder"] == "bytes":
        return text["encoder"] if text else ""
    stored = export.facts["data"]["text"]
    return f"{stored['encoder']} {stored['sha256'][:12]}"


def choose(
    config: SweepConfig, export: Export, samples: int, prompts: Captions | None, counts: list[int]
) -> Tensor:
    """Return the labels (n,) of the samples for these weights.

    With prompts they are those of the images whose captions are asked for; else the protocol's, with class
    counts from `labels`, else the weights, else the reference. counts: of labels or reference.
    """
    classes = export.facts["model"]["classes"]
    if text_encoder(export):
        return prompts.images.labels(prompts.own, classes)
    own = export.facts["data"].get("class_counts") if config.labels is None else None
    seeds = config.seed + torch.arange(samples)
    return choose_labels(config.protocol, classes, own or counts, seeds)


def score(setup: Setup, cell: dict[str, Any], generator: Generator, labels: Tensor) -> dict[str, Any]:
    """Score one cell; the samples are shared among the ranks. Returns its row of results."""
    began, config = time.time(), setup.config
    facts, extractor = generator.facts, setup.reference.extractor
    network, prompts = generator.net.config, cell["prompts"]
    found = {key: FeatureSet(one.reference.extractor, one.keep) for key, one in setup.judges.items()}
    is_classifier = isinstance(extractor, SmallImageClassifier) and network.classes > 0
    asked = torch.full_like(labels, network.null) if prompts == "empty" else labels
    text = partial(setup.prompts.text, prompts, network.text) if cell["encoder"] else None
    what = asked, config.seed + torch.arange(setup.samples), cell["nfe"], cell["w"], config.batch_size
    mine = dist.get_global_rank(), dist.get_world_size()
    for images, index in generator.batches(*what, *mine, text, cell.get("interval")):
        for features in found.values():
            features.add(images, index, labels[index] if is_classifier else None)
        if setup.prompts is not None:
            setup.prompts.see(images, index)
    return {
        **cell,
        **compare(setup, found),
        "class_agreement": found[""].matches() / setup.samples if is_classifier else None,
        "held_out": config.held_out,
        "classifier_accuracy": getattr(extractor, "accuracy", None),
        "labels": PROTOCOLS[config.protocol].labels,
        "rounding": PROTOCOLS[config.protocol].rounding,
        "objective": facts["method"]["objective"],
        "average": facts["average"],
        "step": facts["step"],
        "train_seconds": facts["train_seconds"],
        "seconds": round(time.time() - began, 2),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def compare(setup: Setup, found: dict[str, FeatureSet]) -> dict[str, Any]:
    """Return the metrics of a set of samples, by their columns in results.jsonl.

    found: its features by the keys of `Setup.judges`, which end the names of columns. FDr: the mean over
    extractors of the distance to held-out images by that of real images.
    """
    values = compare_first(setup, found[""])
    for key, one in setup.judges.items():
        values |= {f"{name}{key}": value for name, value in one.compare(found[key]).items()}
    if (held_out := setup.judges[""].held_out) is not None:
        values["equal_numbers"], values["held_out_images"] = held_out.count, len(held_out.near)
        values["FDr"] = fmean(values[f"ratio_to_held_out{key}"] for key in setup.judges)
    return values


def compare_first(setup: Setup, found: FeatureSet) -> dict[str, Any]:
    """Return what is measured in the features of the first extractor alone.

    Kernel distance on 100 subsets of 1000 (or of all, if there are fewer); precision and recall against at
    most as many real images as there are samples, picked by the seed.
    """
    values, metrics, seed = {}, setup.config.metrics, setup.config.seed
    features = found.rows("features") if "features" in setup.config.keep else None
    real = setup.reference.features
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
    return values if setup.prompts is None else {**values, **setup.prompts.scores(features, real)}


def read_finished(path: Path) -> list[dict[str, Any]]:
    """Return the rows of finished cells; lines that are none are named on stderr, and scored again."""
    found = parse_lines(path)
    for number, row in found:
        if not reportable(row):
            sys.stderr.write(f"warning: {path}, line {number} is damaged: its cell is scored again\n")
    return [row for _, row in found if reportable(row)]


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Add a line to the results; first end one that a kill cut short."""
    with path.open("a+b") as file:
        file.seek(0)
        unfinished = not file.read().endswith(b"\n") and file.tell() > 0
        file.write((b"\n" if unfinished else b"") + json.dumps(row).encode() + b"\n")


def wandb_run(config: SweepConfig) -> AbstractContextManager[Any]:
    """Return the Weights & Biases run of rank 0, or None where none was asked for."""
    if config.wandb == "off" or dist.get_global_rank() != 0:
        return nullcontext()
    import wandb

    name = f"sweep-{Path(config.folder).name}"
    settings = {"project": config.wandb_project, "name": name, "mode": config.wandb, "dir": config.folder}
    return wandb.init(**settings, config=vars(config))


class Judge(NamedTuple):
    """An extractor, and the real images as it sees them.

    name: as in the configuration; weights: their hash; keep: what is kept of its features and class scores
    for each sample.
    """

    name: str
    weights: str
    keep: set[str]
    reference: Reference
    held_out: HeldOut | None

    def trained(self, facts: dict[str, Any]) -> bool:
        """Return True if weights with these facts were finished on this extractor, by hash or by name.

        A hash alone would miss a classifier of the same images and seed that another machine has trained.
        """
        finished = facts.get("finished", [])
        return any(self.weights == x.get("weights") or self.name == x.get("extractor") for x in finished)

    def compare(self, found: FeatureSet) -> dict[str, Any]:
        """Return the distances of samples in its features."""
        reference = self.reference
        distance = frechet_distance(*found.moments(), *reference.moments)
        values = {"frechet_distance": distance, "floor": reference.floor}
        return values if self.held_out is None else values | self.held_out.compare(found.rows("features"))


class Setup(NamedTuple):
    """What every cell shares, found and checked before the first sample is drawn.

    judges: extractors by what ends the names of their columns, "" for the first and [NAME] for others.
    """

    config: SweepConfig
    exports: list[Export]
    labels: list[Tensor]
    judges: dict[str, Judge]
    prompts: Captions | None
    samples: int

    @property
    def reference(self) -> Reference:
        """The real images in the features of the first extractor."""
        return self.judges[""].reference

    @property
    def doubts(self) -> list[str]:
        """Return the reasons not to trust the extractors, in sentences."""
        return [
            f"{key}: {doubt}".removeprefix(": ")
            for key, one in self.judges.items()
            for doubt in one.reference.doubts
        ]


def prepare(config: SweepConfig, device: torch.device) -> Setup:
    """Find weights and reference, and make extractors. Raises ConfigError where something does not fit."""
    folder = Path(config.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        exports = find_weights(config.weights, config.averages, config.latest, folder)
        images = None if Path(config.reference).suffix in STATISTICS else open_images(config.reference)
        extractors = [
            make_extractor(name, None if i else config.extractor_weights, images, config.folder, device)
            for i, name in enumerate(config.extractor)
        ]
        samples = config.samples or PROTOCOLS[config.protocol].samples or len(images or ())
        check_metrics(config, images, extractors[0], samples)
        prompts = Captions(images, samples, config.clip, config.seed) if config.prompts else None
        check_prompts(exports, prompts)
        check_class_names(exports)
        for one in extractors:
            check_shapes(exports, one)
        source = config.labels or config.reference
        known = config.labels or Path(source, "manifest.json").is_file()
        counts = read_manifest(source).class_counts if known else []
        labels = [choose(config, export, samples, prompts, counts) for export in exports]
        for _, facts in exports:
            for interval in config.interval or [default_guidance(facts)[1]]:
                check_interval(facts, interval)
            objective = from_facts(facts["method"])
            for w in config.w:
                check_guidance(objective, w)
        judges = make_judges(config, extractors, images, samples)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    return Setup(config, exports, labels, judges, prompts, samples)


def make_judges(
    config: SweepConfig, extractors: list[FeatureExtractor], images: Dataset | None, samples: int
) -> dict[str, Judge]:
    """Return the extractors with features of reference and held-out images, by the keys of `Setup.judges`.

    Raises ValueError, OSError.
    """
    settings, keep = (config.batch_size, config.floor_splits, config.seed), config.keep
    judges: dict[str, Judge] = {}
    for name, extractor in zip(config.extractor, extractors, strict=True):
        reference = Reference(config.reference, images, extractor, "features" in keep, *settings)
        held_out = HeldOut(config.held_out, reference, samples, *settings) if config.held_out else None
        key = f"[{name}]" if judges else ""
        judges[key] = Judge(name, hash_weights(extractor.network), keep, reference, held_out)
        keep = {"features"} if config.held_out else set()  # all that further ones need
    return judges


def check_prompts(exports: list[Export], prompts: Captions | None) -> None:
    """Raise ValueError for weights whose prompts are not asked for, or cannot be had from the reference."""
    for path, facts in exports:
        text = facts["model"].get("text")
        if text and prompts is None:
            raise ValueError(f"prompts: {path} takes some: own, shuffled and/or empty")
        if text and text["encoder"] == "dataset" and prompts.stored != facts["data"]["text"]["sha256"]:
            wanted = facts["data"]["text"]["sha256"]
            raise ValueError(
                f"reference: its text encoder has the hash {prompts.stored}, that of {path} {wanted}"
            )


def check_class_names(exports: list[Export]) -> None:
    """Raise ValueError for weights whose names of classes are not one text for each class."""
    for path, facts in exports:
        names, classes = facts["data"].get("class_names"), facts["model"]["classes"]
        fit = isinstance(names, list) and len(names) == classes and all(isinstance(x, str) for x in names)
        if names and classes and not fit:
            found = f"{len(names)} of them" if isinstance(names, list) else type(names).__name__
            raise ValueError(f"weights: {path}: data.class_names must name {classes} classes, found {found}")


def check_shapes(exports: list[Export], extractor: FeatureExtractor) -> None:
    """Raise ValueError for weights that make pictures of another shape than a classifier or pixels take."""
    if not isinstance(extractor, SmallImageClassifier | Pixels):
        return
    for path, facts in exports:
        found = facts["model"]["channels"], facts["model"]["size"], facts["model"]["size"]
        if facts["data"]["column"] == "image" and found != extractor.shape:
            sides = "of {} channels and {}x{} pixels".format
            raise ValueError(
                f"weights: {path} makes pictures {sides(*found)}, extractor {extractor.name} takes those "
                f"{sides(*extractor.shape)}"
            )


def check_metrics(
    config: SweepConfig, images: Dataset | None, extractor: FeatureExtractor, samples: int
) -> None:
    """Raise ValueError for a metric that this reference, extractor or number of samples cannot give."""
    fewest = max(METRICS[name] for name in config.metrics)
    if samples < fewest:
        names = ", ".join(config.metrics)
        raise ValueError(f"samples: {samples} must be at least {fewest} for metrics {names}")
    if images is None and "features" in config.keep:
        names = ", ".join(name for name in config.metrics if KEEP.get(name) == "features")
        what = f"metrics: {names}" if names else "held_out:"
        raise ValueError(f"{what} need a folder of real images, a statistics file has moments only")
    if "is" in config.metrics and not extractor.has_logits:
        raise ValueError(f"metrics: `is` needs class scores, extractor {extractor.name} has none")


def sweep(config: SweepConfig) -> list[dict[str, Any]]:
    """Score every cell that has no result yet; return the rows of all of this sweep's cells."""
    device = torch.device("cuda", dist.get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    setup = prepare(config, device)
    results = Path(config.folder) / "results.jsonl"
    finished = [read_finished(results) if dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(finished, src=0)  # each node may have a folder of its own
    rows, generator, loaded, main_rank = [], None, None, dist.get_global_rank() == 0
    grid = list(cells(setup))
    for doubt in setup.doubts if main_rank else ():
        sys.stderr.write(f"warning: {doubt}\n")
    with wandb_run(config) as run:
        for export, labels, cell in tqdm(grid, "sweep", unit="cell", disable=not main_rank):
            same = (r for r in reversed(finished[0]) if cell.items() <= r.items())
            # a cell without guidance interval has no key for it
            row = next((r for r in same if r.get("interval") == cell.get("interval")), None)
            if row is None:
                if loaded != export.path:
                    generator, loaded = make_generator(config, export.path, device), export.path
                row = score(setup, cell, generator, labels)
                if main_rank:
                    append_result(results, row)
            rows.append(row)
            if run is not None:
                run.log({key: value for key, value in row.items() if value is not None})
    if main_rank:
        newest = {path: make_generator(config, path, device) for path in newest_of_each_folder(rows)}
        protocol = describe(config.protocol, setup.samples)
        write_report(Path(config.folder), rows, setup.reference, newest, protocol, setup.doubts)
    return rows


def make_generator(config: SweepConfig, path: str | Path, device: torch.device) -> Generator:
    """Load weights that sample as the configuration says."""
    return Generator(path, device, config.dtype, PROTOCOLS[config.protocol].rounding, config.vae)


def main(arguments: list[str]) -> None:
    """Run the command line: SWEEP.yaml [key=value ...]."""
    answer(arguments, "composer eval/sweep.py SWEEP.yaml [key=value ...]", __doc__, SweepConfig)
    device = get_device("gpu" if torch.cuda.is_available() else "cpu")
    dist.initialize_dist(device, timeout=3600)  # one rank copies weights or trains a classifier, others wait
    try:
        sweep(load_config(SweepConfig, arguments[0], arguments[1:]))
    except (ConfigError, DatasetError) as error:
        raise SystemExit(f"config error: {error}") from error
    except FloatingPointError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
