"""What a run writes beside its checkpoints: inference weights, pictures of samples and a log of numbers."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import SpeedMonitor
from composer.core import Callback, Event, State, Time, get_precision_context
from composer.loggers import Logger, LoggerDestination, WandBLogger
from composer.utils import create_interval_scheduler, dist
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader

from recipe.adapter import adapter_state
from recipe.checkpoints import Owner
from recipe.config import ConfigError, GridConfig, TrainConfig
from recipe.ema import average_of_child
from recipe.guard import check_finite
from recipe.model import GenerativeModel
from recipe.objectives.base import Condition
from recipe.parallel import on_rank_zero, unwrap
from recipe.pictures import grid, to_pixels
from recipe.preemption import Preemption
from recipe.pretrained import load_vae
from recipe.sampler import initial_noise, sample
from recipe.text import Text
from recipe.weights import save_weights
from storage import writing
from storage.manifest import DatasetError, Manifest


def inference_facts(model: GenerativeModel, data: dict[str, Any]) -> dict[str, Any]:
    """Return `method`, `data` and `finished` of the weights' JSON (see recipe/weights.py)."""
    statistics = {name: getattr(model.normalizer, name).flatten().tolist() for name in ("mean", "std")}
    facts = {"method": model.objective.facts(), "data": {**data, **statistics}}
    if model.objective.finished:
        facts["finished"] = model.objective.finished
    if model.adapter is not None:
        facts["adapter"] = model.adapter
    return facts


class ExportWeights(Callback):
    """Writes weights to FOLDER/ba{step}-{average} every `interval` and at the end of training.

    averages: `ema` (the evaluation average) and/or `net` (the student as it is); post-hoc averages, where the
    model keeps them, are always written. What describes the weights goes into each checkpoint too, so that
    `python -m eval.export` needs nothing else. A preempted run exports nothing on its way out.
    """

    def __init__(self, config: TrainConfig, manifest: Manifest, preemption: Preemption, owner: Owner) -> None:
        self.folder, self.averages = Path(config.folder, "weights"), config.export
        facts = ("column", "class_names", "class_counts", "encoder")
        self.data = {name: getattr(manifest, name) for name in facts} | {"source": config.data.source}
        self.data |= {} if config.model.text is None else {"text": manifest.text}
        self.preemption, self.owner = preemption, owner
        self.due: Callable[[State, Event], bool] = create_interval_scheduler(config.export_interval)
        self.last = -1
        self.model: GenerativeModel  # from Event.INIT on

    def state_dict(self) -> dict[str, str]:
        """Return the description as one string, the same leaf in full and in sharded checkpoints."""
        facts = {"model": asdict(self.model.net.config), **inference_facts(self.model, self.data)}
        return {"description": json.dumps(facts)}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Keep the adapter's base, and what the run's weights were finished on; `frechet` knows that itself.

        Raises ConfigError where a finish would go on with other extractors or real images than its moments.
        """
        told, objective = json.loads(state["description"]), self.model.objective
        finished = told.get("finished", [])
        if "adapter" in told:
            self.model.adapter.update(told["adapter"])
        if not objective.finishes:
            objective.finished = finished
            return
        for here, there in zip(objective.finished, finished, strict=True):
            if any(here[key] != there[key] for key in ("weights", "digest")):
                name, place = here["extractor"], here["reference"]
                raise ConfigError(
                    f"objective.features.{name}: its weights or real images are not the checkpoint's. "
                    f"Fix: restore {self.folder.parent}/classifier* and {place}, or begin a new run"
                )

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Export when it is due, after the averages' update, since those are algorithms."""
        if event == Event.INIT:
            self.model = unwrap(state.model)
        if self.preemption.stopped:
            return
        if event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and self.due(state, event):
            self.export(state)

    def export(self, state: State) -> None:
        """Gather the weights on rank 0 and write them there. Raises DivergedError, StorageError."""
        step = int(state.timestamp.batch)
        if step == self.last:
            return
        self.last = step
        on_rank_zero(self.owner.check_files)
        model = self.model
        check_finite(model.net, step)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        kept = [name for name, _ in model.named_children() if name.startswith("posthoc_")]
        for name in (*self.averages, *kept):
            weights = get_model_state_dict(getattr(model, name), options=options)
            if model.adapter is not None:
                weights = adapter_state(weights, model.adapter["modules_to_save"])
            if dist.get_global_rank() == 0:
                facts = {
                    **inference_facts(model, self.data),
                    "average": average_of_child(name),
                    "step": step,
                    "samples": int(state.timestamp.sample),
                    "train_seconds": round(state.timestamp.total_wct.total_seconds(), 1),
                }
                path = self.folder / f"ba{step:07d}-{name}"
                with writing(path):
                    save_weights(path, weights, model.net.config, facts)


