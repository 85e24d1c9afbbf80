"""Training data: MDS shards => dict batches of {image | latents, label, sample}.

Streaming's silent traps are closed: shards are checked before they count as present, a failed download ends
the run instead of the epoch, and a cache serves one job at a time.

Columns are those that `streaming_convert` writes: `image` uint8 (C, H, W), or `latents` float16 (2C, H, W)
holding a VAE posterior's mean and standard deviation; `label` int64; and, of captioned pictures, `caption`
(str) and perhaps its embedding `text` float16 (L, width), of which the first `text_length` count.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
import streaming
import torch
import xxhash
from composer.utils import dist
from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.util import bytes_to_int
from torch import Tensor
from typing_extensions import TypedDict

from recipe import patches
from recipe.settings import ConfigError, Count, LocalPath, Number, Place, Says, Settings
from recipe.text import TextConfig, byte_tokens
from storage import Folders, StorageError, attempt, writing
from storage.manifest import (
    INDEX,
    DatasetError,
    File,
    Manifest,
    Shard,
    files_of,
    read_index,
    read_manifest,
    stored_file,
)
from storage.outside import LARGEST, file_digest, read_bytes

SHUFFLE_WINDOW = 1 << 18  # samples of each canonical node among which the order is drawn; Streaming's default


def size_of(text: str) -> str:
    """Return a size that is more than no bytes. Raises ValueError for any other."""
    if bytes_to_int(text) <= 0:
        raise ValueError
    return text


class Statistics(TypedDict):
    """Mean and standard deviation of each channel."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    mean: list[Number]
    std: list[Annotated[Number, Field(gt=0)]]


@dataclass
class DataConfig(Settings):
    """Where the samples are, and how they become the network's input."""

    local: LocalPath = Field(
        "data/digits/train", description="Folder of the dataset, or with remote of its cache."
    )
    remote: Place | None = Field(None, description="Folder or bucket of the dataset; null if it is in local.")
    batch_size: Count = Field(256, description="Samples in a step, over all ranks together.")
    workers: int = Field(1, ge=0, le=1024, description="Processes of each rank that read samples.")
    normalize: Annotated[
        Literal["pixels", "manifest"] | Statistics,
        Says("must be pixels, manifest or {mean: [...], std: [...]} with std positive"),
    ] = Field(
        "pixels",
        description="What makes samples the network's input: x / 127.5 - 1 (pixels), the dataset's own mean "
        "and standard deviation of each channel (manifest), or those given.",
    )
    shuffle: bool = Field(True, description="Whether each epoch has an order of its own.")
    canonical_nodes: int = Field(
        64,
        ge=1,
        le=65536,
        description="Number of parts that the order of samples is made of, whatever the number of nodes.",
    )
    cache_limit: Annotated[str, AfterValidator(size_of), Says("must be a size such as 100gb")] | None = Field(
        None, description="Largest size of the local copy of remote; null for no limit."
    )
    verify: bool = Field(
        True,
        description="Whether a starting run compares checksums of the files in local, not their sizes alone.",
    )

    @model_validator(mode="after")
    def combinations(self) -> DataConfig:
        """Raise ConfigError for a limit of a copy that is not made."""
        if self.cache_limit and not self.remote:
            raise ConfigError(
                f"cache_limit: {self.cache_limit} limits the copy of data.remote, which is not set"
            )
        return self

    @property
    def cache_bytes(self) -> int | None:
        """cache_limit in bytes."""
        return bytes_to_int(self.cache_limit) if self.cache_limit else None

    def per_rank(self, ranks: int) -> int:
        """Return how many samples of a global batch each rank has. Raises ValueError."""
        if self.batch_size % ranks:
            raise ValueError(f"data.batch_size: {self.batch_size} is not a multiple of the {ranks} ranks")
        return self.batch_size // ranks

    @property
    def source(self) -> str:
        """Where the manifest is."""
        return self.remote or self.local


log = logging.getLogger("recipe.data")


def in_place(remote: str | None, local: str) -> bool:
    """Return True if the dataset itself lies at `local`, not a copy that may be thrown away."""
    return remote is None or ("://" not in remote and Path(remote).resolve() == Path(local).resolve())


def local_index(remote: str | None, local: str, manifest: Manifest, folders: Folders) -> list[Shard]:
    """Return the shards of this node's index.json, which is fetched where it is missing, damaged or
    another's.

    Raises DatasetError where the dataset itself lies here, or its own index is wrong; StorageError.
    """
    file = Path(local, INDEX)
    try:
        return read_index(read_bytes(file), manifest, str(file))
    except (OSError, ValueError) as error:
        if in_place(remote, local):
            raise DatasetError(str(error)) from error
        if file.exists():
            log.warning("%s: fetched again", error)
    text = folders[remote].read(INDEX, LARGEST)
    entries = read_index(text, manifest, f"{remote}/{INDEX}")
    folders[local].write(INDEX, text)
    return entries


