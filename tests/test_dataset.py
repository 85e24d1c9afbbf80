"""The training dataset under faults: hostile, damaged and missing files, killed jobs, a cache in use."""

import gc
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import MDSWriter
from streaming.base.shared.prefix import _pack_locals
from streaming.base.world import World

from eval import reference
from recipe import patches
from recipe.data import DataConfig, TrainingDataset, train_loader
from storage.manifest import DatasetError, list_shards, read_manifest
from streaming_convert import mds, reader
from streaming_convert.images import Opener
from tests.conftest import PATIENCE, ROOT, edit, run, store

NAMESPACES = shutil.which("unshare") and not subprocess.run(["unshare", "-rm", "true"]).returncode


@pytest.fixture
def remote(digits, tmp_path):
    """A copy of the digits that a test may damage."""
    return shutil.copytree(digits, tmp_path / "remote")


def first_batch(remote, cache, workers=0):
    config = DataConfig(local=str(cache), remote=str(remote), batch_size=16, workers=workers)
    return next(iter(train_loader(config, seed=0)))["sample"].tolist()


def test_a_damaged_shard_never_reaches_training(remote, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL + 1)  # pytest would keep the errors, and they the dataset and its cache
    expected = first_batch(remote, tmp_path / "other")
    shards = [remote / name for name in read_manifest(str(remote)).shards]
    good = [shard.read_bytes() for shard in shards]
    for shard, content in zip(shards, good, strict=True):
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):  # the second start must not trust what the first one fetched
        with pytest.raises(DatasetError, match=r"shard.*: its content is not what was written"):
            first_batch(remote, tmp_path / "cache")
        gc.collect()
    for shard, content in zip(shards, good, strict=True):
        shard.write_bytes(content)
    assert first_batch(remote, tmp_path / "cache") == expected


def test_a_shard_outside_the_dataset_is_not_fetched(remote, tmp_path):
    name, *_ = read_manifest(str(remote)).shards
    shutil.move(remote / name, tmp_path / "outside.mds")
    index = remote / "index.json"
    index.write_text(index.read_text().replace(name, "../outside.mds"))
    for local in (tmp_path / "cache", remote):
        with pytest.raises(
            DatasetError, match='names a file that is not a shard of its folder: "../outside.mds"'
        ):
            first_batch(remote, local)


