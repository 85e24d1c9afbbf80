"""Checkpoints that can be trusted: found by listing, complete or not at all, checked before they are loaded.

Composer saves and loads them on local disk; around it stands

    SAVE_FOLDER/run.json                  whose folder this is: run name, architecture, latest start
    SAVE_FOLDER/ep0-ba40/__0_0.distcp     what each rank saved (rank0.pt without FSDP2), and .metadata
    SAVE_FOLDER/ep0-ba40/rank0.json       that rank's receipt, written last: checksums of its files; rank 0's
                                          says with which settings and on which dataset the run was trained
    SAVE_FOLDER/weights/, train.jsonl     where it is a bucket: copies of what is exported and logged locally
    FOLDER/start.json                     the latest start that writes weights and log there

A checkpoint is complete when every rank's receipt is there. No pointer to the newest one exists that could be
missing, stale or dangling.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import xxhash
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from recipe.config import ConfigError, TrainConfig
from recipe.data import DataConfig
from recipe.guard import check_finite, stepped
from recipe.parallel import on_rank_zero, unwrap
from storage import Folder, Folders, MissingError, StorageError, writing
from storage.manifest import Manifest
from storage.outside import LARGEST, OutsideError, file_digest, parse_json

log = logging.getLogger(__name__)

RUN = "run.json"
# Of runs that do not say.
OLDER = {
    "model.network": "dit",
    "model.output": "v",
    "model.embedding_scale": 1.0,
    "optimizer.name": "adamw",
    "adapter": None,
    "objective.joint": None,
}
START = "start.json"
LOG = "train.jsonl"
PROBE = ".preflight"
FOLDER = re.compile(r"ep(\d+)-ba(\d+)")
FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata|rank\d+\.(pt|json)")
RECEIPT = {"run_name", "attempt", "ranks", "files", "settings", "dataset"}
DATASET = {"samples": int, "xxh64": str}
KINDS = {  # of the values in these files; those of `files` are names of a checkpoint's own files
    "run_name": lambda x: isinstance(x, str),
    "identity": lambda x: isinstance(x, dict),
    "attempt": lambda x: x is None or isinstance(x, str),
    "ranks": lambda x: isinstance(x, int) and 1 <= x <= 2**20,
    "files": lambda x: isinstance(x, dict) and all(map(FILE.fullmatch, x)),
    "settings": lambda x: x is None or isinstance(x, dict),  # these two are rank 0's to write
    "dataset": lambda x: x is None or isinstance(x, dict) and {k: type(v) for k, v in x.items()} == DATASET,
    "origin": lambda x: isinstance(x, dict) and isinstance(x.get("method"), dict),
}
# Say how weights begin, not which shape the network has.
INIT_ONLY = ("preset", "label_std", "time_init", "patch_init", "gate_init")


class Checkpoint(NamedTuple):
    """A folder of this layout; files: the names in it that a listing shows."""

    name: str
    files: set[str]

    @property
    def step(self) -> int:
        """Optimizer steps before it."""
        return int(FOLDER.fullmatch(self.name)[2])


def checkpoints(folder: Folder, names: list[str]) -> list[Checkpoint]:
    """Return the checkpoints among these files of a folder, complete or not, newest first."""
    found: dict[str, Checkpoint] = {}
    for name in names:
        parent, _, file = name.rpartition("/")
        if FOLDER.fullmatch(parent) and FILE.fullmatch(file):
            found.setdefault(parent, Checkpoint(parent, set())).files.add(file)
    return sorted(found.values(), key=lambda c: c.step, reverse=True)


class DamageError(StorageError):
    """A file that this module wrote, whole as always, and that now holds something else."""


def read_json(folder: Folder, name: str, keys: set[str]) -> dict:
    """Read the object in a file of this layout. Raises StorageError, DamageError."""
    try:
        content = parse_json(folder.read(name, LARGEST), name)
    except OutsideError:
        content = None
    if not isinstance(content, dict) or not all(KINDS[key](content.get(key)) for key in keys):
        raise DamageError(f"{folder.uri}/{name} is damaged, it must be JSON with {', '.join(sorted(keys))}")
    return content


def receipts(folder: Folder, checkpoint: Checkpoint) -> list[dict] | None:
    """Read the receipts of all ranks, of one attempt at saving; None if incomplete. Raises StorageError."""
    found: list[dict] = []
    while not found or len(found) < found[0]["ranks"]:
        name = f"rank{len(found)}.json"
        if name not in checkpoint.files:
            return None
        found.append(read_json(folder, f"{checkpoint.name}/{name}", RECEIPT))
    return found if all(r["attempt"] == found[0]["attempt"] for r in found) else None


def find_damage(path: Path, expected: dict[str, str]) -> str | None:
    """Return what is wrong with the checkpoint in the local folder `path`, or None."""
    for name, digest in expected.items():
        if not (path / name).is_file():
            return f"{name} is gone"
        if file_digest(path / name, xxhash.xxh64()) != digest:
            return f"{name} has another checksum than when it was saved"
    return None


def identity(config: TrainConfig) -> dict:
    """Return what a checkpoint must agree on with the run that loads it."""
    model = {k: v for k, v in asdict(config.model).items() if k not in INIT_ONLY}
    objective, finish = config.objective, {}
    if objective.finishes:
        finish = {"objective.features": list(objective.features), "objective.joint": objective.joint}
    return {
        "objective.name": objective.name,
        "optimizer.name": config.optimizer.name,
        "parallel.fsdp2": config.parallel.fsdp2,
        "ema.posthoc": config.ema.posthoc,
        "adapter": config.adapter and asdict(config.adapter),
        **finish,
        **{f"model.{k}": v for k, v in model.items()},
    }


def check_identity(config: TrainConfig, folder: Folder, names: list[str], fork: bool = False) -> None:
    """Raise ConfigError if the folder is another run's, or of another architecture, or not ours at all."""
    key = "fork_from" if fork else "save_folder"
    if RUN not in names:
        raise ConfigError(
            f"{key}: {folder.uri} is not empty and holds no {RUN}, so nothing in it can be resumed: "
            f"choose another folder ({names[0]} is there)"
        )
    owner = read_json(folder, RUN, {"run_name", "identity"})
    if not fork and owner["run_name"] != config.run_name:
        raise ConfigError(
            f"save_folder: {folder.uri} belongs to run_name {owner['run_name']!r}, not {config.run_name!r}: "
            f"choose another folder (to start from that run's state, set fork_from to one of its checkpoints)"
        )
    other = "begin with its weights alone (init_from)" if fork else "choose another run_name and save_folder"
    for name, value in identity(config).items():
        saved = owner["identity"].get(name, OLDER.get(name, value))  # what is newer than the run says nothing
        if saved != value:
            raise ConfigError(
                f"{name}: {value} differs from the {saved} of the checkpoints in "
                f"{folder.uri}: set it to that, or {other}"
            )


