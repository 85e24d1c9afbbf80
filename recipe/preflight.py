"""Check everything outside the code before a run: `python -m recipe.preflight CONFIG.yaml [key=value ...]`.

Every run does the same first. Each failure names the setting, and the command that mends it.
"""

import logging
import math
import netrc
import os
import shutil
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import NamedTuple

import torch
from composer.utils import dist, parse_uri

from recipe.checkpoints import PROBE, DamageError, Resumable, check_dataset, fork, own_checkpoints
from recipe.config import ConfigError, TrainConfig, load_config, yaml_of
from recipe.data import SHUFFLE_WINDOW, DataConfig
from recipe.dit import NetworkConfig
from recipe.manual import answer
from recipe.normalizer import Normalizer, make_normalizer
from recipe.plan import count_parameters
from recipe.plan_finish import Finish
from recipe.text import TextConfig
from recipe.warm_start import Weights, check_weights
from storage import Folders, StorageError, status, transient
from storage.manifest import DatasetError, Manifest, open_dataset

OCI_LOGIN = "oci setup config"
log = logging.getLogger("recipe.preflight")


def check_data(data: DataConfig, model: NetworkConfig, folders: Folders) -> tuple[Manifest, Normalizer]:
    """Return the manifest, compared with its index and the model, and the normaliser. Raises ConfigError."""
    if not data.remote and not os.path.isdir(data.local):
        raise ConfigError(f"data.local: {data.local} is not a folder, and data.remote is not set")
    try:
        manifest, _ = open_dataset(data.source, folders)
    except DatasetError as error:
        if not data.remote:
            raise ConfigError(f"data.local: {error}") from error
        cause = error.__cause__  # the service's answer, where that is the reason
        hint = f". Fix: {remedy(data.remote, cause)}" if isinstance(cause, StorageError) else ""
        raise ConfigError(f"data.remote: {error}{hint}") from error
    found = {"channels": manifest.channels, "size": manifest.shape[1], "classes": len(manifest.class_names)}
    for key, there in found.items():
        if (here := getattr(model, key)) != there and (key != "classes" or model.classes):
            raise ConfigError(f"model.{key}: {here} differs from the {there} of {data.source}")
    for key in ("batch_size", "canonical_nodes"):
        if (asked := getattr(data, key)) > (most := manifest.num_samples):
            raise ConfigError(f"data.{key}: {asked} is more than the {most} samples of {data.source}")
    if model.text is not None:
        check_text(model.text, manifest, data.source)
    return manifest, make_normalizer(data.normalize, manifest)


def check_text(text: TextConfig, manifest: Manifest, source: str) -> None:
    """Raise ConfigError unless the dataset has the prompts that the network takes; warn of those that are
    cut.
    """
    if manifest.caption_bytes is None:
        raise ConfigError(f"model.text: {source} has no captions (streaming_convert --captions)")
    if text.encoder == "bytes":
        cut = sum(count for size, count in manifest.caption_bytes.items() if int(size) >= text.tokens)
        if cut:
            log.warning(
                "model.text.tokens: %d cuts %d of the %d captions of %s",
                text.tokens, cut, sum(manifest.caption_bytes.values()), source,
            )  # fmt: skip
        return
    if manifest.text is None:
        raise ConfigError(
            f"model.text.encoder: {text.encoder} needs embeddings, and {source} has none "
            f"(streaming_convert --text-encoder); bytes does without"
        )
    for key in ("tokens", "width"):
        if (here := getattr(text, key)) != (there := manifest.text[key]):
            raise ConfigError(f"model.text.{key}: {here} differs from the {there} of {source}")


