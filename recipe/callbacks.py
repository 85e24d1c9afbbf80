"""What a run writes beside its checkpoints: inference weights and a log of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from composer.core import Callback, Event, State, Time
from composer.loggers import Logger, LoggerDestination, WandBLogger
from composer.utils import create_interval_scheduler, dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from recipe.algorithms import unwrap
from recipe.model import TVMModel
from recipe.posthoc import average_of_child
from recipe.weights import save_weights


def inference_facts(model: TVMModel, data: dict[str, Any]) -> dict[str, Any]:
    """`method` and `data` of the weights' JSON (see recipe/weights.py)."""
    objective, normalizer = model.objective, model.normalizer
    return {
        "method": {
            "objective": objective.name,
            "scaled": objective.scaled,
            "guidance": objective.guidance if objective.name == "tvm" else [1.0],
        },
        "data": {
            **data,
            "mean": normalizer.mean.flatten().tolist(),
            "std": normalizer.std.flatten().tolist(),
        },
    }


class ExportWeights(Callback):
    """Writes weights to FOLDER/ba{step}-{average} every `interval` and at the end of training.

    averages: `ema` (the evaluation average) and/or `net` (the student as it is); post-hoc averages, where the
    model keeps them, are always written. What describes the weights goes into each checkpoint too, so that
    `python -m eval.export` needs nothing else.
    """

    def __init__(self, folder: str, interval: str, averages: list[str], data: dict[str, Any]) -> None:
        self.folder, self.averages, self.data = Path(folder), averages, data
        self.due: Callable[[State, Event], bool] = create_interval_scheduler(interval)
        self.last = -1
        self.description = ""

    def state_dict(self) -> dict[str, str]:
        """One string, the same leaf in full and in sharded checkpoints."""
        return {"description": self.description}

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Exports when due; after the averages, which are algorithms and run before callbacks."""
        if event == Event.INIT:
            model = unwrap(state.model)
            description = {"model": asdict(model.net.config), **inference_facts(model, self.data)}
            self.description = json.dumps(description)
        if event == Event.FIT_END or (event == Event.BATCH_CHECKPOINT and self.due(state, event)):
            self.export(state)

    def export(self, state: State) -> None:
        """Gathers the weights on rank 0 and writes them there."""
        step = int(state.timestamp.batch)
        if step == self.last:
            return
        self.last = step
        model = unwrap(state.model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        kept = [name for name, _ in model.named_children() if name.startswith("posthoc_")]
        for name in (*self.averages, *kept):
            weights = get_model_state_dict(getattr(model, name), options=options)
            if dist.get_global_rank() == 0:
                facts = {
                    **inference_facts(model, self.data),
                    "average": average_of_child(name),
                    "step": step,
                    "samples": int(state.timestamp.sample),
                    "train_seconds": round(state.timestamp.total_wct.total_seconds(), 1),
                }
                save_weights(self.folder / f"ba{step:07d}-{name}", weights, model.net.config, facts)


class JSONLines(LoggerDestination):
    """Appends the metrics of every `interval`-th batch to a file, one JSON object a line, from rank 0.

    After a resume some steps may stand twice: the later line counts.
    """

    def __init__(self, path: str, interval: int) -> None:
        self.path, self.interval = Path(path), Time(interval, "ba")
        self.row: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Collects what has been logged since the last line."""
        self.row.update(metrics)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Writes a line when it is due."""
        if dist.get_global_rank() == 0 and int(state.timestamp.batch) % self.interval.value == 0:
            row = {"step": int(state.timestamp.batch), **{k: float(v) for k, v in self.row.items()}}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.row.clear()


class MetricsToWandB(WandBLogger):
    """Weights & Biases for metrics alone; Composer would also look there for a checkpoint to resume from."""

    def download_file(self, *args: object, **kwargs: object) -> None:
        """No file ever comes from there."""
        raise NotImplementedError