class Owner:
    """This start's claim on the files of its run: of several starts of one run the latest alone may write.

    run.json holds the claim on checkpoints, start.json the one on what is written to `folder`, where a look
    costs nothing. All ranks make one; what an earlier start would write after that raises StorageError.
    """

    def __init__(self, config: TrainConfig, folders: Folders) -> None:
        self.start = dist.all_gather_object(uuid.uuid4().hex)[0]
        self.saves, self.files = folders[config.save_folder], folders[config.folder]
        whose = {"run_name": config.run_name, "identity": identity(config), "attempt": self.start}
        whose["origin"] = getattr(config.objective, "origin", None)  # of the weights that `frechet` finishes
        on_rank_zero(lambda: self.claim(whose))

    def claim(self, whose: dict) -> None:
        """Take the run over from earlier starts."""
        self.saves.write(RUN, json.dumps(whose, indent=2).encode())
        self.files.write(START, json.dumps({"attempt": self.start}).encode())

    def _refuse_if_taken(self, folder: Folder, name: str, key: str) -> None:
        """Raise StorageError where a later start has signed `name`; a file that is gone names nobody."""
        with suppress(MissingError):
            if read_json(folder, name, {"attempt"})["attempt"] != self.start:
                raise StorageError(f"{key}: {folder.uri} was taken over by a later start of this run")

    def check_saves(self) -> None:
        """Raise StorageError where checkpoints are another start's to write."""
        self._refuse_if_taken(self.saves, RUN, "save_folder")

    def check_files(self) -> None:
        """Raise StorageError where log, weights and samples are another start's to write."""
        self._refuse_if_taken(self.files, START, "folder")