def remedy(uri: str, error: StorageError) -> str:
    """Return the command that mends, or at least shows, why `uri` cannot be used."""
    if "://" not in uri:
        return f"ls -ld {uri}"
    scheme, bucket, path = parse_uri(uri)
    s3, gs = os.environ.get("S3_ENDPOINT_URL", "https://s3.amazonaws.com"), "https://storage.googleapis.com"
    endpoint = ' --endpoint-url "$S3_ENDPOINT_URL"' if "S3_ENDPOINT_URL" in os.environ else ""
    if transient(error):  # does the service answer at all?
        return {"s3": f"curl -I {s3}", "gs": f"curl -I {gs}", "oci": "oci os ns get"}[scheme]
    if status(error) in (None, 401):
        logins = {"s3": "aws configure", "gs": "gcloud auth application-default login", "oci": OCI_LOGIN}
        return logins[scheme]
    if "BucketNotFound" in str(error) or "NoSuchBucket" in str(error):
        return {
            "s3": f"aws s3 mb s3://{bucket}{endpoint}",
            "gs": f"gcloud storage buckets create gs://{bucket}",
            "oci": f"oci os bucket create --name {bucket} --compartment-id OCID",
        }[scheme]
    return {
        "s3": f"aws s3 ls {uri}/{endpoint}",
        "gs": f"gcloud storage ls {uri}/",
        "oci": f"oci os object list --bucket-name {bucket} --prefix '{path}' --limit 1",
    }[scheme]


@contextmanager
def naming(key: str, uri: str) -> Iterator[None]:
    """Turn a StorageError into a ConfigError that names the setting, and the command that mends it."""
    try:
        yield
    except DamageError as error:
        raise ConfigError(f"{key}: {error}") from error
    except StorageError as error:
        raise ConfigError(f"{key}: {error}. Fix: {remedy(uri, error)}") from error


def writable(key: str, uri: str, folders: Folders) -> list[str]:
    """Return the names of the files in a folder: list it, write to it and delete. Raises ConfigError."""
    probe = f"{PROBE}-{uuid.uuid4().hex}"  # nodes may share the folder
    with naming(key, uri):
        folder = folders[uri]
        names = [name for name in folder.names() if not name.startswith(PROBE)]
        folder.write(probe, b"")
        folder.delete(probe)
    return names


def beginning(
    config: TrainConfig, manifest: Manifest, normalizer: Normalizer, folders: Folders, names: list[str]
) -> tuple[Resumable, Weights | None]:
    """Return the run's checkpoints; until it has one of its own, what `fork_from` or `init_from` names.

    names: of the files in its save_folder. Raises ConfigError.
    """
    with naming("save_folder", config.save_folder):
        point = own_checkpoints(config, folders, names)
    weights = None
    if not point.saved and config.fork_from:
        with naming("fork_from", config.fork_from):
            point = fork(config, folders)
    elif not point.saved and config.init_from:
        with naming("init_from", config.init_from):
            weights = check_weights(config, manifest, normalizer, folders)
    check_dataset(config.data, manifest, point)
    return point, weights


def oci_agreement(uris: dict[str, str]) -> Iterator[str]:
    """Yield how OCI_CONFIG_FILE (Composer's) and ~/.oci/config (Streaming's) differ; uris: by setting."""
    import oci

    if not any(uri.startswith("oci://") for uri in uris.values()):
        return
    try:
        named = oci.config.from_file(os.environ.get("OCI_CONFIG_FILE", "~/.oci/config"))
        home = oci.config.from_file()
        oci.config.validate_config(named)
        namespace = oci.object_storage.ObjectStorageClient(named).get_namespace().data
    except Exception as error:  # the SDK has many for a bad configuration
        yield f"oci://: {type(error).__name__}: {error}. Fix: {OCI_LOGIN} (shown by: oci os ns get)"
        return
    different = [k for k in ("user", "tenancy", "fingerprint", "region") if named.get(k) != home.get(k)]
    if different:
        yield (
            f"OCI_CONFIG_FILE: {os.environ['OCI_CONFIG_FILE']} and ~/.oci/config differ in "
            f"{', '.join(different)}; checkpoints would use the first, data the second. "
            f"Fix: unset OCI_CONFIG_FILE"
        )
    for key, uri in uris.items():
        other = uri.partition("://")[2].partition("/")[0].partition("@")[2]
        if uri.startswith("oci://") and other and other != namespace:
            yield f"{key}: namespace {other!r} is not {namespace!r}, the one that `oci os ns get` shows"


def checkpoint_bytes(config: TrainConfig) -> int:
    """Return the bytes of a checkpoint: the student, its averages and the optimizer's state, in float32, and
    the moments and maps of a finish.
    """
    size = count_parameters(config)
    return 4 * (size.whole + size.averages + size.optimizer) + Finish(config).saved_bytes()


def held(folder: str | Path) -> int:
    """Return the bytes of all files in a local folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def needs(config: TrainConfig, manifest: Manifest) -> Iterator[tuple[str, str, int]]:
    """Yield (setting, path, bytes to come) of a run.

    That is one checkpoint more than are kept, or one on its way to a bucket, and the dataset's share of the
    cache. What an earlier start left there counts as its own.
    """
    size = checkpoint_bytes(config)
    if "://" in config.save_folder:
        yield "folder", config.folder, size - held(Path(config.folder, "staging"))
    else:
        kept = (max(config.save_keep, 1) + 1) * size
        yield "save_folder", config.save_folder, kept - held(config.save_folder)
    if config.data.remote:
        shards = manifest.shards
        total = sum(shard["bytes"] for shard in shards.values())
        here = [shard["bytes"] for name, shard in shards.items() if Path(config.data.local, name).exists()]
        yield "data.local", config.data.local, min(total, config.data.cache_bytes or total) - sum(here)


def disk_space(config: TrainConfig, manifest: Manifest) -> Iterator[str]:
    """Yield the disks without room for all that goes there."""
    disks = defaultdict(list)
    for key, path, missing in needs(config, manifest):
        place = Path(path).absolute()
        while not place.exists():
            place = place.parent
        disks[place.stat().st_dev].append((f"{key}: {path}", max(missing, 0), place))
    for parts in disks.values():
        names, missing, places = zip(*parts, strict=True)
        free = shutil.disk_usage(places[0]).free
        if free < sum(missing):
            figures = f"{math.ceil(sum(missing) / 1e6)} MB needed, {int(free / 1e6)} MB free"
            yield f"{', '.join(names)}: {figures}. Fix: df -h {places[0]}"


def cache_limit(data: DataConfig, ranks: int, manifest: Manifest) -> Iterator[str]:
    """Yield a problem where the cache is smaller than what a node shuffles over at a time.

    Such a one would fetch a shard for almost every sample. Streaming shuffles each canonical node's samples
    in windows, which overlap: two of them are in use. It refuses less than four shards.
    """
    limit = data.cache_bytes
    if not limit or not data.shuffle:
        return
    sizes = [shard["bytes"] for shard in manifest.shards.values()]
    in_use = min(1, 2 * data.canonical_nodes * SHUFFLE_WINDOW / manifest.num_samples)
    nodes = ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    need = max(sum(sizes) * in_use / nodes, 4 * max(sizes))
    if limit < need:
        yield (
            f"data.cache_limit: {data.cache_limit} is less than what a node shuffles over at a time "
            f"here. Fix: set data.cache_limit={int(need / 2**20) + 1}mb or more, or null"
        )


def has_wandb_key() -> bool:
    """Return True if the environment has a key of Weights & Biases, or `wandb login` has left one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, ValueError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False


def surroundings(config: TrainConfig) -> Iterator[str]:
    """Yield what this machine lacks: a GPU, a temporary folder, a key of Weights & Biases, real images."""
    if config.precision != "fp32" and not torch.cuda.is_available():  # Composer trains in bf16 on a GPU alone
        yield f"precision: {config.precision} needs a GPU, and there is none here. Fix: set precision=fp32"
    longest, folder = 107 - len("/pymp-12345678/listener-12345678"), gettempdir()
    if config.data.workers and len(folder) > longest:  # a longer path is no socket's: workers would hang
        yield (
            f"data.workers: {config.data.workers} need a temporary folder of at most {longest} characters, "
            f"{folder} has {len(folder)}. Fix: set TMPDIR=/tmp, or data.workers=0"
        )
    if config.log.wandb == "online" and not has_wandb_key():
        yield "log.wandb: online, but there is no key. Fix: run wandb login, or set log.wandb=offline"
    for name, path in config.objective.features.items() if config.objective.finishes else ():
        if not Path(path).exists():
            yield f"objective.features.{name}: {path} does not exist. Fix: convert it, or name another"


