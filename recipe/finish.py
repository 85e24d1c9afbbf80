"""What the objective `frechet` needs around its loss: extractors and statistics before the first step, and
the moments of samples after every one.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from composer.core import Algorithm, Event, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from tqdm import tqdm

from recipe.checkpoints import RUN, read_json
from recipe.config import ConfigError, TrainConfig
from recipe.data import collate
from recipe.dit import NetworkConfig
from recipe.features import FeatureExtractor
from recipe.guard import stepped
from recipe.metrics import FeatureMoments
from recipe.objectives import from_facts
from recipe.objectives.frechet import Frechet, Match, condition, weigh
from recipe.parallel import on_rank_zero, unwrap
from recipe.preflight import Findings, check_text
from recipe.pretrained import hash_weights, load_decoder
from recipe.reference import STATISTICS, MDSImages, content_digest, make_extractor, measure, statistics_for
from recipe.text import SUMMARY, Text
from recipe.warm_start import earlier_finishes
from storage.manifest import DatasetError, Manifest

BATCH = 256  # real images at once
log = logging.getLogger("recipe.finish")


def origin(found: Findings) -> dict[str, Any]:
    """Return `method` and `finished` of the weights that the run began with. Raises StorageError.

    They are in the folder of the checkpoints that it goes on from, or in the weights of `init_from`.
    """
    if found.weights is None:
        return read_json(found.folders[found.point.uri], RUN, {"origin"})["origin"]
    facts = found.weights.facts
    return {"method": facts["method"], "finished": earlier_finishes(facts)}


def begin_finish(config: TrainConfig, found: Findings) -> None:
    """Load extractors and decoder, measure real images, on all ranks. Raises ConfigError, StorageError."""
    objective, manifest = config.objective, found.manifest
    objective.origin = on_rank_zero(lambda: origin(found))
    base = from_facts(objective.origin["method"])
    low, high = base.guidance_range
    if objective.w is not None and low == high != objective.w:
        raise ConfigError(f"objective.w: {objective.w:g} is not {low:g}, the only one of these weights")
    if objective.w is not None and not low <= objective.w <= high:
        log.warning("objective.w: %g is not in %g to %g, as trained", objective.w, low, high)
    if objective.interval is not None and not (base.auxiliary and config.model.interval):
        raise ConfigError(
            f"objective.interval: {objective.interval} needs weights of iMF on model.network mit"
        )
    device = torch.device("cuda", dist.get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    decode = None
    if manifest.column == "latents":
        try:
            decode = load_decoder(manifest.encoder, objective.vae, device, half=False)
        except (DatasetError, ValueError) as error:
            raise ConfigError(f"objective.vae: {error}") from error

    def pixels(x0: Tensor) -> Tensor:
        values = found.normalizer.invert(x0)
        return decode(values) if decode else values

    matches, objective.finished = {}, list(objective.origin["finished"])
    for name, reference in objective.features.items():
        try:
            matches[name] = make_match(name, reference, config, manifest, device)
        except (ValueError, OSError, ImportError) as error:
            raise ConfigError(f"objective.features.{name}: {error}") from error
        extractor = matches[name].extractor
        about = {"extractor": name, "weights": hash_weights(extractor.network), "reference": reference}
        about["digest"] = content_digest(reference, extractor)
        asked = {key: getattr(objective, key) for key in ("nfe", "w", "interval", "joint")}
        objective.finished.append({**about, **asked})
    if any(one != objective.finished for one in dist.all_gather_object(objective.finished)):
        raise ConfigError(
            f"objective.features: nodes have different extractors or real images. Fix: copy {config.folder}/"
            f"classifier* of one node to all, and the same references"
        )
    objective.begin(base, matches, pixels)


def make_match(
    name: str, reference: str, config: TrainConfig, manifest: Manifest, device: torch.device
) -> Match:
    """Make the extractor with the moments of its reference. Raises ValueError, OSError, ImportError.

    manifest: of the data of the run; the joint form takes labels and prompts of the reference for theirs.
    """
    images = None if Path(reference).suffix in STATISTICS else MDSImages(Path(reference))
    extractor = make_extractor(name, None, images, config.folder, device)
    if config.objective.joint is not None:
        return joint_match(images, extractor, config.objective, config.model, manifest)
    moments = measure(images, extractor, BATCH).moments() if images else statistics_for(reference, extractor)
    return Match(extractor, *(moment.to(device) for moment in moments))


def joint_match(
    images: MDSImages,
    extractor: FeatureExtractor,
    objective: Frechet,
    model: NetworkConfig,
    manifest: Manifest,
) -> Match:
    """Measure features together with labels or captions. Raises ValueError where there are none that fit."""
    if model.text is not None:
        check_text(model.text, images.manifest, images.folder)
    check_condition(images, model, manifest)
    size = extractor.num_features
    moments = FeatureMoments(size + (SUMMARY if model.text else model.classes)).to(extractor.device)
    index = torch.arange(dist.get_global_rank(), len(images), dist.get_world_size())
    for part in tqdm(index.split(BATCH), "features", unit="batch", disable=dist.get_global_rank() > 0):
        batch = collate(images.rows(part), model.text)
        text = Text(batch["text"], batch["text_length"]) if model.text else None
        told = condition(batch["label"], text, model.null)
        moments.update(torch.cat([extractor(batch["image"]), told.to(extractor.device)], 1))
    joint = weigh(*moments.compute(), size, objective.joint, objective.label_dropout)
    return Match(extractor, *joint)


def check_condition(images: MDSImages, model: NetworkConfig, manifest: Manifest) -> None:
    """Raise ValueError where labels or embeddings of a reference mean something else in the run's data."""
    text, names, own = model.text, images.manifest.class_names, manifest.class_names
    if text is None and len(names) != model.classes:
        raise ValueError(f"{images.folder} has {len(names)} classes, the network {model.classes}")
    if text is None and names != own[: len(names)]:
        first = next(i for i, name in enumerate(names) if own[i : i + 1] != [name])
        there = repr(own[first]) if first < len(own) else "no class"
        raise ValueError(
            f"{images.folder}: class {first} is {names[first]!r}, {there} in the data; joint needs the same "
            f"names in the same order"
        )
    if text is not None and text.encoder == "dataset":
        found, wanted = (one.text and one.text["sha256"] for one in (images.manifest, manifest))
        if found != wanted:
            raise ValueError(
                f"{images.folder}: its text encoder has sha256 {found}, that of the data {wanted}; joint "
                f"needs the same"
            )