class Saved(NamedTuple):
    """A checkpoint that all ranks signed: the checksum of each file, and what is wrong with its receipts.

    settings, dataset: what the run was trained with and on (see `dataset`); None in receipts that are older.
    """

    name: str
    files: dict[str, str]
    problem: str | None = None
    settings: dict | None = None
    dataset: dict | None = None


def complete(folder: Folder, found: list[Checkpoint]) -> list[Saved]:
    """Return those checkpoints that are complete, in the same order. Raises StorageError."""
    result = []
    for checkpoint in found:
        try:
            parts = receipts(folder, checkpoint)
        except DamageError as error:
            result.append(Saved(checkpoint.name, {}, str(error)))
            continue
        if parts is not None:
            files = {name: digest for part in parts for name, digest in part["files"].items()}
            told = {key: parts[0].get(key) for key in ("settings", "dataset")}
            result.append(Saved(checkpoint.name, files, **told))
    return result


def dataset_facts(manifest: Manifest) -> dict:
    """Return what tells a dataset from others, wherever it lies: its size and the checksum of its shards'."""
    shards = [shard["xxh64"] for _, shard in sorted(manifest.shards.items())]
    return {"samples": manifest.num_samples, "xxh64": xxhash.xxh64("".join(shards)).hexdigest()}


def check_dataset(data: DataConfig, manifest: Manifest, point: Resumable) -> None:
    """Raise ConfigError where checkpoints are of another dataset, in which a position means nothing."""
    here = dataset_facts(manifest)
    for saved in point.saved:
        if (there := saved.dataset) and there != here:
            key = "data.remote" if data.remote else "data.local"
            sizes = [f"({facts['samples']} samples, {facts['xxh64']})" for facts in (here, there)]
            raise ConfigError(
                f"{key}: {data.source} {sizes[0]} is not the dataset of {point.uri}/{saved.name} {sizes[1]}. "
                f"Fix: give that one, or begin a new run with the weights of this one "
                f"(init_from, with another run_name, folder and save_folder)"
            )


class Resumable(NamedTuple):
    """Complete checkpoints that a run can go on from, newest first, and the URI of their folder."""

    uri: str
    saved: list[Saved]


def own_checkpoints(config: TrainConfig, folders: Folders, names: list[str]) -> Resumable:
    """Return the run's own checkpoints among `names` in its save_folder. Raises ConfigError, StorageError."""
    folder = folders[config.save_folder]
    if names:
        check_identity(config, folder, names)
    found = checkpoints(folder, names)
    saved = complete(folder, found)
    for name in [c.name for c in found if c.name not in [one.name for one in saved]]:
        log.warning("%s/%s was never completed: not used", folder.uri, name)
    return Resumable(folder.uri, saved)


def fork(config: TrainConfig, folders: Folders) -> Resumable:
    """Return the checkpoint that `fork_from` names. Raises ConfigError, StorageError."""
    uri, _, name = config.fork_from.rpartition("/")
    parent = folders[uri]
    names = parent.names()
    found = complete(parent, [c for c in checkpoints(parent, names) if c.name == name])
    if not found:
        raise ConfigError(f"fork_from: {config.fork_from} is not a complete checkpoint")
    check_identity(config, parent, names, fork=True)
    return Resumable(parent.uri, found)


def fetch(folder: Folder, name: str, files: dict[str, str], scratch: Path) -> tuple[Path, str | None]:
    """Return the local folder of a checkpoint, and what is wrong with it or None; a remote one is downloaded.

    Raises StorageError: a service that does not answer is no reason to go back to an older checkpoint.
    """

    def download(file: str) -> None:
        with suppress(MissingError):  # `find_damage` says that it is gone
            folder.get(f"{name}/{file}", scratch / name / file)

    if folder.remote:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(download, files))
    local = scratch if folder.remote else Path(folder.uri)
    return local / name, find_damage(local / name, files)