def file_damage(path: Path, expected: File, checksums: bool) -> str | None:
    """Return what is wrong with the file of a shard, or None."""
    try:
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"has {size} bytes, its index says {expected['bytes']}"
        if checksums and file_digest(path, xxhash.xxh64()) != expected["hashes"]["xxh64"]:
            return "has another checksum than its index says"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def check_local(
    remote: str | None, local: str, manifest: Manifest, checksums: bool, folders: Folders
) -> None:
    """Compare this node's files with the index, and that with the manifest.

    A damaged file of a cache is deleted, so that it is fetched again. Raises DatasetError for one of a
    dataset that lies here itself, StorageError where the index cannot be fetched.
    """
    entries, ours = local_index(remote, local, manifest, folders), in_place(remote, local)
    files = [file for entry in entries for file in files_of(entry)]
    needed = {stored_file(entry)["basename"] for entry in entries} if ours else set()
    there = [file for file in files if file["basename"] in needed or Path(local, file["basename"]).exists()]
    with ThreadPoolExecutor() as pool:  # xxhash and reading let go of the interpreter
        found = pool.map(lambda file: file_damage(Path(local, file["basename"]), file, checksums), there)
        for file, problem in zip(there, found, strict=True):
            path = Path(local, file["basename"])
            if problem and ours:
                raise DatasetError(f"{path} {problem}: put a sound copy there, or convert again")
            if problem:
                log.warning("%s %s: fetched again", path, problem)
                with writing(path):
                    path.unlink()


def prepare_local(
    remote: str | None, local: str, manifest: Manifest, checksums: bool, folders: Folders
) -> IO[str] | None:
    """Claim this node's cache and check its files, on local rank 0; all ranks call it. Returns the lock.

    Raises DatasetError on all ranks where one node cannot go on.
    """
    lock = problem = None
    if dist.get_local_rank() == 0:
        try:
            lock = claim_cache(local) if remote else None
            check_local(remote, local, manifest, checksums, folders)
        except (DatasetError, StorageError) as error:
            problem = str(error)
    if problems := list(filter(None, dist.all_gather_object(problem))):
        raise DatasetError(problems[0])
    return lock