class Population(Algorithm):
    """Keeps the moments of samples: `population` of them before the first step, then those of every step.

    batch_size: of a rank, for the first ones. They are modules of the model, so checkpointed like it, and a
    skipped step leaves them as they are.
    """

    def __init__(self, objective: Frechet, batch_size: int) -> None:
        self.objective, self.batch_size = objective, batch_size

    def match(self, event: Event, state: State) -> bool:
        """Act before the first step, after each loss and each optimizer step."""
        return event in (Event.FIT_START, Event.AFTER_LOSS, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Collect features, or turn what has been collected into moments and, when it is due, maps."""
        matches, step = self.objective.matches.values(), int(state.timestamp.batch)
        if event == Event.AFTER_LOSS:
            self.add(state.outputs.features)
        elif event == Event.FIT_START and step == 0:
            self.draw(state)
            for one in matches:
                one.fold(0)
                one.refresh()
        elif event == Event.BATCH_END:
            for one in matches:
                if not stepped(unwrap(state.model).net):
                    one.sums.zero_()
                    continue
                one.fold(self.objective.decay)
                if step % self.objective.refresh == 0:
                    one.refresh()

    def add(self, features: dict[str, Tensor]) -> None:
        """Add features of samples (B, F) to the sums of each extractor."""
        for name, one in self.objective.matches.items():
            one.add(features[name].detach())

    @torch.no_grad()
    def draw(self, state: State) -> None:
        """Add the first samples, drawn as in step -1, of labels and prompts from all over the dataset.

        A rank whose share of the last batches is smaller repeats a sample, since all must take part alike.
        """
        data = state.train_dataloader
        rank, world = dist.get_global_rank(), dist.get_world_size()
        parts = torch.arange(self.objective.population).split(self.batch_size * world)
        for part in tqdm(parts, "samples of the beginning", unit="batch", disable=rank > 0):
            index = part[rank::world] if len(part) > rank else part[:1]
            rows = index * data.dataset.size // self.objective.population
            batch = data.collate_fn([data.dataset[i] for i in rows.tolist()])
            batch |= {"sample": index, "step": torch.full_like(index, -1)}
            with get_precision_context(state.precision):
                features = state.model(state.device.batch_to_device(batch)).features
            if len(part) > rank:
                self.add(features)
