"""The conversion of a source into a dataset folder, in parts that are independent of each other.

One part is one shard: a fixed range of the input, converted by one worker and moved into place whole, first
the shard, then its record under `.parts/`. A run that is killed loses only the parts in progress; the next
run converts all parts without a record. The index and, last, the manifest are made only from the records, so
they have the same bytes however often, and with however many workers and machines, the conversion ran.
"""

import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm
from typing_extensions import NotRequired, TypedDict

from storage import Folder
from storage.manifest import (
    INDEX,
    MANIFEST,
    STORED_DTYPE,
    WORK,
    Count,
    DatasetError,
    Manifest,
    Shard,
    Size,
    Strict,
    difference,
    fingerprint,
    list_shards,
    stored_file,
)
from storage.outside import OutsideError, conform
from streaming_convert.encoders import Encoder
from streaming_convert.images import Rejected
from streaming_convert.sources import Source

if TYPE_CHECKING:
    from streaming import MDSWriter

    from recipe.pretrained import TextEncoder

REJECTED, NOTES = "rejected.jsonl", "notes.jsonl"  # in the folder of a split
PLAN = f"{WORK}/plan.json"


@dataclass(frozen=True)
class Job:
    """A split to convert: `items` are the positions of its samples in the source, `text` encodes captions."""

    uri: str
    source: Source
    encoder: Encoder
    items: np.ndarray
    plan: Manifest
    text: "TextEncoder | None" = None


def is_complete(job: Job) -> bool:
    """Return True if the target already holds this dataset.

    Raises DatasetError if it holds another one, finished or not, or files that are not from a conversion.
    """
    folder = Folder(job.uri)
    names = folder.names()
    found = MANIFEST if MANIFEST in names else PLAN if PLAN in names else None
    if found:
        there = Manifest.from_json(folder.read(found), f"{job.uri}/{found}", plan=found == PLAN)
        change = difference(job.plan, there)
        if change:
            raise DatasetError(f"{job.uri} holds a different dataset: {change}. Nothing was changed")
    elif any(not name.startswith(f"{WORK}/") for name in names):
        raise DatasetError(f"{job.uri} is not empty and is no dataset of this program. Nothing was changed")
    if found == MANIFEST:
        _clean_up(folder)
    return found == MANIFEST


