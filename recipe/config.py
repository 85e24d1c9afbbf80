"""Configuration: a YAML, the YAML that it names as `base`, and key=value overrides, checked before any work.

Every section is a dataclass beside the code that reads it. An unknown key, a wrong type or an impossible
combination is a ConfigError of one line that names the key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from composer.core import Time, TimeUnit
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from recipe.data import DataConfig
from recipe.dit import DiTConfig
from recipe.objectives import OBJECTIVES, TVM, Objective
from recipe.parallel import ParallelConfig
from recipe.posthoc import MAX_LENGTH
from recipe.storage import normalize_uri

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be: the message names the key, what it was and what is allowed."""


def is_time(text: str) -> bool:
    """Whether it is a number with one of Composer's units; it would take a bare 3 for 30 seconds."""
    try:
        Time.from_timestring(text)
    except (ValueError, TypeError):
        return False
    return not text.isdigit()


@dataclass
class OptimizerConfig:
    """AdamW; the defaults are the paper's. schedule: constant, linear or cosine (both to zero at the end of
    `duration`), after a linear warmup of e.g. 100ba.
    """

    lr: float = 1e-4
    schedule: str = "constant"
    warmup: str = "0ba"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr: {self.lr} must be positive")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"optimizer.schedule: {self.schedule!r} is not one of constant, linear, cosine")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas: {self.betas} must be two numbers in [0, 1)")


@dataclass
class EMAConfig:
    """Decays of the teacher (target) and of the evaluated weights; ramp: see `algorithms.ema_decay`.

    posthoc: lengths of power-function averages to keep and export besides, e.g. [0.05, 0.1]; from these two
    any length can be had after training (recipe/posthoc.py). Each costs one more copy of the weights.
    """

    target_decay: float = 0.99
    decay: float = 0.9999
    ramp: bool = False
    posthoc: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("target_decay", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"ema.{name}: {getattr(self, name)} must be in [0, 1)")
        for length in self.posthoc:
            if not 0.001 <= length <= MAX_LENGTH or round(length, 3) != length:
                raise ValueError(
                    f"ema.posthoc: {length} must be in [0.001, {MAX_LENGTH:.3f}], in thousandths"
                )


@dataclass
class StepConfig:
    """Guards of a step: see `algorithms.ScaleParameter`."""

    tangent_warmup: int = 0
    clip: float | None = None
    max_skipped: int = 5

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"step.clip: {self.clip} must be positive, or null for no clipping")
        if self.max_skipped < 1:
            raise ValueError(f"step.max_skipped: {self.max_skipped} must be at least 1")


@dataclass
class GridConfig:
    """Samples of the evaluation average every `interval` (null: never), always from the same noise.

    labels: one row each (empty: the first ten classes); columns: samples of a label; nfe: steps, one picture
    each; vae: folder or hub name of the autoencoder of latents (null: false colours).
    """

    interval: str | None = "1000ba"
    labels: list[int] = field(default_factory=list)
    columns: int = 8
    nfe: list[int] = field(default_factory=lambda: [1])
    vae: str | None = None

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"grid.columns: {self.columns} must be at least 1")
        if not self.nfe or min(self.nfe) < 1:
            raise ValueError(f"grid.nfe: {self.nfe} must be one or more numbers of at least 1")


@dataclass
class LogConfig:
    """interval: batches between lines of train.jsonl, which throughput and losses by time are averaged over;
    wandb: off, online or offline; peak_tflops: of one device, for the MFU (null: Composer's table of GPUs).
    """

    interval: int = 10
    peak_tflops: float | None = None
    progress_bar: bool = True
    wandb: str = "off"
    wandb_project: str = "terminal-velocity"

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"log.interval: {self.interval} must be at least 1")
        if self.wandb not in ("off", "online", "offline"):
            raise ValueError(f"log.wandb: {self.wandb!r} is not one of off, online, offline")