def claim_cache(local: str) -> IO[str]:
    """Reserve this node's cache folder for this job, and return the lock.

    It goes with the process, however that ends, and is not inherited by its workers. Raises DatasetError
    where a live job has the folder.
    """
    Path(local).mkdir(parents=True, exist_ok=True)
    lock = open(Path(local) / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DatasetError(
            f"data.local: {local} is in use by another run; give each its own cache"
        ) from error
    return lock


class CheckedStream(streaming.Stream):
    """Gives a downloaded file its final name only after its checksum; what has that name can be trusted."""

    def get_shards(self, *arguments: Any) -> list:
        shards = super().get_shards(*arguments)  # of the index that `check_local` has left here
        files = (info for shard in shards for pair in shard.file_pairs for info in pair if info)
        self._hashes = {info.basename: info.hashes["xxh64"] for info in files}
        return shards

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        if not self.remote:
            return super()._download_file(from_basename, to_basename)
        part = Path(self.local, f"{from_basename}.part")
        for _ in range(2):
            self._download(from_basename, part.name)
            if xxhash.xxh64(part.read_bytes()).hexdigest() == self._hashes[from_basename]:
                return str(part.rename(part.with_suffix("")))
            part.unlink()
        name = f"{self.remote}/{from_basename}"
        raise DatasetError(f"{name}: its content is not what was written (checksum), in two downloads")

    def _download(self, name: str, to: str) -> str:
        fetch = super()._download_file
        return attempt(f"read {self.remote}/{name} into {self.local}", lambda: fetch(name, to), DatasetError)


class SharedFlag:
    """An Event for all workers of a rank, whose is_set costs no lock: Streaming asks for every sample."""

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue("b", 0)

    def set(self) -> None:
        """Set it, for good."""
        self._value.value = 1

    def is_set(self) -> bool:
        """Return True once it is set."""
        return self._value.value == 1


class TrainingDataset(StreamingDataset):
    """A StreamingDataset whose samples carry their global id, the key of all their random draws.

    A failed download raises DatasetError in every worker of the rank (Streaming ends the epoch in one worker,
    and lets those that wait for the same shard wait forever). So does a sample that is not what the manifest
    describes, in the worker that reads it.
    An epoch has as many steps as whole global batches fit into the dataset, on any number of ranks.
    """

    def __init__(
        self,
        remote: str | None,
        local: str,
        manifest: Manifest | None = None,
        verify: bool = True,
        folders: Folders | None = None,
        **options: Any,
    ) -> None:
        """Open a dataset; manifest: read where it is not given; verify: see `DataConfig`; folders: those that
        are open; options: of Streaming.
        """
        self._event = SharedFlag()  # set by the thread that fails; Streaming's own is for one worker
        self._present: set[int] = set()  # shards that this worker has seen to be there
        self._failure = "another worker of this rank could not read a shard, see its message"
        self.source, self.manifest = remote or local, manifest or read_manifest(remote or local)
        self._lock = prepare_local(
            remote, local, self.manifest, verify, Folders() if folders is None else folders
        )
        patches.choose_names_once()
        super().__init__(streams=[CheckedStream(remote=remote, local=local, download_retry=1)], **options)
        self.steps = self.num_samples // (self.batch_size * self._parallel_rank_world.num_ranks)
        self.length = self.steps * self.batch_size

    def __getitem__(self, at: Any) -> dict[str, Any]:
        where = f"{self.source}: sample {at}"
        try:
            sample = super().__getitem__(at)
        except DatasetError:
            raise
        except (ValueError, IndexError) as error:  # its shard's checksum is right, so it was made like that
            raise DatasetError(f"{where}: is not what its index says: {error}") from error
        self.manifest.check_label(sample["label"], where)
        if self.manifest.text and not 1 <= sample["text_length"] <= self.manifest.text["tokens"]:
            raise DatasetError(f"{where}: text_length {sample['text_length']} is not that of its text")
        return {**sample, "sample": at}

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        """This worker's samples, int64; without those that Streaming adds to give all ranks as many, or of
        which the loader would drop more or fewer batches on another number of ranks.
        """
        samples, world = super()._get_work(epoch, sample_in_epoch), self._parallel_worker_world
        left = self.steps - sample_in_epoch // (self.batch_size * world.num_ranks)
        mine = len(range(world.worker_of_rank, left, world.workers_per_rank))
        return samples[: mine * self.batch_size]

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the position; between two epochs it is in the next, where Streaming repeats the old one."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard; looking ahead, take Streaming's slow file lock only for one not seen to be there."""
        if shard_id in self._present and not blocking and not self.cache_limit:
            return
        super().prepare_shard(shard_id, blocking)
        if self._shard_states[shard_id] == _ShardState.LOCAL:
            self._present.add(shard_id)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from super().__iter__()
        except RuntimeError:
            if not self._event.is_set():
                raise
        if self._event.is_set():
            raise DatasetError(self._failure)

    def _prepare_thread(self, it: Any) -> None:
        with self._leaving(it):
            super()._prepare_thread(it)

    def _ready_thread(self, it: Any) -> None:
        with self._leaving(it):
            super()._ready_thread(it)

    @contextmanager
    def _leaving(self, it: Any) -> Iterator[None]:
        """Let a thread that fails say that it left, since Streaming waits for that."""
        try:
            yield
        except Exception as error:
            log.error("%s", error)
            self._failure = str(error)
            self._event.set()
            it.on_exit()
            raise


def collate(samples: list[dict[str, Any]], text: TextConfig | None = None) -> dict[str, Tensor]:
    """Turn dicts of arrays and integers into a dict of tensors, captions into what `text` asks for.

    np.stack copies Streaming's read-only arrays.
    """
    left_out = {"caption"} if text and text.encoder == "dataset" else {"caption", "text", "text_length"}
    names = samples[0].keys() - left_out
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in names}
    if text and text.encoder == "bytes":
        prompts, _ = byte_tokens([s["caption"] for s in samples], text.tokens)
        batch |= {"text": prompts.tokens, "text_length": prompts.length}
    return batch


def train_loader(
    config: DataConfig,
    seed: int,
    text: TextConfig | None = None,
    manifest: Manifest | None = None,
    folders: Folders | None = None,
) -> StreamingDataLoader:
    """Return the loader of this rank's share of each batch, in an order that depends on seed and epoch alone.

    manifest, folders: see `TrainingDataset`.
    """
    per_rank = config.per_rank(dist.get_world_size())
    dataset = TrainingDataset(
        remote=config.remote,
        local=config.local,
        manifest=manifest,
        verify=config.verify,
        folders=folders,
        batch_size=per_rank,
        shuffle=config.shuffle,
        shuffle_seed=seed,
        num_canonical_nodes=config.canonical_nodes,
        shuffle_block_size=SHUFFLE_WINDOW,
        predownload=max(8192, 8 * per_rank),  # the default, 8 batches, makes one worker wait on 7 ms ticks
        cache_limit=config.cache_limit,
    )
    return StreamingDataLoader(
        dataset,
        batch_size=per_rank,
        collate_fn=partial(collate, text=text),
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )
