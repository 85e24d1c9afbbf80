"""Train: `composer recipe/train.py CONFIG.yaml [key=value ...]`, or python for a single process.

Started again, the same command resumes from the newest checkpoint, or says that the run is finished. With
--dry-run it says what it would do, and stops.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import MemoryMonitor
from composer.core import Callback
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)
from composer.utils import dist, reproducibility
from omegaconf import OmegaConf

from recipe.algorithms import EMA, ScaleParameter
from recipe.callbacks import ExportWeights, JSONLines, LossByTime, MetricsToWandB, SampleGrid, Throughput
from recipe.config import (
    ConfigError,
    GridConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    as_dict,
    load_config,
)
from recipe.data import Normalizer, normalizer, train_loader
from recipe.dit import DiT
from recipe.model import StepKey, TVMModel
from recipe.parallel import parallelism, prepare_blocks
from streaming_convert.manifest import Manifest, read_manifest
from streaming_convert.store import DatasetError

log = logging.getLogger("recipe.train")


def check_data(config: TrainConfig) -> Manifest:
    """The dataset's manifest, after comparing it with the model. Raises ConfigError."""
    try:
        manifest = read_manifest(config.data.source)
    except DatasetError as error:
        raise ConfigError(f"data.{'remote' if config.data.remote else 'local'}: {error}") from error
    channels = manifest.shape[0] // (1 if manifest.column == "image" else 2)
    found = {"channels": channels, "size": manifest.shape[1], "classes": len(manifest.class_names)}
    for key, value in found.items():
        if getattr(config.model, key) != value and not (key == "classes" and config.model.classes == 0):
            raise ConfigError(
                f"model.{key}: {getattr(config.model, key)} differs from the {value} of {config.data.source}"
            )
    return manifest


def build_model(config: TrainConfig, manifest: Manifest) -> TVMModel:
    """Student and averages from the seed alone: the same on every rank."""
    reproducibility.seed_all(config.seed)
    model = TVMModel(DiT(config.model), config.objective, normalizer(config.data, manifest), config.seed)
    for net, trained in ((model.net, True), (model.target, False), (model.ema, False)):
        if net is not None:
            prepare_blocks(net, config.parallel, trained)
    return model


def build_loggers(config: LogConfig, run_name: str, folder: str) -> list:
    """train.jsonl always, Weights & Biases where asked for."""
    loggers = [JSONLines(f"{folder}/train.jsonl", config.interval)]
    if config.wandb != "off":
        Path(folder).mkdir(parents=True, exist_ok=True)
        loggers.append(
            MetricsToWandB(
                project=config.wandb_project,
                name=run_name,
                init_kwargs={"mode": config.wandb, "dir": folder, "id": run_name, "resume": "allow"},
            )
        )
    return loggers


def build_callbacks(config: TrainConfig, data: dict[str, Any], device: str) -> list[Callback]:
    """What a run writes and measures; `data` is what exported weights say about their data."""
    interval = config.log.interval
    callbacks = [
        StepKey(),
        ExportWeights(f"{config.folder}/weights", config.export_interval, config.export, data),
        Throughput(interval, config.log.peak_tflops),
        LossByTime(interval),
    ]
    if config.grid.interval is not None:
        callbacks.append(build_grid(f"{config.folder}/samples", config.grid, data["column"]))
    if device == "gpu":
        callbacks.append(MemoryMonitor())
    return callbacks


def build_grid(folder: str, config: GridConfig, column: str) -> SampleGrid:
    """The grid with its autoencoder loaded, where it needs one. Raises ConfigError."""
    try:
        return SampleGrid(folder, config, column)
    except DatasetError as error:
        raise ConfigError(f"grid.vae: {error}") from error


def build_schedule(config: OptimizerConfig) -> ComposerScheduler:
    """Composer's scheduler of that name."""
    warnings.filterwarnings("ignore", message="The warmup duration is 0")
    schedules = {
        "constant": ConstantWithWarmupScheduler,
        "linear": LinearWithWarmupScheduler,
        "cosine": CosineAnnealingWithWarmupScheduler,
    }
    return schedules[config.schedule](t_warmup=config.warmup)


def build_trainer(config: TrainConfig) -> Trainer:
    """Everything that one run needs, from its configuration."""
    manifest = check_data(config)
    model = build_model(config, manifest)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.net.parameters(), lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay
    )
    data = {
        "column": manifest.column,
        "class_names": manifest.class_names,
        "class_counts": manifest.class_counts,
        "encoder": manifest.encoder,
        "source": config.data.source,
    }
    return Trainer(
        model=model,
        train_dataloader=train_loader(config.data, config.seed),
        optimizers=optimizer,
        schedulers=build_schedule(o),
        max_duration=config.duration,
        algorithms=[
            ScaleParameter(config.objective.scaled, **vars(config.step)),
            EMA(**vars(config.ema)),
        ],
        callbacks=build_callbacks(config, data, device),
        loggers=build_loggers(config.log, config.run_name, config.folder),
        run_name=config.run_name,
        save_folder=f"{config.folder}/checkpoints",
        save_interval=config.save_interval,
        save_num_checkpoints_to_keep=config.save_keep,
        save_overwrite=True,
        autoresume=True,
        device=device,
        parallelism_config=parallelism(config.parallel, "cuda" if device == "gpu" else "cpu"),
        precision=config.precision,
        device_train_microbatch_size=config.microbatch,
        progress_bar=config.log.progress_bar,
        seed=config.seed,
    )


def dry_run(config: TrainConfig) -> str:
    """The run in words, its network built of shapes alone: nothing is read, allocated or sent."""
    world, batch = dist.get_world_size(), config.data.batch_size
    if batch % world:
        raise ConfigError(f"data.batch_size: {batch} is not a multiple of the {world} ranks")
    with torch.device("meta"):
        model = TVMModel(DiT(config.model), config.objective, Normalizer([0.0], [1.0]), config.seed)
    parameters = sum(p.numel() for p in model.net.parameters())
    return (
        f"{OmegaConf.to_yaml(as_dict(config))}\n"
        f"parameters: {parameters} ({parameters / 1e6:.0f}M)\n"
        f"tokens: {config.model.tokens}\n"
        f"batch: {batch} = {world} ranks x {batch // world}, "
        f"in microbatches of {min(config.microbatch or batch, batch // world)}\n"
    )


def main(arguments: list[str]) -> None:
    """Command line: CONFIG.yaml [key=value ...] [--dry-run]."""
    dry, arguments = "--dry-run" in arguments, [a for a in arguments if a != "--dry-run"]
    if not arguments:
        raise SystemExit("usage: composer recipe/train.py CONFIG.yaml [key=value ...] [--dry-run]")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("recipe").setLevel(logging.INFO if dist.get_global_rank() == 0 else logging.WARNING)
    try:
        config = load_config(TrainConfig, arguments[0], arguments[1:])
        if dry:
            sys.stdout.write(dry_run(config) if dist.get_global_rank() == 0 else "")
            return
        trainer = build_trainer(config)
    except ConfigError as error:
        raise SystemExit(f"config error: {error}") from error
    step = int(trainer.state.timestamp.batch)
    if trainer.state.timestamp >= trainer.state.max_duration:
        log.info("%s: already finished at step %d", config.run_name, step)
    else:
        if step:
            log.info("%s: resumed at step %d from %s/checkpoints", config.run_name, step, config.folder)
        trainer.logger.log_hyperparameters(as_dict(config))
        trainer.fit()
    trainer.close()


if __name__ == "__main__":
    main(sys.argv[1:])