class Payload:
    """Creates the file FOLDER/executed where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (f"{self.folder}/executed",)


@pytest.fixture
def hostile(tmp_path):
    """A dataset whose labels are pickles, with a manifest that has the right checksums and sums."""
    folder = store(tmp_path / "hostile", np.zeros((4, 1, 8, 8), np.uint8))
    columns = {"image": "ndarray:uint8:1,8,8", "label": "pkl"}
    with MDSWriter(out=str(tmp_path / "written"), columns=columns, hashes=["xxh64"]) as shards:
        for _ in range(4):
            shards.write({"image": np.zeros((1, 8, 8), np.uint8), "label": Payload(tmp_path)})
    shutil.copytree(tmp_path / "written", folder, dirs_exist_ok=True)
    listed = list_shards(json.loads((folder / "index.json").read_text())["shards"])
    edit(folder / "manifest.json", lambda manifest: manifest.update(shards=listed))
    return folder


def test_no_reader_of_a_dataset_executes_what_it_holds(hostile, tmp_path):
    said = r'shard\.00000\.mds: encodings: \{"image": .*, "label": "pkl"\}, manifest\.json says'
    readers = {
        "verify": lambda: reader.verify(str(hostile)),
        "show": lambda: reader.sample_grid(str(hostile)),
        "mds": lambda: mds.own(str(hostile), Opener()),
        "reference": lambda: reference.open_images(hostile),
        "local": lambda: TrainingDataset(None, str(hostile), batch_size=2),
        "cached": lambda: TrainingDataset(str(hostile), str(tmp_path / "cache"), batch_size=2),
    }
    for name, read in readers.items():
        if name == "verify":
            assert re.search(said, *read())
            continue
        with pytest.raises(DatasetError, match=said):
            read()
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path)))  # it would have
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_what_was_damaged_in_a_cache_is_fetched_again(tmp_path, caplog, compression):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 1, 4, 4), dtype=np.uint8)
    remote = store(tmp_path / "remote", pixels, compression=compression)
    cache = tmp_path / "cache"
    expected = first_batch(remote, cache)
    gc.collect()
    sound = {path: path.read_bytes() for path in cache.iterdir() if path.suffix in (".json", ".mds")}
    assert {path.name for path in sound} == {"index.json", "shard.00000.mds"}
    for path, content in sound.items():
        for damaged in (content[:-3], b"", content[:-1] + b"#"):
            path.write_bytes(damaged)
            assert first_batch(remote, cache) == expected
            gc.collect()
            assert path.read_bytes() == content
            assert f"{path}" in caplog.text and "fetched again" in caplog.text
            caplog.clear()


def test_what_was_damaged_in_a_local_dataset_is_named(remote):
    name = remote / "shard.00001.mds"
    content = name.read_bytes()
    flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
    cases = {"has another checksum than": flipped, f"has {len(content) - 3} bytes": content[:-3]}
    for message, damaged in cases.items():
        name.write_bytes(damaged)
        for place in (None, remote):  # remote may be the folder itself, which is no cache
            with pytest.raises(DatasetError, match=f"{name} {message}"):
                next(iter(TrainingDataset(place and str(place), str(remote), batch_size=16)))
        assert name.exists()
    name.write_bytes(flipped)
    assert TrainingDataset(None, str(remote), verify=False, batch_size=16).size == 1797  # as it was asked
    name.unlink()
    with pytest.raises(DatasetError, match=f"{name} cannot be read: No such file"):
        TrainingDataset(None, str(remote), verify=False, batch_size=16)
    (remote / "index.json").write_text("{")
    with pytest.raises(DatasetError, match="index.json is not JSON"):
        TrainingDataset(None, str(remote), batch_size=16)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("label", [10, 77, -3])
def test_a_label_that_is_no_class_is_named(tmp_path, label, workers):
    labels = np.arange(64) % 10
    labels[37] = label
    folder = store(tmp_path / "set", np.zeros((64, 1, 4, 4), np.uint8), labels, "0123456789")
    with pytest.raises(DatasetError, match="class_counts: adds up to 63 samples, num_samples is 64"):
        read_manifest(str(folder))
    edit(folder / "manifest.json", lambda m: m["class_counts"].__setitem__(0, m["class_counts"][0] + 1))
    loader = train_loader(DataConfig(local=str(folder), batch_size=64, workers=workers), seed=0)
    with pytest.raises(DatasetError, match=rf"set: sample 37: label {label} is not in 0\.\.9"):
        next(iter(loader))
    with pytest.raises(DatasetError, match=rf"sample 37: label {label} is not in 0\.\.9"):
        mds.own(str(folder), Opener())
    with pytest.raises(DatasetError, match=rf"sample 37: label {label} is not in 0\.\.9"):
        reference.open_images(folder).labels(torch.tensor([36, 37]), 10)


def steps_of_epoch(dataset, ranks, nodes, workers, epoch, seen=0):
    """The samples of each step of an epoch, sorted, as that many ranks would share them; after `seen`."""
    dataset.steps, dataset.batch_size = dataset.size // 16, 16 // ranks
    dataset._unique_worker_world = World(1, 1, 1, 0)
    steps = {}
    for worker in range(ranks * workers):
        dataset._parallel_worker_world = World(nodes, ranks // nodes, workers, worker)
        batches = dataset._get_work(epoch, seen).reshape(-1, 16 // ranks)
        for number, batch in enumerate(batches):
            steps.setdefault(number * workers + worker % workers, []).extend(batch.tolist())
    return [sorted(steps[number]) for number in sorted(steps)]


@pytest.mark.parametrize("canonical", [1, 2, 4])
def test_steps_and_epochs_have_the_same_samples_on_any_number_of_ranks(tmp_path, canonical):
    folder = store(tmp_path / "set", np.zeros((63, 1, 4, 4), np.uint8))
    order = {"shuffle": True, "shuffle_seed": 1, "num_canonical_nodes": canonical}
    dataset = TrainingDataset(None, str(folder), batch_size=16, **order)
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))
    assert len(dataset) == 48
    for epoch in range(2):
        expected = steps_of_epoch(dataset, 1, 1, 1, epoch)
        assert [len(step) for step in expected] == [16, 16, 16]
        for ranks, nodes, workers in ((1, 1, 2), (2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 2, 3), (16, 4, 1)):
            assert steps_of_epoch(dataset, ranks, nodes, workers, epoch) == expected
            assert steps_of_epoch(dataset, ranks, nodes, workers, epoch, 16) == expected[1:]
            assert steps_of_epoch(dataset, ranks, nodes, workers, epoch, 48) == []
    assert expected != steps_of_epoch(dataset, 1, 1, 1, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_named_and_does_not_end_the_epoch(remote, tmp_path, workers):
    for name in read_manifest(str(remote)).shards:
        (remote / name).unlink()
    with pytest.raises(DatasetError, match="cannot read .*shard.*|another worker"):
        first_batch(remote, tmp_path / "cache", workers)


@pytest.fixture
def temporary(monkeypatch):
    """A temporary folder of the test's own, for its child processes too; short, for the workers' sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_what_killed_jobs_left_is_removed_and_what_may_be_in_use_is_not(remote, temporary):
    """Numbers: 900000 ended without a trace of its names, 900001 was killed, 900002 is alive, 900003 is of
    another program, which locks nothing, 900004 is locked at this moment.
    """
    content = {900001: patches.CLAIMED, 900002: patches.CLAIMED, 900003: b""}
    names = [Path(f"/dev/shm/{number}_{name}") for number in content for name in ("barrier", "locals")]
    for name in names:
        number = int(name.name[:6])
        name.write_bytes(_pack_locals(["elsewhere"], number) + content[number])
    locks = [temporary / f"90000{n}_cache_filelock" for n in range(5)]
    for lock in locks:
        lock.touch()
    alive = [patches.seize(Path("/dev/shm/900002_locals")), patches.seize(locks[4])]
    try:
        first_batch(remote, temporary / "cache")
        left = {path.name for path in (*names, *locks) if path.exists()}
        numbers = {2: ("barrier", "locals", "cache_filelock"), 3: ("barrier", "locals", "cache_filelock")}
        expected = {f"90000{n}_{name}" for n, kinds in numbers.items() for name in kinds}
        assert left == {*expected, "900004_cache_filelock"}
    finally:
        for name in names:
            name.unlink(missing_ok=True)
    assert all(alive)