class Findings(NamedTuple):
    """What the checks before a run have found, for the run to go on with.

    names: of the files in its save_folder; point: the checkpoints that it can go on from, none for a new run;
    weights: those of `init_from`, for a new run; folders: opened by this process so far.
    """

    manifest: Manifest
    normalizer: Normalizer
    names: list[str]
    point: Resumable
    weights: Weights | None
    folders: Folders


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Add the message of a ConfigError to the problems instead of raising it."""
    try:
        yield
    except ConfigError as error:
        problems.append(str(error))


def examine(config: TrainConfig, ranks: int) -> tuple[list[str], Findings | None]:
    """Return all that would make a run of `config` on that many ranks fail, and what there is for it."""
    folders = Folders()
    uris = {"data.remote": config.data.remote or "", "save_folder": config.save_folder}
    found = [*config.uneven(ranks), *surroundings(config), *oci_agreement(uris)]
    with collecting(found):
        manifest, normalizer = check_data(config.data, config.model, folders)
    with collecting(found):
        writable("folder", config.folder, folders)
    with collecting(found):
        names = writable("save_folder", config.save_folder, folders)
    if found:
        return found, None
    found += [*cache_limit(config.data, ranks, manifest), *disk_space(config, manifest)]
    with collecting(found):
        point, weights = beginning(config, manifest, normalizer, folders, names)
    return found, None if found else Findings(manifest, normalizer, names, point, weights, folders)


def shared(folder: str) -> bool:
    """Return True if all ranks see a file that rank 0 makes in a local folder."""
    probe = Path(folder, f"{PROBE}-{dist.all_gather_object(uuid.uuid4().hex)[0]}")
    if dist.get_global_rank() == 0:
        probe.touch()
    dist.barrier()
    seen = dist.all_gather_object(probe.exists())
    if dist.get_global_rank() == 0:
        probe.unlink()
    return all(seen)


def check(config: TrainConfig) -> Findings:
    """Look on every node of a run, since each has its own credentials and disks; all ranks call it.

    Returns what rank 0 has found, with the folders that this process has opened. Raises ConfigError.
    """
    problems, mine = examine(config, dist.get_world_size()) if dist.get_local_rank() == 0 else ([], None)
    folders = mine.folders if mine else Folders()
    sent = mine and mine._replace(folders=Folders())  # connections cannot be sent
    answers = dist.all_gather_object((problems, sent))
    if found := sorted({problem for problems, _ in answers for problem in problems}):
        raise ConfigError("\n".join(found))
    if "://" not in config.save_folder and not shared(config.save_folder):
        raise ConfigError(
            f"save_folder: {config.save_folder} is not one folder that all nodes see, and each writes "
            f"a part of a checkpoint: choose one on a file system that they share, or in a bucket"
        )
    return answers[0][1]._replace(folders=folders)


def main(arguments: list[str]) -> None:
    """Run the command line: CONFIG.yaml [key=value ...]."""
    answer(arguments, "python -m recipe.preflight CONFIG.yaml [key=value ...]", __doc__, TrainConfig)
    ranks = int(os.environ.get("WORLD_SIZE", 0)) or torch.cuda.device_count() or 1
    try:
        config = load_config(TrainConfig, yaml_of(arguments[0]), arguments[1:])
    except ConfigError as error:
        raise SystemExit(f"config error: {error}") from error
    found, _ = examine(config, ranks)
    if found:
        raise SystemExit("\n".join(found))
    print(f"{config.run_name}: ready on {ranks} rank(s): {config.data.source} -> {config.save_folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