class SampleGrid(Callback):
    """Draws FOLDER/ba{step}-nfe{n}.png from the evaluation average, one row for each label, and logs it.

    With prompts there is a row for each of the dataset's first samples instead. Noise and labels are always
    the same, so that pictures of one run, or of two, can be compared. Every rank takes part, as the average
    may be sharded; rank 0 writes.
    """

    def __init__(
        self,
        folder: str,
        config: GridConfig,
        column: str,
        owner: Owner,
        encoder: dict[str, Any] | None = None,
    ) -> None:
        """encoder: what the dataset's manifest says of its latents. Raises ConfigError for `config.vae`."""
        self.folder, self.owner, self.encoder = Path(folder), owner, encoder
        self.config, self.column = config, column
        self.due: Callable[[State, Event], bool] = create_interval_scheduler(config.interval)
        wanted = column == "latents" and config.vae and dist.get_global_rank() == 0
        try:
            self.vae = load_vae(config.vae) if wanted else None
        except DatasetError as error:
            raise ConfigError(f"grid.vae: {error}") from error

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Draw when it is due, after the averages' update. Raises StorageError, on all ranks."""
        if event != Event.BATCH_CHECKPOINT or not self.due(state, event):
            return
        on_rank_zero(self.owner.check_files)
        for nfe in self.config.nfe:
            with get_precision_context(state.precision):
                x0 = self.sample(unwrap(state.model), nfe, state.train_dataloader)
            if dist.get_global_rank() == 0:
                normalizer = unwrap(state.model).normalizer
                images = to_pixels(x0, normalizer, self.column, self.vae, self.encoder)
                picture = grid(images.cpu(), self.config.columns)
                path = self.folder / f"ba{int(state.timestamp.batch):07d}-nfe{nfe}.png"
                with writing(path):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(path)
                logger.log_images(picture, name=f"samples/nfe{nfe}", channels_last=True, use_table=False)

    def sample(self, model: GenerativeModel, nfe: int, loader: DataLoader) -> Tensor:
        """Draw normalised images (labels x columns, C, H, W) from the evaluation average, row by row."""
        net = model.net.config
        device, columns = model.normalizer.mean.device, self.config.columns
        if net.text is None:
            labels = self.config.labels or list(range(min(net.classes, 10))) or [net.null]
            label, ema = torch.tensor(labels, device=device).repeat_interleave(columns), model.ema
        else:
            first = [loader.dataset[i] for i in range(min(10, loader.dataset.size))]
            rows = {
                k: x.repeat_interleave(columns, 0).to(device) for k, x in loader.collate_fn(first).items()
            }
            text = Text(rows["text"], rows["text_length"])
            ema = model.prompted(model.ema, text)
            label = rows["label"].clamp(max=net.classes)
            label = label if net.classes else model.prompts.unlabelled(label, text)
        seeds, dtype = torch.arange(len(label), device=device), model.normalizer.mean.dtype
        noise = initial_noise(seeds, (net.channels, net.size, net.size), dtype)
        asked, objective = Condition(label, model.objective.default_w, net.null), model.objective
        if objective.finishes:  # samples as the loss does
            ema = partial(ema, interval=tuple(objective.interval)) if objective.interval else ema
            objective = objective.base
        return sample(ema, noise, asked, nfe, objective)


class Throughput(SpeedMonitor):
    """Composer's SpeedMonitor with the FLOPs of a batch: images/s, FLOP/s and, where the peak is known, MFU.

    window: batches averaged over; flops: of one sample in a step, nothing recomputed (`plan.step_flops`);
    peak_tflops: of one device, None for Composer's table of GPUs.
    """

    def __init__(self, window: int, flops: float, peak_tflops: float | None = None) -> None:
        peak = None if peak_tflops is None else peak_tflops * 1e12
        super().__init__(window_size=window, gpu_flops_available=peak)
        self.flops = flops

    def init(self, state: State, logger: Logger) -> None:
        """Give the model the method that SpeedMonitor calls."""
        unwrap(state.model).flops_per_batch = lambda batch: self.flops * len(batch["sample"])
        super().init(state, logger)


class LossByTime(Callback):
    """Logs the mean of each term of the loss in quarters of its time, over `interval` batches and all ranks.

    What the map jumps over goes by the gap t - s (0.75-1: nearly from noise to data in one step), a velocity
    by its time. A quarter without samples is left out.
    """

    quarters = ("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1")

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.totals: dict[str, Tensor] = {}

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add this microbatch's sums and counts, (2, 4 quarters) a term, on its device."""
        for name, term in state.outputs.terms.items():
            sums = quarter_sums(term.time, term.value)
            self.totals[name] = self.totals[name] + sums if name in self.totals else sums

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the means when they are due."""
        if int(state.timestamp.batch) % self.interval:
            return
        for name, totals in self.totals.items():
            dist.all_reduce(totals)
            means = {q: a / n for q, a, n in zip(self.quarters, *totals.tolist(), strict=True) if n}
            logger.log_metrics({f"loss/{name}/{quarter}": mean for quarter, mean in means.items()})
        self.totals = {}


def quarter_sums(time: Tensor, value: Tensor) -> Tensor:
    """Return sums of `value` (B,) over the quarters of `time` (B,) in [0, 1], and counts: float64 (2, 4)."""
    quarter = (4 * time).long().clamp(max=3)
    member = torch.nn.functional.one_hot(quarter, 4).bool()
    return torch.stack([torch.where(member, value[:, None].double(), 0.0).sum(0), member.double().sum(0)])


class JSONLines(LoggerDestination):
    """Appends the metrics of every `interval`-th batch to a file, one JSON object a line, from rank 0.

    After a resume some steps may stand twice: the later line counts.
    """

    def __init__(self, path: str, interval: int, owner: Owner) -> None:
        self.path, self.owner = Path(path), owner
        self.interval = Time(interval, "ba")
        self.row: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Collect what has been logged since the last line."""
        self.row.update(metrics)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write a line when it is due. Raises StorageError, on all ranks."""
        if int(state.timestamp.batch) % self.interval.value == 0:
            on_rank_zero(lambda: self.write(int(state.timestamp.batch)))
        self.row.clear()

    def write(self, step: int) -> None:
        """Append one line, unless a later start of this run has the file."""
        self.owner.check_files()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            row = {"step": step, **{key: float(value) for key, value in self.row.items()}}
            append_line(self.path, json.dumps(row))


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, in place of half a line that a full disk may have left at its end."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")


class MetricsToWandB(WandBLogger):
    """Weights & Biases for metrics alone; Composer would also look there for a checkpoint to resume from."""

    def download_file(self, *args: object, **kwargs: object) -> None:
        """Refuse: no file ever comes from Weights & Biases."""
        raise NotImplementedError
