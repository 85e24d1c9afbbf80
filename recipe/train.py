"""Train: `composer recipe/train.py CONFIG.yaml [key=value ...]`, or python for a single process.

Started again, the same command resumes from the newest complete checkpoint, or says that the run is finished.
CONFIG.yaml may also be the folder of a converted dataset, which holds a train.yaml. With --dry-run it says
what it would do, and stops. Exit status: 0 finished, 75 preempted (start again), 143 ended by SIGTERM before
it could save, anything else an error.
"""

import logging
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from composer import Trainer
from composer.callbacks import MemoryMonitor
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.utils import dist, reproducibility
from omegaconf import OmegaConf

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipe.adapter import add_adapter
from recipe.callbacks import ExportWeights, JSONLines, LossByTime, MetricsToWandB, SampleGrid, Throughput
from recipe.checkpoints import LOG, Checkpoints, Owner, Resume, fetch_log, newest_checkpoint
from recipe.config import ConfigError, TrainConfig, load_config, yaml_of
from recipe.console import Bar, ConsoleLines, summary
from recipe.data import train_loader
from recipe.ema import EMA, EMAConfig
from recipe.finish import Population, begin_finish
from recipe.guard import DivergedError, ScaleParameter
from recipe.manual import answer
from recipe.model import GenerativeModel, StepKey
from recipe.networks import build
from recipe.normalizer import Normalizer
from recipe.optimizer import LearningRate, build_optimizer, in_steps, rate_of_step, take_settings
from recipe.parallel import on_rank_zero, parallelism, prepare_blocks
from recipe.patches import exact_float32
from recipe.plan import count_parameters, step_flops
from recipe.preemption import PREEMPTED, Preemption, ignore_sigterm
from recipe.preflight import Findings, check
from recipe.text import Prompts
from recipe.warm_start import warm_start
from storage import StorageError
from storage.manifest import DatasetError, Manifest

log = logging.getLogger("recipe.train")


def build_model(config: TrainConfig, found: Findings) -> GenerativeModel:
    """Build student and averages from the seed alone, the same on every rank."""
    if config.objective.finishes:
        begin_finish(config, found)
    reproducibility.seed_all(config.seed)
    text = config.model.text
    prompts = None if text is None else Prompts(text, found.manifest.text, config.model.null)
    net, about = build(config.model), {}
    if config.adapter is not None:
        add_adapter(net, config.adapter)
        about = {"adapter": asdict(config.adapter), "share": not config.parallel.fsdp2}
    model = GenerativeModel(net, config.objective, found.normalizer, config.seed, prompts, **about)
    for net, trained in ((model.net, True), (model.target, False), (model.ema, False)):
        if net is not None:
            prepare_blocks(net, config.parallel, trained)
    return model


def build_loggers(config: TrainConfig, owner: Owner) -> list[LoggerDestination]:
    """Return the loggers: train.jsonl, a bar or lines of progress, Weights & Biases where asked for."""
    folder, name = config.folder, config.run_name
    progress = Bar() if config.log.progress_bar and sys.stderr.isatty() else ConsoleLines(config)
    loggers = [JSONLines(f"{folder}/{LOG}", config.log.interval, owner), progress]
    if config.log.wandb != "off":
        Path(folder).mkdir(parents=True, exist_ok=True)
        options = {"mode": config.log.wandb, "dir": folder, "id": name, "resume": "allow"}
        loggers.append(MetricsToWandB(project=config.log.wandb_project, name=name, init_kwargs=options))
    return loggers


def build_callbacks(
    config: TrainConfig, manifest: Manifest, device: str, preemption: Preemption, owner: Owner
) -> list[Callback]:
    """Return the callbacks that write and measure for a run."""
    interval, flops = config.log.interval, step_flops(config.model, config.objective, config.adapter)
    callbacks = [
        StepKey(),
        LearningRate(config),
        preemption,
        ExportWeights(config, manifest, preemption, owner),
        Throughput(interval, flops, config.log.peak_tflops),
        LossByTime(interval),
    ]
    if config.grid.interval is not None:
        about = manifest.column, owner, manifest.encoder
        callbacks.append(SampleGrid(f"{config.folder}/samples", config.grid, *about))
    if device == "gpu":
        callbacks.append(MemoryMonitor())
    return [*callbacks, Checkpoints(config, manifest, owner)]


def build_algorithms(config: TrainConfig) -> list[Algorithm]:
    """Return the algorithms that guard a step, average weights and, in a finish, keep moments of samples."""
    algorithms = [ScaleParameter(config.step, config.objective.flow_matching_first), EMA(config.ema)]
    if config.objective.finishes:
        batch = config.data.per_rank(dist.get_world_size())
        algorithms.append(Population(config.objective, min(config.microbatch or batch, batch)))
    return algorithms


def build_trainer(
    config: TrainConfig, found: Findings, resume: Resume | None, preemption: Preemption
) -> Trainer:
    """Build all that a run needs, from its configuration and what the checks before it have found."""
    model = build_model(config, found)
    if found.weights is not None and resume is None:
        log.info("%s: %s", config.run_name, warm_start(model, found.weights, found.folders))
    device = "gpu" if torch.cuda.is_available() else "cpu"
    owner = Owner(config, found.folders)
    loader = train_loader(config.data, config.seed, config.model.text, found.manifest, found.folders)
    loader.worker_init_fn = ignore_sigterm
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        optimizers=build_optimizer(model.net, config.optimizer),
        max_duration=config.duration,
        algorithms=build_algorithms(config),
        callbacks=build_callbacks(config, found.manifest, device, preemption, owner),
        loggers=build_loggers(config, owner),
        run_name=config.run_name,
        load_path=resume and resume.load_path,
        device=device,
        parallelism_config=parallelism(config.parallel, "cuda" if device == "gpu" else "cpu"),
        precision=config.precision,
        device_train_microbatch_size=config.microbatch,
        progress_bar=False,
        seed=config.seed,
    )
    take_settings(trainer.state.optimizers[0], config.optimizer)
    return trainer


def short_for_average(ema: EMAConfig, steps: int) -> str | None:
    """Return advice for a run whose evaluation average ends with noise of its beginning, else None."""
    if ema.ramp or steps * (1 - ema.decay) >= 3:
        return None
    left = ema.decay**steps
    return f"ema.decay: {ema.decay} keeps {left:.0%} of the first weights to the end. Fix: set ema.ramp=true"


def start(config: TrainConfig, preemption: Preemption) -> tuple[Trainer, Manifest]:
    """Check the surroundings, and build the trainer at the step where the run stands."""
    exact_float32()
    device = "gpu" if torch.cuda.is_available() else "cpu"
    dist.initialize_dist(device, timeout=3600)  # while a checkpoint is downloaded, the other ranks wait
    found = check(config)
    on_rank_zero(lambda: fetch_log(config.folder, found.folders[config.save_folder], found.names))
    batch = config.data.per_rank(dist.get_world_size())
    if (size := config.microbatch or 0) > batch:
        log.warning("microbatch: %d is more than a rank's %d samples here: one pass", size, batch)
    with newest_checkpoint(config.folder, found.point, found.folders) as resume:
        trainer = build_trainer(config, found, resume, preemption)
    step = int(trainer.state.timestamp.batch)
    if trainer.state.timestamp >= trainer.state.max_duration:
        if resume.source == config.fork_from:
            nothing = f"leaves nothing to do after step {step} of {resume.source}"
            raise ConfigError(f"duration: {config.duration} {nothing}")
        log.info("%s: already finished at step %d (%s)", config.run_name, step, resume.source)
    elif resume:
        log.info("%s: resumed at step %d from %s", config.run_name, step, resume.source)
        for line in changes(trainer, config, resume.settings):
            log.info("%s: %s", config.run_name, line)
    else:
        last = in_steps(config.duration, len(trainer.state.train_dataloader), config.data.batch_size)
        if not config.init_from and (advice := short_for_average(config.ema, last)):
            log.info("%s: %s", config.run_name, advice)
        log.info("%s: starting at step 0, %s has no complete checkpoint", config.run_name, config.save_folder)
    return trainer, found.manifest


def changes(trainer: Trainer, config: TrainConfig, settings: dict | None) -> Iterator[str]:
    """Yield what a resumed run does otherwise than before: settings, and a learning rate that jumps.

    The rate of the last step comes with the optimizer; of this run's rates it would have been another.
    """
    if changed := differences(settings or {}, asdict(config)):
        yield f"changed since then: {', '.join(changed)}"
    step, epoch = int(trainer.state.timestamp.batch), len(trainer.state.train_dataloader)
    last, now = trainer.state.optimizers[0].param_groups[0]["lr"], rate_of_step(config, step, epoch)
    if not math.isclose(last, rate_of_step(config, step - 1, epoch), rel_tol=1e-6):
        yield f"the learning rate jumps from {last:.3g} at step {step - 1} to {now:.3g} at step {step}"


def differences(before: dict, now: dict, section: str = "") -> list[str]:
    """Return `key old => new` for each setting that differs; a key that only one of them has is left out."""
    found = []
    for key in before.keys() & now.keys():
        old, new = before[key], now[key]
        name = f"{section}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} {old} => {new}")
    return sorted(found)


def fit(trainer: Trainer, config: TrainConfig) -> None:
    """Train. Raises StorageError; where training diverges SystemExit with what to try and to go back to."""
    try:
        trainer.fit()
    except DivergedError as error:
        saver = next(c for c in trainer.state.callbacks if isinstance(c, Checkpoints))
        o, clip = config.optimizer, config.step.clip or "off"
        raise SystemExit(
            f"training error: {error}. Try a smaller optimizer.lr ({o.lr:g}), a longer optimizer.warmup "
            f"({o.warmup}), a larger optimizer.eps ({o.eps:g}) or a smaller step.clip ({clip}); newest "
            f"checkpoint from before: {saver.newest_before(error.step) or 'none'}"
        ) from error


def dry_run(config: TrainConfig) -> str:
    """Describe the run, its network built of shapes alone: nothing is read, allocated or sent."""
    world, batch = dist.get_world_size(), config.data.batch_size
    if problems := config.uneven(world):
        raise ConfigError("\n".join(problems))
    with torch.device("meta"):
        model = GenerativeModel(build(config.model), config.objective, Normalizer([0.0], [1.0]), config.seed)
    parameters = sum(p.numel() for p in model.net.parameters())
    frozen = "" if config.adapter is None else f", {count_parameters(config).trained / 1e6:.2f}M trained"
    return (
        f"{OmegaConf.to_yaml(asdict(config))}\n"
        f"parameters: {parameters} ({parameters / 1e6:.0f}M{frozen})\n"
        f"tokens: {config.model.tokens}\n"
        f"batch: {batch} = {world} ranks x {batch // world}, "
        f"in microbatches of {min(config.microbatch or batch, batch // world)}\n"
    )


def main(arguments: list[str]) -> None:
    """Run the command line: CONFIG.yaml [key=value ...] [--dry-run]."""
    dry, arguments = "--dry-run" in arguments, [a for a in arguments if a != "--dry-run"]
    answer(
        arguments, "composer recipe/train.py CONFIG.yaml [key=value ...] [--dry-run]", __doc__, TrainConfig
    )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("recipe").setLevel(logging.INFO if dist.get_global_rank() == 0 else logging.WARNING)
    try:
        config = load_config(TrainConfig, yaml_of(arguments[0]), arguments[1:])
        if dry:
            sys.stdout.write(dry_run(config) if dist.get_global_rank() == 0 else "")
            return
        preemption = Preemption(config.time_limit)
        trainer, manifest = start(config, preemption)
        if trainer.state.timestamp < trainer.state.max_duration:
            trainer.logger.log_hyperparameters(asdict(config))
            fit(trainer, config)
    except ConfigError as error:
        raise SystemExit(f"config error: {error}") from error
    except StorageError as error:
        raise SystemExit(f"storage error: {error}") from error
    except DatasetError as error:
        reason = str(error).strip().rpartition("DatasetError: ")[2]  # below a worker's traceback
        raise SystemExit(f"data error: {reason}") from error
    trainer.close()
    step = int(trainer.state.timestamp.batch)
    if preemption.stopped:
        again = "start the same command again to go on"
        log.info("%s: stopped at step %d, saved to %s; %s", config.run_name, step, config.save_folder, again)
        raise SystemExit(PREEMPTED)
    log.info("%s, step %d:\n%s", config.run_name, step, summary(config, manifest, step))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    finally:  # all ranks leave with their own status: the launcher signals the others when the first has gone
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
