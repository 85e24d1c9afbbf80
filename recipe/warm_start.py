"""Beginning a new run from weights: `init_from`, of any objective to any other, exported or imported.

The new network's velocity is, at step 0, exactly that of the weights, at the guidance weight at which these
are sampled; what the weights do not know (guidance, and the second time of an imported network) enters as
nothing and is learned.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipe.adapter import trained
from recipe.checkpoints import INIT_ONLY
from recipe.config import ConfigError, TrainConfig
from recipe.dit import NetworkConfig
from recipe.model import GenerativeModel
from recipe.networks import AnyNetwork
from recipe.normalizer import Normalizer
from recipe.objectives import Objective, from_facts
from recipe.objectives.base import adapt, output_ratio
from recipe.settings import make
from recipe.weights import fetch_weights, find_label, load_weights, newest_export, parse_facts
from storage import Folders
from storage.manifest import Manifest

log = logging.getLogger("recipe.warm_start")
EMBEDDERS = ("s_embedder", "guidance_embedder")
MAY_DIFFER = ("size", "patch", "channels", "classes")  # of a network: what does not fit then is new
TABLE = "y_embedder.embedding_table.weight"


class Weights(NamedTuple):
    """Weights to begin with: the URI of their folder, their name in it, and the content of their JSON.

    rows: the labels of the run whose embeddings begin with those of other labels there; said: how they differ
    from the run.
    """

    uri: str
    name: str
    facts: dict[str, Any]
    rows: dict[int, int]
    said: list[str]


def check_weights(
    config: TrainConfig, manifest: Manifest, normalizer: Normalizer, folders: Folders
) -> Weights:
    """Find the weights of `init_from`, of a folder of exports the newest; what cannot be taken is one
    ConfigError with all differences.

    Raises StorageError.
    """
    newest = newest_export(folders[config.init_from].names())
    path = f"{config.init_from}/{newest}" if newest else config.init_from
    folder, _, name = path.removesuffix(".json").removesuffix(".safetensors").rpartition("/")
    uri = folder or "."
    try:
        facts = parse_facts(folders[uri].read(f"{name}.json"), f"{uri}/{name}.json")
    except ValueError as error:
        raise ConfigError(f"init_from: {error}") from error
    if config.adapter and "adapter" in facts:
        merge = f"python -m eval.export {uri}/{name} --merge --out NAME"
        raise ConfigError(f"init_from: {uri}/{name} is an adapter itself. Fix: {merge}")
    fatal, said = differences(config.model, config.objective, normalizer, facts)
    if fatal:
        raise ConfigError(f"init_from: {config.init_from} does not fit: {'; '.join(fatal + said)}")
    here = config.model.classes, manifest.class_names
    there = facts["model"]["classes"], facts["data"].get("class_names") or []
    rows = class_rows(config.init_classes, here, there)
    said += other_data(manifest, facts["data"], bool(config.model.classes and not rows))
    return Weights(uri, name, facts, rows, said)


def differences(
    model: NetworkConfig, objective: Objective, normalizer: Normalizer, facts: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Return how weights with these facts differ from the run: what cannot be, and what will be new.

    A finish, which goes on with a network as it is, allows no difference. Raises ConfigError.
    """
    try:
        theirs = asdict(make(AnyNetwork, facts["model"], "model"))
    except ValueError as error:
        raise ConfigError(f"init_from: {error}") from error
    mine = {k: v for k, v in asdict(model).items() if k not in INIT_ONLY}
    if theirs.get("text") is None:
        mine.pop("text", None)  # begins as nothing
    if mine["network"] != theirs["network"]:
        mine = {"network": mine["network"]}
    told = {key: f"model.{key}: {v} here, {theirs[key]} there" for key, v in mine.items() if theirs[key] != v}
    may_differ = {*MAY_DIFFER, *(["text"] if mine.get("text", 0) is None else [])}
    may_differ = may_differ if theirs["network"] == "dit" else {"classes"}
    for key in ("mean", "std"):
        here, there = getattr(normalizer, key).flatten(), torch.tensor(facts["data"][key])
        if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-4):
            told[key] = f"data.normalize.{key}: {here.tolist()} here, {there.tolist()} there"
            may_differ.add(key)
    if objective.finishes:
        return list(told.values()), []
    fatal = [text for key, text in told.items() if key not in may_differ]
    try:
        source = from_facts(facts["method"])
        if output_ratio(source, objective) != 1 and model.output == "x":
            raise ValueError("objective.scaled: with model.output x the parameterisation must be the same")
        if (here := objective.noise_scale) != (there := source.noise_scale):
            raise ValueError(f"objective.noise_scale: {here:g} here, {there:g} there")
    except ValueError as error:
        fatal.append(str(error))
    return fatal, [text for key, text in told.items() if key in may_differ]


