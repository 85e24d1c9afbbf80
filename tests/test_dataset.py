"""The training dataset under faults: damaged and missing shards, names of killed jobs, a cache in use."""

import gc
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from streaming.base.shared.prefix import _pack_locals

from recipe.data import DataConfig, train_loader
from recipe.dataset import TrainingDataset
from storage.manifest import DatasetError, read_manifest
from tests.conftest import ROOT

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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_named_and_does_not_end_the_epoch(remote, tmp_path, workers):
    for name in read_manifest(str(remote)).shards:
        (remote / name).unlink()
    with pytest.raises(DatasetError, match="cannot read .*shard.*|another worker"):
        first_batch(remote, tmp_path / "cache", workers)


def test_names_that_a_killed_job_left_are_forgotten(remote, tmp_path):
    cache = tmp_path / "cache"
    left = Path("/dev/shm/900000_locals")
    left.write_bytes(_pack_locals([str(cache)], 900000))
    first_batch(remote, cache)
    assert not left.exists()


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
    order = {"shuffle": True, "num_canonical_nodes": 1, "shuffle_block_size": 300, "batch_size": 16}
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
        timeout=100,
    )
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert re.search(r"DatasetError: cannot read .*remote/shard\.\d+\.mds into .*No space left", last), last
