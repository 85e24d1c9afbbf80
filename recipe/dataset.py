"""Streaming's dataset with its silent traps closed: shards are checked before they count as present, a failed
download ends the run instead of the epoch, and a cache serves one job at a time.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from composer.utils import dist
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.hashing import get_hash

from recipe import patches
from storage import attempt
from storage.manifest import DatasetError, check_inside

log = logging.getLogger("recipe.dataset")
HASH = "xxh64"  # the one that streaming_convert writes


def claim_cache(local: str) -> IO[str] | None:
    """Reserve this node's cache folder for this job; all ranks call it, local rank 0 holds the lock.

    The lock goes with the process, however it ends, and is not inherited by its workers. Raises DatasetError
    on all ranks where a live job has the folder.
    """
    lock = problem = None
    if dist.get_local_rank() == 0:
        Path(local).mkdir(parents=True, exist_ok=True)
        lock = open(Path(local) / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"data.local: {local} is in use by another run; give each its own cache"
    if problems := list(filter(None, dist.all_gather_object(problem))):
        raise DatasetError(problems[0])
    return lock


class CheckedStream(Stream):
    """Gives a downloaded file its final name only after its checksum; what has that name can be trusted."""

    def get_shards(self, *arguments: Any) -> list:  # noqa: ANN401
        shards = super().get_shards(*arguments)
        files = (info for shard in shards for pair in shard.file_pairs for info in pair if info)
        self._hashes = {info.basename: info.hashes.get(HASH) for info in files}
        check_inside(self._hashes, f"{self.remote or self.local}/index.json")
        return shards

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        if not self.remote:
            return super()._download_file(from_basename, to_basename)
        expected = getattr(self, "_hashes", {}).get(from_basename)
        if expected is None:  # the index itself, which names the hashes
            return self._download(from_basename, to_basename)
        part = Path(self.local, f"{from_basename}.part")
        for _ in range(2):
            self._download(from_basename, part.name)
            if get_hash(HASH, part.read_bytes()) == expected:
                return str(part.rename(part.with_suffix("")))
            part.unlink()
        name = f"{self.remote}/{from_basename}"
        raise DatasetError(f"{name}: its content is not what was written (checksum), in two downloads")

    def _download(self, name: str, to: str | None) -> str:
        fetch = super()._download_file
        return attempt(f"read {self.remote}/{name} into {self.local}", lambda: fetch(name, to), DatasetError)


class SharedFlag:
    """An Event for all workers of a rank, whose is_set costs no lock: Streaming asks for every sample."""

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return self._value.value == 1


class TrainingDataset(StreamingDataset):
    """A StreamingDataset whose samples carry their global id, the key of all their random draws.

    A failed download raises DatasetError in every worker of the rank (Streaming ends the epoch in one worker,
    and lets those that wait for the same shard wait forever).
    """

    def __init__(self, remote: str | None, local: str, **options: Any) -> None:  # noqa: ANN401
        self._event = SharedFlag()  # set by the thread that fails; Streaming's own is for one worker
        self._present: set[int] = set()  # shards that this worker has seen to be there
        self._failure = "another worker of this rank could not read a shard, see its message"
        self._lock = claim_cache(local) if remote else None
        patches.choose_names_once()
        super().__init__(streams=[CheckedStream(remote=remote, local=local, download_retry=1)], **options)

    def __getitem__(self, at: Any) -> dict[str, Any]:  # noqa: ANN401
        return {**super().__getitem__(at), "sample": at}

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Between two epochs that is the start of the next one; Streaming would start the old one again."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Looking ahead, take Streaming's slow file lock only for a shard not seen to be there."""
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

    def _prepare_thread(self, it: Any) -> None:  # noqa: ANN401
        with self._leaving(it):
            super()._prepare_thread(it)

    def _ready_thread(self, it: Any) -> None:  # noqa: ANN401
        with self._leaving(it):
            super()._ready_thread(it)

    @contextmanager
    def _leaving(self, it: Any) -> Iterator[None]:  # noqa: ANN401
        """Streaming waits for its threads to say that they left; one that fails must say it too."""
        try:
            yield
        except Exception as error:
            log.error("%s", error)
            self._failure = str(error)
            self._event.set()
            it.on_exit()
            raise
