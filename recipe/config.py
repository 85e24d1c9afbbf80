"""Configuration: a YAML, the YAML that it names as `base`, and key=value overrides, checked before any work.

Every section is a class of settings (recipe/settings.py) beside the code that reads it. An unknown key, a
wrong type or an impossible combination is a ConfigError of one line that names the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from recipe.adapter import AdapterConfig
from recipe.commands import YAMLS
from recipe.data import DataConfig
from recipe.dit import DiTConfig, NetworkConfig
from recipe.ema import EMAConfig
from recipe.guard import StepConfig
from recipe.networks import AnyNetwork
from recipe.objectives import TVM, AnyObjective
from recipe.optimizer import OptimizerConfig
from recipe.parallel import ParallelConfig
from recipe.settings import (
    MISSING,
    ConfigError,
    Count,
    Duration,
    FileName,
    Filled,
    LocalPath,
    Many,
    Place,
    Positive,
    Says,
    Seconds,
    Seed,
    Settings,
    Time,
    Wandb,
    defaults,
    make,
)

T = TypeVar("T")
# Sections that are one of several: the key that chooses, its default, and what all of them know
CHOSEN = {
    "objective": ("name", TVM.name, ()),
    "model": ("network", DiTConfig.network, NetworkConfig.__pydantic_fields__.keys() - {"network"}),
}


@dataclass
class GridConfig(Settings):
    """Pictures of samples of the evaluation average while the run goes on, always from the same noise."""

    interval: Time | None = Field("1000ba", description="Time between two grids; null draws none.")
    labels: Many[Annotated[int, Field(ge=0, le=10**7)]] = Field(
        [], description="Labels of the grid, one row each; empty means the first ten classes."
    )
    columns: int = Field(8, ge=1, le=100, description="Number of samples of each label.")
    nfe: Filled[Annotated[int, Field(ge=1, le=1000)]] = Field(
        [1], description="Numbers of sampling steps, for each of which one picture is drawn."
    )
    vae: LocalPath | None = Field(
        None,
        description="Folder or hub name of the autoencoder that decodes latents; null shows them in false "
        "colours.",
    )


@dataclass
class LogConfig(Settings):
    """How a run reports on itself while it goes on."""

    interval: Count = Field(
        10,
        description="Batches between lines of train.jsonl, over which throughput and losses by time are "
        "averaged.",
    )
    peak_tflops: Positive | None = Field(
        None, description="Peak TFLOP/s of one device, for the MFU; null asks Composer's table of GPUs."
    )
    progress_bar: bool = Field(True, description="Whether a progress bar is shown.")
    wandb: Wandb = Field("off", description="Whether the run is logged to Weights & Biases, and how.")
    wandb_project: FileName = Field("terminal-velocity", description="Project in Weights & Biases.")


@dataclass
class TrainConfig(Settings):
    """One training run. Times are Composer's: 2400ba (batches), 3ep (epochs), 32000sp (samples), 600sec."""

    run_name: FileName = Field(description="Name of the run, which tells its checkpoints from others'.")
    folder: LocalPath = Field(
        description="Local folder of the run, which holds weights/, samples/, train.jsonl and what is on its "
        "way to a bucket."
    )
    duration: Duration = Field(description="Length of the whole training, such as 2400ba or 3ep.")
    save_folder: Place = Field(
        "${folder}/checkpoints",
        description="Folder of the checkpoints; weights and log are copied there, too, if it is in a bucket.",
    )
    save_interval: Time = Field("1000ba", description="Time between two checkpoints.")
    save_keep: Annotated[
        int, Field(ge=-1, le=1000), Says("must be a whole number from 1 to 1000, or -1 for all")
    ] = Field(2, description="Number of newest checkpoints that are kept; -1 keeps all.")
    fork_from: Place | None = Field(
        None,
        description="Checkpoint, as SAVE_FOLDER/ep0-ba40, with whose whole state this new run goes on.",
    )
    init_from: Place | None = Field(
        None, description="Exported or imported weights, or a folder of exports, that a new run begins with."
    )
    init_classes: Annotated[
        dict[str | int, str | int], Says("must name a class of init_from for each: {cat: tabby, 3: 7}")
    ] = Field(
        {},
        description="Classes that begin with those of init_from: {cat: tabby}, by names or numbers. Without "
        "it all do if there are as many there, else none.",
    )
    adapter: AdapterConfig | None = Field(None, description=AdapterConfig.__doc__)
    time_limit: Seconds | None = Field(
        None, description="Time after the start at which the run saves and exits with status 75."
    )
    export_interval: Time = Field("10000ba", description="Time between two exports of weights for inference.")
    export: Many[Literal["ema", "net"]] = Field(
        ["ema"],
        description="Which weights are exported: the evaluation average (ema), the student as it is (net).",
    )
    seed: Seed = Field(0, description="Seed of everything random: initial weights, order of samples, draws.")
    precision: Literal["fp32", "amp_bf16"] = Field(
        "fp32", description="Arithmetic of the network: float32, or bfloat16 by autocast."
    )
    microbatch: Count | None = Field(
        None, description="Samples of a rank in one forward pass; null takes all of the rank at once."
    )
    data: DataConfig = Field(default_factory=DataConfig, description=DataConfig.__doc__)
    model: AnyNetwork = Field(default_factory=DiTConfig, description="The network, chosen by `network`.")
    objective: AnyObjective = Field(default_factory=TVM, description="What is trained, chosen by its name.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description=OptimizerConfig.__doc__)
    ema: EMAConfig = Field(default_factory=EMAConfig, description=EMAConfig.__doc__)
    step: StepConfig = Field(default_factory=StepConfig, description=StepConfig.__doc__)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description=ParallelConfig.__doc__)
    grid: GridConfig = Field(default_factory=GridConfig, description=GridConfig.__doc__)
    log: LogConfig = Field(default_factory=LogConfig, description=LogConfig.__doc__)

    @model_validator(mode="after")
    def combinations(self) -> TrainConfig:
        """Raise ConfigError for settings that exclude each other."""
        if self.save_keep == 0:
            raise ConfigError("save_keep: 0 must be a whole number from 1 to 1000, or -1 for all")
        if self.microbatch is not None and self.microbatch > self.data.batch_size:
            raise ConfigError(
                f"microbatch: {self.microbatch} is more than data.batch_size, {self.data.batch_size}; "
                f"null takes a rank's whole batch at once"
            )
        if self.objective.finishes and not (self.init_from or self.fork_from):
            raise ConfigError(f"init_from: {self.objective.name} needs the weights that it finishes")
        if self.adapter and not (self.init_from or self.fork_from):
            raise ConfigError("adapter: needs init_from, the weights that it changes")
        if self.init_classes and not self.init_from:
            raise ConfigError("init_classes: names classes of init_from, which is not set")
        if self.init_from and self.fork_from:
            raise ConfigError(
                "init_from: begins a new run, and fork_from goes on with another: give one of them"
            )
        if not all(label <= self.model.classes for label in self.grid.labels):
            raise ConfigError(f"grid.labels: {self.grid.labels} must be in 0..{self.model.classes}")
        return self

    def uneven(self, ranks: int) -> list[str]:
        """Return what does not divide evenly: the global batch, a rank's share of it, the ranks themselves.

        A smaller last microbatch is refused with `compile`: blocks are compiled for each size, which doubles
        the graphs and exceeds dynamo's limit of eight.
        """
        problems, size, share = [], self.microbatch, 0
        try:
            share = self.data.per_rank(ranks)
        except ValueError as error:
            problems.append(str(error))
        if self.parallel.compile and size and size < share and share % size:
            below = max(n for n in range(1, size) if share % n == 0)
            problems.append(
                f"microbatch: {size} does not divide the {share} samples of a rank, and parallel.compile "
                f"wants microbatches of one size. Fix: set microbatch={below}"
            )
        if ranks % self.parallel.replicas:
            problems.append(f"parallel.replicas: {self.parallel.replicas} does not divide the {ranks} ranks")
        return problems


