"""Weights for inference: NAME.safetensors and a readable NAME.json beside it. Nothing is ever pickled.

The JSON holds `model` (the architecture), `method` (objective, scaled, guidance), `data` (column, mean and
std of the normalisation, class names, encoder), `step`, `average` (ema or net: which of the run's weights),
`commit` and `sha256` (of the tensors' file). Weights of an adapter (recipe/adapter.py) hold what was trained
alone; `adapter` names the base, other weights, which loading finds at that path or beside the adapter.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from recipe.adapter import PREFIX, Adapter, adapter_state, add_adapter, merge
from recipe.dit import Denoiser, NetworkConfig
from recipe.networks import AnyNetwork, build
from recipe.objectives import from_facts
from recipe.objectives.base import adapt
from recipe.settings import Count, Interval, Positive, make
from storage import Folder, MissingError
from storage.outside import file_digest, parse_json, read_bytes

FORMAT = 1
LARGEST = 2**28  # numbers in a sample's positions: 512 px in patches of 4 at a width of 1024 have 2^24


class DataFacts(TypedDict):
    """What weights say of their data: which column is normalised, and by which mean and deviation."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    column: Literal["image", "latents"]
    mean: Annotated[list[float], Field(min_length=1)]
    std: Annotated[list[float], Field(min_length=1)]


class Finish(TypedDict):
    """What weights say of one extractor that they were finished on: how their samples were drawn."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    nfe: NotRequired[Count]
    w: NotRequired[Positive | None]
    interval: NotRequired[Interval | None]


class Facts(TypedDict):
    """What must be in the JSON of weights, and of which kind; more may be there (see above)."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: AnyNetwork
    method: dict[str, Any]
    data: DataFacts
    step: Annotated[int, Field(ge=0)] | None
    average: str
    commit: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    finished: NotRequired[list[Finish]]
    adapter: NotRequired[Adapter]


def commit() -> str:
    """Return the commit of the checkout that this code is in, with `+` where files differ from it.

    Code that pip installed is in none, though a repository of someone else's may contain the environment: its
    commit is `version 0.1.0`. Where there is no version either, it is `unknown`.
    """
    git, here = ["git", "-C", str(Path(__file__).parent)], Path(__file__).name
    with suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([*git, "ls-files", "--error-unmatch", here], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True)
        return head.stdout.decode().strip() + ("+" if changes.stdout.strip() else "")
    with suppress(metadata.PackageNotFoundError):
        return f"version {metadata.version('terminal-velocity')}"
    return "unknown"


def save_weights(
    path: str | Path, state: dict[str, Tensor], config: NetworkConfig, facts: dict[str, Any]
) -> Path:
    """Write PATH.safetensors, then PATH.json, each whole or not at all; returns the JSON's path.

    facts: `method`, `data`, `step`, `average` as described above; `model`, `commit` and `format` are added.
    """
    weights, description = _files(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in state.items()}, f"{weights}.part")
    digest = file_digest(Path(f"{weights}.part"), hashlib.sha256())
    os.replace(f"{weights}.part", weights)
    facts = {"format": FORMAT, "model": asdict(config), **facts, "commit": commit(), "sha256": digest}
    description.with_suffix(".part").write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(description.with_suffix(".part"), description)
    return description


def read_facts(path: str | Path) -> dict[str, Any]:
    """Read the JSON of weights at `path`, with or without suffix. Raises FileNotFoundError, ValueError."""
    weights, description = _files(path)
    for file in (weights, description):
        if not file.is_file():
            raise FileNotFoundError(f"weights: {file} does not exist")
    return parse_facts(read_bytes(description), str(description))


def parse_facts(text: bytes, where: str) -> dict[str, Any]:
    """Parse a weights' JSON that comes from `where`. Raises ValueError, naming it."""
    try:
        facts = dict(parse_json(text, where))
    except (ValueError, TypeError) as error:
        raise ValueError(f"weights: {where} is not a description of weights: {error}") from error
    if facts.get("format") != FORMAT:
        raise ValueError(f"weights: {where} has format {facts.get('format')!r}, expected {FORMAT}")
    try:
        make(Facts, facts)
        from_facts(facts["method"])
    except ValueError as error:
        raise ValueError(f"weights: {where}: {error}") from error
    return facts


def adapter_of(facts: dict[str, Any]) -> Adapter | None:
    """Return what weights with these facts say of their adapter, None where they are whole."""
    return make(Adapter, facts["adapter"], "adapter") if "adapter" in facts else None


def find_label(asked: str | int, classes: int, names: Sequence[str]) -> int | None:
    """Return the label, of 0..classes-1, of a number or the name of a class; None where there is none.

    A text is a name first, and a number where no class has that name; a number is a number.
    """
    named = {str(name): label for label, name in enumerate(names[:classes])}
    if isinstance(asked, str) and asked in named:
        return named[asked]
    return int(asked) if str(asked) in map(str, range(classes)) else None


def shapes(config: NetworkConfig, adapter: Adapter | None = None) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the weights of this architecture, or of an adapter's."""
    with torch.device("meta"):
        net = build(config, initialize=False)
        if adapter is not None:
            add_adapter(net, adapter)
    state = net.state_dict()
    if adapter is not None:
        state = adapter_state(state, adapter.modules_to_save)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def stated_architecture(facts: dict[str, Any], path: Path) -> NetworkConfig:
    """Return the architecture in a weights' JSON, if the tensors at `path` have it. Raises ValueError.

    Nothing is believed before it has been compared with the file's header, so no JSON can fill the memory.
    """
    try:
        config = make(AnyNetwork, facts["model"], "model")
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights: {path}: {error}") from error
    expected = shapes(config, adapter_of(facts))
    for name in expected | found:
        here, there = found.get(name, "nothing"), expected.get(name, "nothing")
        if here != there:
            raise ValueError(f"weights: {path}: {name} is {here}, the JSON's `model` makes it {there}")
    if not len(facts["data"]["mean"]) == len(facts["data"]["std"]) == config.channels:
        raise ValueError(f"weights: {path}: data.mean and data.std must have {config.channels} numbers")
    if config.sequence * config.width > LARGEST:  # positions are in no tensor
        raise ValueError(f"weights: {path}: model.size: {config.size} makes {config.sequence} tokens")
    return config