def other_data(manifest: Manifest, data: dict[str, Any], classes: bool) -> list[str]:
    """Return how the data of weights differ from the run's where every shape fits all the same: made by
    another autoencoder, or, if `classes` are to be the same, of other ones.
    """
    said = []
    here, there = manifest.encoder, data.get("encoder") or {}
    hashes = here.get("hash"), there.get("hash")
    if manifest.column != data["column"]:
        said.append(f"data: {manifest.column} here, {data['column']} there")
    elif manifest.column == "latents" and all(hashes) and hashes[0] != hashes[1]:
        named = [f"{one.get('model') or one.get('name')} ({one['hash']})" for one in (here, there)]
        said.append(f"autoencoder: {named[0]} here, {named[1]} there, whose latents mean other pictures")
    names = manifest.class_names, data.get("class_names") or []
    if classes and len(names[0]) == len(names[1]):
        other = [f"{a!r} here, {b!r} there" for a, b in zip(*names, strict=True) if a != b]
        if other:
            told = f"{len(other)} of {len(names[0])} have another name, such as {other[0]}"
            said.append(f"classes: {told}. Fix where they are the same: init_classes={{mine: theirs}}")
    return said


def class_rows(
    asked: dict[str | int, str | int], here: tuple[int, list[str]], there: tuple[int, list[str]]
) -> dict[int, int]:
    """Return labels of the run and the labels of the weights whose embeddings they begin with.

    here, there: number and names of the classes of the run, and of the weights. Raises ConfigError.
    """

    def label_of(name: str | int, where: str, classes: int, names: list[str]) -> int:
        if (label := find_label(name, classes, names)) is None:
            known = ", ".join(map(str, [*range(classes), *names[:classes]]))
            raise ConfigError(f"init_classes: {name!r} is no class {where}: {known}"[:300])
        return label

    return {
        label_of(mine, "here", *here): label_of(theirs, "in the weights", *there)
        for mine, theirs in asked.items()
    }


def fitting(own: dict[str, Tensor], state: dict[str, Tensor], rows: dict[int, int]) -> dict[str, Tensor]:
    """Return those of the weights `state` that fit a network with the weights `own`.

    Of the label table, where the number of classes differs or `rows` are given, that is a new one with those
    rows and the last, which stands for no label.
    """
    found = {name: x for name, x in state.items() if name in own and own[name].shape == x.shape}
    if TABLE in own and (TABLE not in found or rows):
        found[TABLE] = own[TABLE].clone()
        found[TABLE][-1] = state[TABLE][-1]
        for mine, theirs in rows.items():
            found[TABLE][mine] = state[TABLE][theirs]
    return found


def earlier_finishes(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what weights with these facts were finished on (see `Objective`), with their steps by then."""
    return [{"steps": facts["step"], **one} for one in facts.get("finished", [])]


def check_frozen(new: list[str], whole: list[str]) -> None:
    """Raise ConfigError where weights that `init_from` does not have would be frozen below an adapter."""
    names = [name.split(".") for name in new if not trained(name, whole)]
    parts = {name[2 if name[0].endswith("blocks") else 0] for name in names}
    if parts:
        wanted = ",".join(sorted({*parts, *whole}))
        raise ConfigError(
            f"adapter.modules_to_save: {', '.join(sorted(parts))}: not in the weights of init_from, and not "
            f"trained here. Fix: set adapter.modules_to_save=[{wanted}]"
        )


def warm_start(model: GenerativeModel, weights: Weights, folders: Folders) -> str:
    """Put weights into the student and its averages; return what is taken and what is new.

    Raises ConfigError, StorageError.
    """
    with TemporaryDirectory() as scratch:
        try:
            fetch_weights(folders[weights.uri], weights.name, Path(scratch))
            net, facts = load_weights(Path(scratch, weights.name))
        except ValueError as error:
            told = str(error).replace(f"{scratch}/", f"{weights.uri}/")
            raise ConfigError(f"init_from: {told}") from error
    source = from_facts(facts["method"])
    if not model.objective.finishes:
        model.objective.finished = earlier_finishes(facts)
    adapt(net, source, model.objective)
    rows, own = weights.rows, model.net.state_dict()
    state: dict[str, Tensor] = fitting(own, net.state_dict(), rows)
    for mine in (model.net, model.target, model.ema):
        if mine is not None:
            mine.load_state_dict({**mine.state_dict(), **state})
    new = [e for e in EMBEDDERS if not state[f"{e}.mlp.2.weight"].any()]
    if not model.objective.guidance_input:
        new = [e for e in new if e != "guidance_embedder"]
    lacking = {key for key in own.keys() - state.keys() if "lora_" not in key}
    unknown = [*lacking, *(f"{e}.mlp" for e in new)]
    new += sorted({key.rpartition(".")[0] for key in lacking if "text_" not in key})
    if rows or net.config.classes != model.net.config.classes:
        new.append(f"{len(own[TABLE]) - 1 - len(rows)} classes")
        unknown.append(TABLE)
    if model.adapter is not None:
        if (source if model.objective.finishes else model.objective).name == "flow_matching":
            unknown = [name for name in unknown if name != "s_embedder.mlp"]  # d is 0 always
        check_frozen(unknown, model.adapter["modules_to_save"])
        model.adapter |= {"base": f"{weights.uri}/{weights.name}", "sha256": facts["sha256"]}
        new.append(f"an adapter of rank {model.adapter['rank']}")
    new += ["text"] if model.net.config.text is not None and net.config.text is None else []
    taken = sum(x.numel() for key, x in state.items() if key.split(".")[0] not in new)
    for text in weights.said:
        log.warning("init_from: %s", text)
    return (
        f"{weights.uri}/{weights.name} ({source.name}, step {facts['step']}): {taken:,} parameters taken, "
        f"new: {', '.join(new) or 'none'}"
    )