def find_yaml(name: str, folder: Path = Path()) -> Path:
    """Return the file `name` in `folder` if there is one, else the project's own YAML of that name.

    `yamls/eval/digits.yaml`, `eval/digits.yaml` and `eval/digits` are names of the same one.
    """
    given, own = folder / name, Path(f"{YAMLS}/{name.removeprefix('yamls/').removesuffix('.yaml')}.yaml")
    return own if own.is_file() and not given.is_file() else given


def yaml_of(path: str) -> str:
    """Return the path; of a dataset's folder, or its train/ or val/, its train.yaml. Raises ConfigError."""
    folder = Path(path)
    if not folder.is_dir() or find_yaml(path).is_file():
        return path
    places = [folder, folder.parent] if folder.name in ("train", "val") else [folder]
    found = [str(place / "train.yaml") for place in places if (place / "train.yaml").is_file()]
    if not found:
        raise ConfigError(f"{path}: must be a YAML, or the folder of a dataset that holds a train.yaml")
    return found[0]


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the YAML at `path` over the one that its key `base` names (relative to it), and so on."""
    files = (*above, path.resolve())
    if files[-1] in above:
        raise ConfigError(f"{above[0]}: its base leads back to itself: {' -> '.join(map(str, files))}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the project's own YAMLs are in {YAMLS}")
    try:
        config = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    config = OmegaConf.to_container(config)
    check_references(config)
    base = config.pop("base", None)
    if base is None:
        return config
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: {base} is not the name of one YAML")
    return overlay(read_yaml(find_yaml(base, path.parent), files), config)


def read_overrides(overrides: list[str]) -> dict[str, Any]:
    """Return key=value arguments as a configuration. Raises ConfigError."""
    given: dict[str, Any] = {}
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override}: overrides are written key=value")
        try:
            one = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (YAMLError, RecursionError) as error:
            raise ConfigError(f"{override}: not valid YAML: {' '.join(str(error).split())}") from error
        check_references(one)
        given = merge(given, one)
    return given


def check_references(value: Any, key: str = "") -> None:
    """Raise ConfigError for a value that OmegaConf would compute.

    A value may refer to another key, ${folder}; but what a resolver computes or reads from the environment
    may not end up in a name that goes to a bucket.
    """
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_references(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and "${" in re.sub(r"\$\{[\w.\[\]-]+\}", "", value):
        raise ConfigError(f"{key}: {value!r} may refer to other keys only, as in ${{folder}}")


def overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `over` laid on `under`, section by section.

    Where it names another objective, that section begins anew, and so does `objective.features`, which could
    only grow otherwise; where it names another network, what both know stays.
    """
    section = over.get("objective")
    for name, (key, default, kept) in CHOSEN.items():
        chosen = choice(over, name, key, "")
        if chosen and chosen != choice(under, name, key, default) and isinstance(under.get(name), dict):
            under = {**under, name: {k: value for k, value in under[name].items() if k in kept}}
    if isinstance(section, dict) and "features" in section and isinstance(under.get("objective"), dict):
        kept = {key: value for key, value in under["objective"].items() if key != "features"}
        under = {**under, "objective": kept}
    return merge(under, over)


def choice(config: dict[str, Any], section: str, key: str, default: str) -> str:
    """Return what a configuration sets for the key of a section, else the default."""
    found = config.get(section)
    return str(found.get(key, default)) if isinstance(found, dict) else default


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `over` laid on `under`, both plain containers; a key yet to be given replaces nothing."""
    merged = dict(under)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        elif value != MISSING or key not in merged:
            merged[key] = value
    return merged


def missing(config: dict[str, Any], above: str = "") -> Iterator[str]:
    """Yield the keys that still have to be given."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from missing(value, f"{above}{key}.")
        elif value == MISSING:
            yield f"{above}{key}"


def load_config(schema: type[T], path: str | None, overrides: list[str]) -> T:
    """Read a configuration as an instance of `schema`; path None means its defaults. Raises ConfigError.

    OmegaConf reads the user's own YAML and overrides, and resolves their references; it sees nothing else.
    """
    given = overlay(read_yaml(find_yaml(path)) if path else {}, read_overrides(overrides))
    config = overlay(defaults(schema), given)
    for key in missing(config):
        raise ConfigError(f"{key}: must be given")
    try:
        values = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        key, text = error.full_key or error.key, str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{key}: {text}" if key else text) from error
    return make(schema, values)