@contextmanager
def alone(out: str, shard: tuple[int, int]) -> Iterator[None]:
    """Lock the local folder `out` against other conversions with the same machine number.

    The lock ends with this process, however that ends, and its workers do not inherit it. A bucket has no
    lock: two conversions write the same bytes twice. Raises DatasetError with the process that writes there.
    """
    if "://" in out:
        yield
        return
    path = Path(out, f".writing-{shard[0]}-of-{shard[1]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(f"{out} is being written by {path.read_text()}. Nothing was changed") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # the folder is not empty: the conversion has written files
                path.parent.rmdir()


def convert(job: Job, workers: int, shard: tuple[int, int] = (1, 1)) -> None:
    """Convert the missing parts of machine `shard[0]` of `shard[1]`; `finish` completes the dataset.

    Raises DatasetError if a part cannot be written; finished parts stay and are not converted again.
    """
    folder = Folder(job.uri)
    names = set(folder.names())
    if PLAN not in names:
        folder.write(PLAN, job.plan.to_json())
    mine = [Part(job, number) for number in range(shard[0] - 1, _num_parts(job.plan), shard[1])]
    todo = [part for part in mine if _record_name(part.number) not in names]
    total, left = (sum(len(part.items) for part in parts) for parts in (mine, todo))
    with tqdm(total=total, initial=total - left, unit="img", desc=job.uri, dynamic_ncols=True) as bar:
        if job.encoder.in_process or job.text:
            with ThreadPoolExecutor(workers) as loaders:
                for part in todo:
                    part.convert(folder, loaders, bar.update)
        elif workers == 1 or len(todo) < 2:
            for part in todo:
                part.convert(folder, None, bar.update)
        else:
            _convert_in_processes(job, todo, min(workers, len(todo)), bar)


def _convert_in_processes(job: Job, parts: list["Part"], workers: int, bar: tqdm) -> None:
    # Forked, not spawned, so that a list of a million files is shared and torch is imported only once.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start_worker, (job, os.getpid())) as pool:
        futures = [pool.submit(_work, part.number) for part in parts]
        try:
            for future in as_completed(futures):
                bar.update(future.result())
        except BrokenProcessPool as error:
            raise DatasetError("a worker died (out of memory?); run the same command to continue") from error
        finally:
            pool.shutdown(cancel_futures=True)


_worker: tuple[Job, Folder]  # in a worker process


def _start_worker(job: Job, parent: int) -> None:
    global _worker
    _worker = job, Folder(job.uri)  # clients do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """End this worker when its parent is killed; otherwise it would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _work(number: int) -> int:
    job, folder = _worker
    part = Part(job, number)
    part.convert(folder, None, lambda samples: None)
    return len(part.items)


class Part:
    """A part of a conversion, with the lines that it adds to rejected.jsonl and notes.jsonl.

    items: the positions of its samples in the source.
    """

    def __init__(self, job: Job, number: int) -> None:
        size = _part_items(job.plan)
        self.job, self.number = job, number
        self.items = job.items[number * size : (number + 1) * size]
        self.rejected: list[dict] = []
        self.notes: list[dict] = []

    def convert(self, folder: Folder, loaders: Executor | None, progress: Callable[[int], object]) -> None:
        """Write the shard, then its record: index entry, counts, moments, rejected samples.

        loaders: threads that load samples; None for none; progress: called for every sample.
        """
        from streaming import MDSWriter  # here, as importing it takes seconds

        job, totals = self.job, Totals(self.job.plan)
        cut = job.text.cut if job.text else 0
        try:
            with TemporaryDirectory(
                prefix="tmp-", dir=None if folder.remote else Path(job.uri, WORK)
            ) as scratch:
                about = {"compression": job.plan.compression, "hashes": ["xxh64"], "size_limit": None}
                writer = MDSWriter(columns=job.plan.columns, out=scratch, **about)
                for positions, samples in self._batches(loaders, progress):
                    columns = self._columns(positions, samples)
                    for row in zip(*columns.values(), strict=True):
                        sample = dict(zip(columns, row, strict=True))
                        totals.add(sample)
                        writer.write(sample)
                writer.finish()
                record = {
                    "plan": fingerprint(job.plan),
                    "shard": _publish_shard(folder, self.number, writer),
                    "counts": totals.counts,
                    "moments": totals.sums,
                    "rejected": self.rejected,
                    "notes": sorted(self.notes, key=lambda line: line["key"]),  # loaders finish in any order
                }
                if job.source.captions:
                    record |= {"caption_bytes": totals.lengths, "cut": job.text.cut - cut if job.text else 0}
                folder.write(_record_name(self.number), json.dumps(record).encode())
        except OSError as error:
            raise DatasetError(
                f"cannot write part {self.number} of {job.uri}: {error.strerror or error}. "
                "Finished parts are kept; run the same command to continue"
            ) from error

    def _columns(self, positions: np.ndarray, samples: np.ndarray) -> dict:
        """Return what is stored of the samples at these positions, by column, without the bad ones."""
        source, stored = self.job.source, self.job.encoder(samples)
        if stored.dtype != np.uint8:
            finite = np.isfinite(stored).all(axis=(1, 2, 3))
            for position in positions[~finite]:
                self._reject(position, "the encoder gives values that are not finite")
            positions, stored = positions[finite], stored[finite]
        columns = {self.job.plan.column: stored, "label": source.labels[positions]}
        if source.captions:
            columns["caption"] = [source.captions[position] for position in positions]
        if self.job.text:
            try:
                columns["text"], columns["text_length"] = self.job.text.encode(columns["caption"])
            except ValueError as error:
                raise DatasetError(f"--text-encoder: {error}. Finished parts are kept") from error
        return columns

    def _reject(self, position: int, reason: str) -> None:
        self.rejected.append({"key": self.job.source.keys[position], "reason": reason})

    def _batches(
        self, loaders: Executor | None, progress: Callable[[int], object]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (positions in the source, samples) in batches of those that can be loaded."""
        positions, samples = [], []
        for position, sample in zip(self.items, self._loaded(loaders), strict=True):
            progress(1)
            if isinstance(sample, Rejected):
                self._reject(position, str(sample))
                continue
            views = [sample, sample[..., ::-1]][: self.job.plan.copies]
            positions += [position] * len(views)
            samples += views
            if len(samples) >= self.job.encoder.batch_size:
                yield np.array(positions), np.stack(samples)
                positions, samples = [], []
        if samples:
            yield np.array(positions), np.stack(samples)

    def _loaded(self, loaders: Executor | None) -> Iterator[np.ndarray | Rejected]:
        """Yield the samples in order; `loaders`, if there are any, load two batches in advance."""
        if loaders is None:
            yield from map(self._load, self.items)
            return
        queue = deque()
        for position in self.items:
            queue.append(loaders.submit(self._load, position))
            if len(queue) > 2 * self.job.encoder.batch_size:
                yield queue.popleft().result()
        yield from (future.result() for future in queue)

    def _load(self, position: int) -> np.ndarray | Rejected:
        source = self.job.source
        if source.captions and isinstance(reason := source.captions[position], Rejected):
            return reason
        key = source.keys[position]
        try:
            sample = source.load(key, lambda note: self.notes.append({"key": key, "note": note}))
        except Rejected as error:
            return error
        dtype = STORED_DTYPE[source.column]
        if sample.shape != source.shape or sample.dtype != dtype:
            return Rejected(f"{sample.dtype} {sample.shape}, expected {dtype} {source.shape}")
        return sample


def _publish_shard(folder: Folder, number: int, writer: "MDSWriter") -> dict | None:
    """Give the written shard its number, move it into place and return its entry in the index."""
    if not writer.shards:  # every sample of the part was rejected
        return None
    (entry,) = writer.shards
    file = stored_file(entry)
    written = Path(writer.local, file["basename"])
    for info in filter(None, (entry["raw_data"], entry["zip_data"])):
        info["basename"] = info["basename"].replace(".00000.", f".{number:05}.")
    folder.put(file["basename"], written)
    return entry


def finish(uris: list[str], max_rejected: int = 0) -> list[Manifest]:
    """Write index and manifest of the splits `uris` from the records of their parts; return the manifests.

    A finished split stays as it is. Raises DatasetError if parts are missing, or if more than `max_rejected`
    samples were rejected in all splits: rejected.jsonl then lists them, and no split gets a manifest.
    """
    collected = {uri: _collect(uri) for uri in uris}
    if sum(manifest.rejected for manifest, _ in collected.values()) > max_rejected:
        raise DatasetError(_rejection_message(collected, max_rejected))
    manifests = [_complete(*found) for found in collected.values()]
    for (uri, (_, records)), manifest in zip(collected.items(), manifests, strict=True):
        if records:
            folder = Folder(uri)
            shards = [record["shard"] for record in records if record["shard"]]
            folder.write(INDEX, json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
            folder.write(MANIFEST, manifest.to_json())
            _clean_up(folder)
    return manifests


def _collect(uri: str) -> tuple[Manifest, list[dict]]:
    """Return the plan with the number of rejected samples, and the records of all parts.

    For a finished split these are its manifest and no records.
    """
    folder = Folder(uri)
    names = set(folder.names())
    if MANIFEST in names:
        return Manifest.from_json(folder.read(MANIFEST), f"{uri}/{MANIFEST}"), []
    if PLAN not in names:
        raise DatasetError(f"{uri} holds no conversion, finished or not")
    plan = Manifest.from_json(folder.read(PLAN), f"{uri}/{PLAN}", plan=True)
    records = _read_records(folder, plan, names)
    rejected, notes = ([line for r in records for line in r.get(key, ())] for key in ("rejected", "notes"))
    # A picture with several captions was loaded, and noted, several times.
    notes = list({(line["key"], line["note"]): line for line in notes}.values())
    for name, lines in ((REJECTED, rejected), (NOTES, notes)):
        if lines:
            folder.write(name, "".join(json.dumps(line) + "\n" for line in lines).encode())
    for note, count in Counter(line["note"] for line in notes).items():
        print(f"{uri}: {count} pictures: {note} (list: {uri}/{NOTES})")
    return replace(plan, rejected=len(rejected)), records


def _clean_up(folder: Folder) -> None:
    """Delete the records of a finished local dataset; in a bucket they stay, as each takes a request."""
    if not folder.remote:
        shutil.rmtree(Path(folder.uri, WORK), ignore_errors=True)


def _read_records(folder: Folder, plan: Manifest, names: set[str]) -> list[dict]:
    wanted = [_record_name(number) for number in range(_num_parts(plan))]
    missing = [name for name in wanted if name not in names]
    if missing:
        lacking = f"{len(missing)} of {len(wanted)} parts are missing, the first is {missing[0]}"
        raise DatasetError(f"{folder.uri}: {lacking}")
    with ThreadPoolExecutor(16) as pool:  # in sequence, thousands of files of a bucket would take minutes
        texts = list(pool.map(folder.read, wanted))
    try:
        records = [
            conform(Record, text, f"{folder.uri}/{name}") for name, text in zip(wanted, texts, strict=True)
        ]
    except OutsideError as error:
        again = "Delete it, and run the same command to convert that part again"
        raise DatasetError(f"{error}. {again}") from error
    for name, record in zip(wanted, records, strict=True):
        if record["plan"] != fingerprint(plan):
            raise DatasetError(f"{folder.uri}/{name} is a part of another dataset than {PLAN}")
    return records


class Sums(TypedDict):
    """The sums of `Totals`: one for each channel, or 0.0 if there are no samples."""

    __pydantic_config__ = Strict
    n: int
    x: float | list[float]
    xx: float | list[float]
    var: float | list[float]


Label = Annotated[str, Field(pattern="^-?[0-9]{1,19}$")]


class Record(TypedDict):
    """The record of a finished part and the fingerprint of its plan.

    It has `caption_bytes` and `cut` only with captions, `notes` only for unusual pictures.
    """

    __pydantic_config__ = Strict
    plan: str
    shard: Shard | None
    counts: dict[Label, Count]
    moments: Sums
    rejected: list[dict[Literal["key", "reason"], str]]
    notes: NotRequired[list[dict[Literal["key", "note"], str]]]
    caption_bytes: NotRequired[dict[Size, Count]]
    cut: NotRequired[Count]


def _complete(plan: Manifest, records: list[dict]) -> Manifest:
    """Return the plan with the results of all parts filled in; without records it is already finished."""
    if not records:
        return plan
    totals = Totals(plan)
    for record in records:
        totals.merge(record)
    if not totals.counts:
        raise DatasetError(f"no sample could be converted, {plan.rejected} were rejected")
    shards = list_shards([record["shard"] for record in records if record["shard"]])
    text = plan.text and {**plan.text, "cut": sum(record["cut"] for record in records)}
    return replace(plan, **totals.results(), shards=shards, text=text)


def _rejection_message(collected: dict[str, tuple[Manifest, list[dict]]], allowed: int) -> str:
    total = sum(manifest.rejected for manifest, _ in collected.values())
    lists = [f"{uri}/{REJECTED}" for uri, (manifest, _) in collected.items() if manifest.rejected]
    records = [record for _, records in collected.values() for record in records]
    rejected = [line for record in records for line in record["rejected"]]
    shown = "".join(f"\n  {line['key']}: {line['reason']}" for line in rejected[:20])
    more = f"\n  and {len(rejected) - 20} more" if len(rejected) > 20 else ""
    where = f"--max-rejected allows {allowed} (list: {', '.join(lists)})"
    return f"{total} samples were rejected, {where}{shown}{more}"


def _part_items(plan: Manifest) -> int:
    """Return the number of input samples per part."""
    return max(1, plan.shard_samples // plan.copies)


def _num_parts(plan: Manifest) -> int:
    return math.ceil(plan.input["samples"] / _part_items(plan))


def _record_name(number: int) -> str:
    return f"{WORK}/{number:05}.json"


class Totals:
    """What a manifest says of all its samples, from counts and from sums in float64, which can be added.

    Sums over pixels are exact integers up to 2^53, which is more than ImageNet at 256 needs.
    """

    def __init__(self, plan: Manifest) -> None:
        self.plan = plan
        self.counts, self.lengths = Counter(), Counter()
        self.sums: dict = {"n": 0, "x": 0.0, "xx": 0.0, "var": 0.0}

    def add(self, sample: dict) -> None:
        """Add a sample as it is stored, {column: value}."""
        self.counts[int(sample["label"])] += 1
        if self.plan.caption_bytes is not None:
            self.lengths[len(sample["caption"].encode())] += 1
        values = sample[self.plan.column].astype(np.float64)
        means, stds = np.split(values, 2) if self.plan.column == "latents" else (values, values[:, :0])
        # row by row, since for long vectors BLAS would wake its threads, which takes 0.4 ms
        squares, variances = (np.vecdot(x, x).sum(1).tolist() for x in (means, stds))
        self._sum({"n": means[0].size, "x": means.sum((1, 2)).tolist(), "xx": squares, "var": variances})

    def merge(self, record: dict) -> None:
        """Add the samples of a part."""
        self.counts.update({int(label): count for label, count in record["counts"].items()})
        self.lengths.update({int(size): count for size, count in record.get("caption_bytes", {}).items()})
        self._sum(record["moments"])

    def _sum(self, sums: dict) -> None:
        self.sums = {key: (np.array(value) + sums[key]).tolist() for key, value in self.sums.items()}

    def results(self) -> dict:
        """Return keys and values of the manifest.

        Mean and deviation of a channel are of pixels, or of mean + std * noise for latents, whose deviation
        is sqrt(var(mean) + E[std^2]).
        """
        n, x, xx, var = (np.array(self.sums[key], np.float64) for key in ("n", "x", "xx", "var"))
        mean = x / n
        return {
            "num_samples": self.counts.total(),
            "class_counts": [self.counts[label] for label in range(len(self.plan.class_names))],
            "channel_mean": mean.tolist(),
            "channel_std": np.sqrt(np.maximum(xx / n - mean**2, 0) + var / n).tolist(),
            "caption_bytes": {str(size): self.lengths[size] for size in sorted(self.lengths)} or None,
        }