@dataclass
class TrainConfig:
    """One training run. Times are Composer's: 2400ba, 3ep, 600sec.

    folder: local; holds weights/, samples/, train.jsonl and what is on its way to a bucket; save_folder:
    where checkpoints are, local or s3://, gs://, oci:// (then weights and log are copied there too);
    save_keep: how many stay, -1 for all; fork_from: the checkpoint, SAVE_FOLDER/ep0-ba40, from which a new
    run starts; time_limit: save and exit with status 75 so long after the start, e.g. 86000sec; export: which
    weights are written to weights/, `ema` and/or `net`, every export_interval; microbatch: samples per rank
    and forward pass (null: all of them).
    """

    run_name: str
    folder: str
    duration: str
    save_folder: str = "${folder}/checkpoints"
    save_interval: str = "1000ba"
    save_keep: int = 2
    fork_from: str | None = None
    time_limit: str | None = None
    export_interval: str = "10000ba"
    export: list[str] = field(default_factory=lambda: ["ema"])
    seed: int = 0
    precision: str = "fp32"
    microbatch: int | None = None
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
        if self.precision not in ("fp32", "amp_bf16"):
            raise ValueError(f"precision: {self.precision!r} is not one of fp32, amp_bf16")
        if self.microbatch is not None and self.microbatch < 1:
            raise ValueError(f"microbatch: {self.microbatch} must be at least 1, or null")
        if not set(self.export) <= {"ema", "net"}:
            raise ValueError(f"export: {self.export} may hold ema and net only")
        if self.save_keep < 1 and self.save_keep != -1:
            raise ValueError(f"save_keep: {self.save_keep} must be at least 1, or -1 for all")
        self.check_times()
        if self.time_limit and Time.from_timestring(self.time_limit).unit != TimeUnit.SECOND:
            raise ValueError(f"time_limit: {self.time_limit} must be in seconds, e.g. 86000sec")
        if "://" in self.folder:
            raise ValueError(f"folder: {self.folder} must be local; save_folder may be in a bucket")
        self.save_folder = normalize_uri(self.save_folder)
        self.fork_from = normalize_uri(self.fork_from) if self.fork_from else None
        self.data.remote = normalize_uri(self.data.remote) if self.data.remote else None
        if not all(0 <= label <= self.model.classes for label in self.grid.labels):
            raise ValueError(f"grid.labels: {self.grid.labels} must be in 0..{self.model.classes}")
        if self.data.remote is None and not Path(self.data.local).is_dir():
            raise ValueError(f"data.local: {self.data.local} is not a folder, and data.remote is not set")

    def check_times(self) -> None:
        """Raises ValueError."""
        times = {
            **{k: getattr(self, k) for k in ("duration", "save_interval", "export_interval", "time_limit")},
            **{"grid.interval": self.grid.interval, "optimizer.warmup": self.optimizer.warmup},
            "objective.flow_matching_first": self.objective.flow_matching_first,
        }
        for key, text in times.items():
            if text is not None and not is_time(text):
                raise ValueError(f"{key}: {text!r} is not a time such as 2400ba, 3ep or 600sec")


def read_yaml(path: str) -> DictConfig:
    """The YAML at `path` over the one that its key `base` names (relative to it), and so on."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        config = OmegaConf.load(file)
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    base = config.pop("base", None)
    return config if base is None else overlay(read_yaml(str(file.parent / base)), config)


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


def load_config(schema: type[T], path: str | None, overrides: list[str]) -> T:
    """The configuration as an instance of `schema`; path None: its defaults. Raises ConfigError."""
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override}: overrides are written key=value")
        try:
            OmegaConf.from_dotlist([override])
        except YAMLError as error:
            raise ConfigError(f"{override}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        given = overlay(read_yaml(path) if path else OmegaConf.create(), OmegaConf.from_dotlist(overrides))
        typed = OmegaConf.structured(schema)
        if "objective" in typed:
            typed.objective = OmegaConf.structured(check_objective(given))
        return OmegaConf.to_object(OmegaConf.merge(typed, given))
    except OmegaConfBaseException as error:
        raise ConfigError(_describe(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _describe(error: OmegaConfBaseException) -> str:
    key = error.full_key or error.key
    reason = str(error.msg or error).splitlines()[0]
    return f"{key}: {reason}" if key else reason


def as_dict(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """The resolved configuration as plain containers, to log and to print."""
    return OmegaConf.to_container(OmegaConf.structured(config))