def fetch_log(local: str, folder: Folder, names: list[str]) -> None:
    """Copy the log of numbers from a bucket, of whose files these are the names, unless it is here."""
    if folder.remote and LOG in names and not Path(local, LOG).exists():
        folder.get(LOG, Path(local, LOG))


class Resume(NamedTuple):
    """A checkpoint to go on with: Composer's load_path, where it came from, the settings that made it."""

    load_path: str
    source: str
    settings: dict | None


@contextmanager
def newest_checkpoint(folder: str, point: Resumable, folders: Folders) -> Iterator[Resume | None]:
    """Yield the newest usable checkpoint, None if the run is new.

    All ranks call it; each node has its own copy of a remote checkpoint, in the run's local `folder`, until
    the end of the block. Raises ConfigError if there are checkpoints and none of them is sound: a run never
    starts over by itself.
    """
    uri, scratch, problems = point.uri, None, []
    if dist.get_local_rank() == 0:
        for left in Path(folder).glob("resume-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a start that was killed
    dist.barrier()  # nodes may share the folder
    if dist.get_local_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix="resume-", dir=folder)
    try:
        for name, files, problem, settings, _ in point.saved:
            path = ""
            if problem is None and dist.get_local_rank() == 0:
                path, problem = fetch(folders[uri], name, files, Path(scratch))
            answers = dist.all_gather_object((str(path), problem))
            problem = next((p for _, p in answers if p), None)
            if problem is None:
                local = Path(answers[dist.get_global_rank() - dist.get_local_rank()][0]).absolute()
                whole = "rank0.pt" in files  # one that was saved without sharding
                yield Resume(str(local / "rank0.pt" if whole else local), f"{uri}/{name}", settings)
                dist.barrier()
                return
            problems.append(f"{name}: {problem}")
            log.warning("%s/%s is damaged: not used (%s)", uri, name, problem)
        if problems:
            raise ConfigError(
                f"save_folder: none of the checkpoints in {uri} can be read ({'; '.join(problems)}). "
                f"Restore one, or start over with another save_folder"
            )
        yield None
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder without files. One with other files stays, and buckets have no folders."""
    with suppress(OSError):
        folder.rmdir()


def ours(folder: Folder, checkpoint: Checkpoint, run_name: str) -> bool:
    """Return True if the checkpoint belongs to `run_name`, or has no receipt yet."""
    if "rank0.json" not in checkpoint.files:
        return True
    with suppress(DamageError):
        return read_json(folder, f"{checkpoint.name}/rank0.json", RECEIPT)["run_name"] == run_name
    return False


def prune(folder: Folder, keep: int, run_name: str, step: int) -> None:
    """Delete all but the `keep` newest complete checkpoints (-1: none), and leftovers older than those.

    Later ones than `step`, the one just saved, stay and do not count: the run resumed before them, so they
    are damaged. Only names of this layout are touched, and no checkpoint whose receipt is not this run's.
    """
    found = [c for c in checkpoints(folder, folder.names()) if c.step <= step]
    sound = {saved.name for saved in complete(folder, found) if saved.problem is None}
    steps = [c.step for c in found if c.name in sound]
    if keep < 0 or len(steps) < keep:
        return
    for old in found:
        if old.step >= steps[keep - 1] or not ours(folder, old, run_name):
            continue
        for file in sorted(old.files, key=lambda f: not f.endswith(".json")):  # receipts first
            folder.delete(f"{old.name}/{file}")
        remove_if_empty(Path(folder.uri, old.name))


class Checkpoints(CheckpointSaver):
    """Composer's saver, with receipts, uploads in the background, and pruning where the checkpoints are.

    One upload is under way at a time: a save waits for the one before it, and raises its error.
    """

    def __init__(self, config: TrainConfig, manifest: Manifest, owner: Owner) -> None:
        self.config = config
        self.owner, self.target = owner, owner.saves
        self.told = {"settings": asdict(config), "dataset": dataset_facts(manifest)}
        local = Path(config.folder, "staging") if self.target.remote else Path(config.save_folder)
        super().__init__(
            folder=local,
            filename="rank{rank}.pt" if config.parallel.fsdp2 else "ep{epoch}-ba{batch}/rank{rank}.pt",
            remote_file_name=None,
            latest_filename=None,
            save_interval=config.save_interval,
            overwrite=True,
        )
        if self.target.remote and dist.get_local_rank() == 0:
            shutil.rmtree(local, ignore_errors=True)  # what a killed process left
        self.mirrored: set[str] = set()  # names in weights/ that are known to be the same in the bucket
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.seconds = 0.0

    def state_dict(self) -> dict:
        """Return nothing: the folder itself says what has been saved."""
        return {}

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        check_finite(unwrap(state.model).net, int(state.timestamp.batch))
        started = time.monotonic()
        self.wait()
        on_rank_zero(self.owner.check_saves)
        with writing(self.folder):
            super()._save_checkpoint(state, logger)
        name = f"ep{int(state.timestamp.epoch)}-ba{int(state.timestamp.batch)}"
        sound = stepped(unwrap(state.model).net)  # else training may be about to end with DivergedError
        self.pending = self.thread.submit(self.publish, name, int(state.timestamp.batch) if sound else None)
        self.seconds += time.monotonic() - started
        logger.log_metrics({"time/checkpoint_seconds": self.seconds})

    def publish(self, name: str, step: int | None) -> None:
        """Upload what this rank saved and sign for its checksums; rank 0 mirrors, and prunes up to `step`."""
        rank, local = dist.get_global_rank(), Path(self.folder, name)
        mine = [*local.glob(f"__{rank}_*.distcp"), *local.glob(f"rank{rank}.pt")]
        mine += local.glob(".metadata") if rank == 0 else []
        receipt = {
            "run_name": self.config.run_name,
            "attempt": self.owner.start,
            "ranks": dist.get_world_size(),
            "files": {path.name: file_digest(path, xxhash.xxh64()) for path in mine},
        } | (self.told if rank == 0 else {})
        if self.target.remote:
            for path in mine:
                self.target.put(f"{name}/{path.name}", path)
                path.unlink()
            remove_if_empty(local)
        if rank == 0:
            self.owner.check_saves()
            self.mirror()  # first: with the last receipt the run is finished, and is not started again
        self.target.write(f"{name}/rank{rank}.json", json.dumps(receipt).encode())
        if rank == 0 and step is not None:
            prune(self.target, self.config.save_keep, self.config.run_name, step)

    def mirror(self) -> None:
        """Copy exported weights and the log of numbers beside remote checkpoints."""
        if not self.target.remote:
            return
        there = set(self.target.names())
        for description in sorted(Path(self.config.folder, "weights").glob("*.json")):
            name = f"weights/{description.name}"
            if name in self.mirrored:
                continue
            if name not in there or self.target.read(name) != description.read_bytes():
                for path in (description.with_suffix(".safetensors"), description):
                    self.target.put(f"weights/{path.name}", path)
            self.mirrored.add(name)
        if (rows := Path(self.config.folder, LOG)).is_file():
            self.target.put(LOG, rows)

    def wait(self) -> None:
        """Wait until everything saved so far is where it belongs. Raises StorageError."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def newest_before(self, step: int) -> str | None:
        """Return the newest complete checkpoint of at most `step` steps, after the uploads of all ranks."""
        self.settle()
        found = on_rank_zero(lambda: complete(self.target, checkpoints(self.target, self.target.names())))
        sound = [s.name for s in found if s.problem is None and Checkpoint(s.name, set()).step <= step]
        return f"{self.target.uri}/{sound[0]}" if sound else None

    def settle(self) -> None:
        """Wait for all ranks' uploads: the launcher ends the others when one is gone."""
        self.wait()
        dist.barrier()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Upload and prune for the last time."""
        self.settle()
        if dist.get_global_rank() == 0:
            self.mirror()
            prune(self.target, self.config.save_keep, self.config.run_name, int(state.timestamp.batch))
        dist.barrier()