def check_digest(path: str | Path, facts: dict[str, Any]) -> None:
    """Raise ValueError unless the tensors' file has the checksum that the JSON, `facts`, says."""
    file = _files(path)[0]
    if file_digest(file, hashlib.sha256()) != facts["sha256"]:
        raise ValueError(f"weights: {file} is not the file that its JSON describes (sha256)")


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of weights by name. Raises FileNotFoundError, ValueError as `load_weights` does."""
    facts, file = read_facts(path), _files(path)[0]
    check_digest(path, facts)
    stated_architecture(facts, file)
    return load_file(file)


def load_weights(path: str | Path, device: str | torch.device = "cpu") -> tuple[Denoiser, dict[str, Any]]:
    """Load the network, in evaluation mode and without gradients, and its facts.

    Of an adapter, the network is the base with the adapter merged into it. Raises FileNotFoundError or
    ValueError, the latter also where tensors and JSON do not belong together.
    """
    facts = read_facts(path)
    check_digest(path, facts)
    net = build(stated_architecture(facts, _files(path)[0]), initialize=False).to(device)
    state = load_file(_files(path)[0], device=str(device))
    if (adapter := adapter_of(facts)) is not None:
        state = whole_state(path, net, state, adapter, facts)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False), facts


def whole_state(
    path: str | Path, net: Denoiser, state: dict[str, Tensor], adapter: Adapter, facts: dict[str, Any]
) -> dict[str, Tensor]:
    """Return all weights of `net`: an adapter's, `state`, in those of its base as its objective takes them.

    Raises ValueError where the base is not to be had, or lacks weights.
    """
    base, told = load_weights(find_base(path, adapter), next(net.parameters()).device)
    adapt(base, from_facts(told["method"]), from_facts(facts["method"]))
    own = {name: tensor.shape for name, tensor in net.state_dict().items()}
    found = {name: x for name, x in base.state_dict().items() if own.get(name) == x.shape}
    there = {*found, *(name.removeprefix(PREFIX) for name in state)}
    if lacking := [name for name in own if name not in there]:
        raise ValueError(f"weights: {path} is an adapter, and {adapter.base} lacks {lacking[0]} for it")
    return merge(found, state, adapter)


def find_base(path: str | Path, adapter: Adapter) -> Path:
    """Return the weights that an adapter at `path` changes: those that it names, or a copy beside it.

    Raises ValueError where neither has the base's checksum, or they are an adapter themselves.
    """
    named = Path(adapter.base)  # no URI is one: what is in a bucket is found beside the adapter alone
    for place in (named, _files(path)[0].parent / named.name):
        if all(file.is_file() for file in _files(place)):
            facts = read_facts(place)
            if facts["sha256"] == adapter.sha256 and "adapter" not in facts:
                return place
    found = f"{adapter.base} (sha256 {adapter.sha256[:12]})"
    wanted = "which is neither there nor beside it"
    if "://" in adapter.base:
        wanted = "which is not beside it: download it and put it beside the adapter under its own name"
    raise ValueError(f"weights: {path} is an adapter of {found}, {wanted}")


def base_files(facts: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return those of `names`, beside weights with these facts, that are files of an adapter's base."""
    adapter = adapter_of(facts)
    base = [] if adapter is None else [file.name for file in _files(Path(adapter.base).name)]
    return sorted({*base} & {*names})


def fetch_weights(source: Folder, name: str, target: Path) -> None:
    """Copy weights to a local folder, with an adapter's base that lies beside them.

    name: with or without suffix. Raises StorageError, ValueError.
    """
    description = _files(name)[1].name
    text = source.read(description)
    adapter = adapter_of(parse_facts(text, f"{source.uri}/{description}"))
    copy_weights(source, description, text, target)
    if adapter is not None:
        base = _files(Path(adapter.base).name)[1].name
        with suppress(MissingError):
            copy_weights(source, base, source.read(base), target)


def copy_weights(source: Folder, description: str, text: bytes, target: Path) -> None:
    """Copy weights whose JSON, `description`, holds `text` to a local folder, unless that holds them already.

    The JSON is written last, as the sign that they are whole.
    """
    weights, there = (target / file for file in _files(description))
    if not there.is_file() or there.read_bytes() != text:
        source.get(weights.name, weights)
        there.write_bytes(text)


def newest_weights(path: str | Path) -> Path:
    """Return `path`; of a folder of exports its newest, the average first. Raises FileNotFoundError."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    name = newest_export(file.name for file in folder.iterdir())
    if name is None:
        raise FileNotFoundError(f"weights: {folder} is a folder without weights of a run (ba*-ema.json)")
    return folder / name


def newest_export(names: Iterable[str]) -> str | None:
    """Return the name of the newest exported JSON, of one step the evaluation average first, or None."""
    found = filter(None, (re.fullmatch(r"ba(\d+)-(\w+)\.json", name) for name in names))
    return max(((int(name[1]), name[2] == "ema", name[0]) for name in found), default=(0, False, None))[2]


def _files(path: str | Path) -> tuple[Path, Path]:
    stem = str(path).removesuffix(".json").removesuffix(".safetensors")
    return Path(f"{stem}.safetensors"), Path(f"{stem}.json")
