"""Configuration: a YAML, the YAML that it names as `base`, and key=value overrides, checked before any work.

Every section is a dataclass beside the code that reads it. An unknown key, a wrong type or an impossible
combination is a ConfigError of one line that names the key.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from recipe.algorithms import EMAConfig, StepConfig
from recipe.data import DataConfig
from recipe.dit import DiTConfig
from recipe.objectives import OBJECTIVES, TVM, Objective
from recipe.parallel import ParallelConfig
from recipe.rules import (
    Rule,
    below_one,
    check,
    describe,
    each,
    file_name,
    filled,
    local,
    no_clock,
    not_negative,
    one_of,
    place,
    positive,
    positive_time,
    rule,
    time_or_zero,
    whole,
)
from storage import normalize_uri

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be: the message names the key, what it was and what is allowed."""


@dataclass
class OptimizerConfig:
    """AdamW; the defaults are the paper's. schedule: constant, linear or cosine (both to zero at the end of
    `duration`), after a linear warmup of e.g. 100ba.
    """

    lr: float = rule(1e-4, positive)
    schedule: str = rule("constant", one_of("constant", "linear", "cosine"))
    warmup: str = rule("0ba", time_or_zero, no_clock)
    betas: list[float] = rule([0.9, 0.95], Rule(lambda b: len(b) == 2, "must be two"), each(below_one))
    eps: float = rule(1e-8, positive)
    weight_decay: float = rule(0.0, not_negative)


@dataclass
class GridConfig:
    """Samples of the evaluation average every `interval` (null: never), always from the same noise.

    labels: one row each (empty: the first ten classes); columns: samples of a label; nfe: steps, one picture
    each; vae: folder or hub name of the autoencoder of latents (null: false colours).
    """

    interval: str | None = rule("1000ba", positive_time)
    labels: list[int] = rule([], each(whole(0, 10**7)))
    columns: int = rule(8, whole(1, 100))
    nfe: list[int] = rule([1], filled, each(whole(1, 1000)))
    vae: str | None = rule(None, local)


@dataclass
class LogConfig:
    """interval: batches between lines of train.jsonl, which throughput and losses by time are averaged over;
    wandb: off, online or offline; peak_tflops: of one device, for the MFU (null: Composer's table of GPUs).
    """

    interval: int = rule(10, positive)
    peak_tflops: float | None = rule(None, positive)
    progress_bar: bool = True
    wandb: str = rule("off", one_of("off", "online", "offline"))
    wandb_project: str = rule("terminal-velocity", file_name)


@dataclass
class TrainConfig:
    """One training run. Times are Composer's: 2400ba, 3ep, 600sec (but for the duration).

    folder: local; holds weights/, samples/, train.jsonl and what is on its way to a bucket; save_folder:
    where checkpoints are, local or s3://, gs://, oci:// (then weights and log are copied there too);
    save_keep: how many stay, -1 for all; fork_from: the checkpoint, SAVE_FOLDER/ep0-ba40, from which a new
    run starts; init_from: exported or imported weights, or a folder of exports, that a new run begins with
    (recipe/warm_start.py); time_limit: save and exit with status 75 so long after the start, e.g. 86000sec;
    export: which weights are written to weights/, `ema` and/or `net`, every export_interval; microbatch:
    samples per rank and forward pass (null: all of them).
    """

    run_name: str = rule(MISSING, file_name)
    folder: str = rule(MISSING, local)
    duration: str = rule(MISSING, positive_time, no_clock)
    save_folder: str = rule("${folder}/checkpoints", place)
    save_interval: str = rule("1000ba", positive_time)
    save_keep: int = rule(
        2, Rule(lambda n: 0 < n <= 1000 or n == -1, "must be from 1 to 1000, or -1 for all")
    )
    fork_from: str | None = rule(None, place)
    init_from: str | None = rule(None, place)
    time_limit: str | None = rule(
        None, time_or_zero, Rule(lambda x: x.endswith("sec"), "must be in seconds, e.g. 86000sec")
    )
    export_interval: str = rule("10000ba", positive_time)
    export: list[str] = rule(["ema"], Rule(lambda x: set(x) <= {"ema", "net"}, "may hold ema and net only"))
    seed: int = rule(0, whole(0, 2**31 - 1))
    precision: str = rule("fp32", one_of("fp32", "amp_bf16"))
    microbatch: int | None = rule(None, positive)
    data: DataConfig = field(default_factory=DataConfig)
    model: DiTConfig = field(default_factory=DiTConfig)
    objective: Objective = field(default_factory=TVM)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    step: StepConfig = field(default_factory=StepConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check(self)
        for section in ("optimizer", "ema", "step", "grid", "log"):
            check(getattr(self, section), section)
        if self.microbatch is not None and self.microbatch > self.data.batch_size:
            raise ValueError(
                f"microbatch: {self.microbatch} is more than data.batch_size, {self.data.batch_size}; "
                f"null takes a rank's whole batch at once"
            )
        if self.optimizer.warmup.endswith("sp") != self.duration.endswith("sp"):
            raise ValueError(
                f"optimizer.warmup: {self.optimizer.warmup} must be in the unit of duration, {self.duration}"
            )
        self.save_folder = normalize_uri(self.save_folder)
        self.fork_from = normalize_uri(self.fork_from) if self.fork_from else None
        self.init_from = normalize_uri(self.init_from) if self.init_from else None
        if self.init_from and self.fork_from:
            raise ValueError(
                "init_from: begins a new run, and fork_from goes on with another: give one of them"
            )
        self.data.remote = normalize_uri(self.data.remote) if self.data.remote else None
        if not all(0 <= label <= self.model.classes for label in self.grid.labels):
            raise ValueError(f"grid.labels: {self.grid.labels} must be in 0..{self.model.classes}")


def read_yaml(schema: type, path: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """The YAML at `path` over the one that its key `base` names (relative to it), and so on."""
    files = (*above, path.resolve())
    if files[-1] in above:
        raise ConfigError(f"{above[0]}: its base leads back to itself: {' -> '.join(map(str, files))}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        config = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    look_over(OmegaConf.to_container(config), schema)
    base = config.pop("base", None)
    if base is None:
        return config
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: {base} is not the name of one YAML")
    return overlay(read_yaml(schema, path.parent / base, files), config)


def overlay(under: DictConfig, over: DictConfig) -> DictConfig:
    """`over` on `under`; where it names another objective, that section begins anew."""
    name = objective_name(over, "")
    if name and name != objective_name(under, TVM.name):
        under = OmegaConf.masked_copy(under, [key for key in under if key != "objective"])
    return OmegaConf.merge(under, over)


def objective_name(config: DictConfig, default: str) -> str:
    """What it sets as objective.name, else the default."""
    section = config.get("objective")
    return str(section.get("name", default)) if isinstance(section, DictConfig) else default


def check_objective(config: DictConfig) -> type[Objective]:
    """The class of its objective. Raises ConfigError for an unknown one, and for settings of another one."""
    name = objective_name(config, TVM.name)
    if name not in OBJECTIVES:
        raise ConfigError(f"objective.name: {name!r} is not one of {', '.join(OBJECTIVES)}")
    section = config.get("objective")
    for key in section if isinstance(section, DictConfig) else ():
        owners = [other for other, cls in OBJECTIVES.items() if key in cls.__dataclass_fields__]
        if owners and name not in owners:
            raise ConfigError(f"objective.{key}: a setting of {', '.join(owners)}, not of {name}")
    return OBJECTIVES[name]


def read_overrides(schema: type, overrides: list[str]) -> DictConfig:
    """key=value arguments as a configuration."""
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override}: overrides are written key=value")
        try:
            look_over(OmegaConf.to_container(OmegaConf.from_dotlist([override])), schema)
        except (YAMLError, RecursionError) as error:
            raise ConfigError(f"{override}: not valid YAML: {' '.join(str(error).split())}") from error
    return OmegaConf.from_dotlist(overrides)


def look_over(value: Any, hint: Any, key: str = "") -> None:  # noqa: ANN401
    """Refuses what OmegaConf would take, or name no key of. Raises ConfigError.

    A value may refer to another key, ${folder}; but what a resolver computes or reads from the environment
    may not end up in a name that goes to a bucket.
    """
    hints = get_type_hints(hint) if is_dataclass(hint) else {}
    if hints and not isinstance(value, dict | None):
        raise ConfigError(f"{key}: {value!r} is not a section, that is keys and their values")
    if get_origin(hint) is list and isinstance(value, dict):
        raise ConfigError(f"{key}: {value!r} is not a list")
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            look_over(item, hints.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and "${" in re.sub(r"\$\{[\w.\[\]-]+\}", "", value):
        raise ConfigError(f"{key}: {value!r} may refer to other keys only, as in ${{folder}}")


def load_config(schema: type[T], path: str | None, overrides: list[str]) -> T:
    """The configuration as an instance of `schema`; path None: its defaults. Raises ConfigError."""
    try:
        given = read_yaml(schema, Path(path)) if path else OmegaConf.create()
        given = overlay(given, read_overrides(schema, overrides))
        typed = OmegaConf.structured(schema)
        if "objective" in typed:
            typed.objective = OmegaConf.structured(check_objective(given))
        return OmegaConf.to_object(OmegaConf.merge(typed, given))
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def as_dict(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """The resolved configuration as plain containers, to log and to print."""
    return OmegaConf.to_container(OmegaConf.structured(config))