READ = """
import os, signal, sys
from recipe.data import DataConfig, train_loader

remote, cache, end = sys.argv[1:]
loader = train_loader(DataConfig(local=cache, remote=remote, batch_size=16, workers=1), seed=0)
batches = iter(loader)
next(batches)
print("number", loader.dataset._shm_prefix_int, flush=True)
if end == "kill":
    os.killpg(0, signal.SIGKILL)
"""
# A /dev/shm without the jobs of other tests, which take and remove numbers meanwhile
TWICE = """mount -t tmpfs none /dev/shm || exit
for end in kill exit; do
    setsid -w "$0" -c "$1" "$2" "$3/cache" $end; echo status $?
    ls /dev/shm "$3"
done"""


@pytest.mark.skipif(not NAMESPACES, reason="needs user namespaces")
def test_a_killed_job_leaves_its_number_to_the_next_and_that_one_leaves_nothing(remote, temporary):
    command = ["unshare", "-rm", "sh", "-c", TWICE, sys.executable, READ, remote, temporary]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    killed, ended = process.stdout.split("number 0\n")[1:]
    assert killed.startswith("status 137\n"), process.stderr
    assert {"000000_locals", "000000_barrier_filelock", "000000_cache_filelock"} <= set(killed.split())
    assert ended.startswith("status 0\n"), process.stderr
    assert [name for name in ended.split() if name.startswith("00")] == []


RANK = """
import sys, time
from pathlib import Path
from composer.utils import dist
from recipe import data

remote, cache, *names = sys.argv[1:]
claim = data.claim_cache

def slowly(local):
    if dist.get_local_rank() == 0:
        time.sleep(3)
        for name in names:
            Path(name).unlink()
    return claim(local)

data.claim_cache = slowly
dist.initialize_dist("cpu")
print(len(data.TrainingDataset(remote, cache, batch_size=16)))
"""


def test_ranks_agree_on_a_number_while_names_and_lock_files_of_other_jobs_vanish(remote, temporary):
    """With a cache that is there already, so that rank 1 need not wait for the index."""
    names = [Path(f"/dev/shm/{number:06}_locals") for number in range(40)]
    names = [name for name in names if not name.exists()]
    for name in names:
        name.write_bytes(_pack_locals(["elsewhere"], int(name.name[:6])))
    locks = [temporary / f"{number:06}_barrier_filelock" for number in range(800000, 800300)]
    for lock in locks:
        lock.touch()
    shutil.copytree(remote, temporary / "cache")
    script = temporary / "rank.py"
    script.write_text(RANK)
    try:
        process = run(script, remote, temporary / "cache", *names, ranks=2)
    finally:
        for name in names:
            name.unlink(missing_ok=True)
    assert process.stdout.split()[0] == "896"  # of 1797, in 56 steps of two ranks
    assert not list(temporary.glob("*_filelock"))


def test_a_cache_in_use_is_refused(remote, tmp_path):
    (tmp_path / "cache").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1); input()"
    command = [sys.executable, "-uc", hold, tmp_path / "cache" / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(DatasetError, match=r"data.local: .*cache is in use by another run"):
            first_batch(remote, tmp_path / "cache")
        other.stdin.close()


def test_a_cache_smaller_than_the_data_serves_every_sample(tmp_path):
    convert = ["-m", "streaming_convert", "digits", "--out", tmp_path, "--shard-samples", "100"]
    subprocess.run([sys.executable, *convert], cwd=ROOT, check=True)
    cache = tmp_path / "cache"
    order = {"shuffle": True, "num_canonical_nodes": 1, "shuffle_block_size": 300, "batch_size": 3}
    dataset = TrainingDataset(str(tmp_path / "train"), str(cache), cache_limit="80kb", **order)
    most = 0
    for _ in range(2):
        seen = []
        for sample in dataset:
            seen.append(sample["sample"])
            most = max(most, len(list(cache.glob("shard*"))))
        assert sorted(seen) == list(range(1797))
    assert most < len(read_manifest(str(tmp_path / "train")).shards) == 18


@pytest.mark.skipif(not NAMESPACES, reason="needs unshare to mount a small disk")
def test_a_full_cache_disk_names_the_object_and_the_reason(remote, tmp_path):
    (tmp_path / "cache").mkdir()
    mount = 'mount -t tmpfs -o size=48k none "$0" && exec "$@"'
    read = "import sys; from tests.test_dataset import first_batch; first_batch(*sys.argv[1:])"
    command = [sys.executable, "-c", read, remote, tmp_path / "cache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, tmp_path / "cache", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert re.search(r"DatasetError: cannot read .*remote/shard\.\d+\.mds into .*No space left", last), last
