"""Conversions that end early: kill -9, a full disk, a lost upload. The next run ends as if nothing was."""

import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from storage import S3, Folder, StorageError
from storage.manifest import DatasetError, read_manifest
from streaming_convert.__main__ import main
from tests.test_convert import files

SHARDS = 40


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 noisy JPEGs in two classes: enough work that a kill finds it half done."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(800):
        path = folder / "ab"[i % 2] / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((240, 200), Image.Resampling.NEAREST).save(path, quality=95)
    return folder


def command(pictures: Path, out: object) -> list[str]:
    words = ["images", str(pictures), "--size", "48", "--shard-samples", str(800 // SHARDS), "--workers", "2"]
    return [*words, "--out", str(out)]


class Run:
    """The converter in a process group of its own, forked from this one because its imports take seconds."""

    def __init__(self, words: list[str], log: Path, prepare: Callable[[], object] = lambda: None) -> None:
        self.log = log
        self._alive, inherited = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            tqdm.set_lock(
                threading.RLock()
            )  # tqdm's own is shared with this process, and a kill would keep it
            sys.stderr = log.open("w", buffering=1)
            prepare()
            os._exit(main(words))
        os.close(inherited)

    def wait(self) -> int:
        """The exit status, negative for a signal, when the workers are gone as well."""
        with os.fdopen(self._alive) as pipe:
            pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def error(self) -> str:
        return self.log.read_text().strip().splitlines()[-1]


def finished_parts(folder: Path) -> dict[str, int]:
    """Shards whose record is there, and when they were written."""
    records = folder.glob(".parts/*.json")
    shards = (folder / f"shard.{record.stem}.mds" for record in records if record.stem.isdecimal())
    return {shard.name: shard.stat().st_mtime_ns for shard in shards}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def uninterrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main(command(pictures, folder)) == 0
    return files(folder)


def test_killed_five_times_ends_byte_for_byte_the_same(pictures, uninterrupted, tmp_path):
    rng = np.random.default_rng()
    train = tmp_path / "train"
    seen: dict[str, int] = {}
    for kill in range(5):
        run = Run(command(pictures, tmp_path), tmp_path / "log")
        goal = min(len(seen) + rng.integers(1, 5), SHARDS - 1)
        wait_for(lambda goal=goal: len(finished_parts(train)) >= goal)
        time.sleep(rng.uniform(0, 0.01))
        # By turns the whole job as when a machine goes down, and the main process alone.
        (os.killpg if kill % 2 else os.kill)(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        with pytest.raises(DatasetError, match="did not finish"):
            read_manifest(str(train))
        parts = finished_parts(train)
        assert seen.items() <= parts.items(), "a finished part was converted again"
        assert seen.keys() != parts.keys()
        seen = parts
    assert 5 <= len(seen) < SHARDS
    assert main(command(pictures, tmp_path)) == 0
    assert files(train) == {name.removeprefix("train/"): data for name, data in uninterrupted.items()}


def test_a_second_conversion_into_one_folder_is_told_who_writes(pictures, uninterrupted, tmp_path, capsys):
    run = Run(command(pictures, tmp_path), tmp_path / "log")
    wait_for(lambda: finished_parts(tmp_path / "train"))
    assert main(command(pictures, tmp_path)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    writer = f"process {run.pid} on {socket.gethostname()} since {time.strftime('%Y')}"
    assert error.startswith(f"error: {tmp_path} is being written by {writer}")
    assert run.wait() == 0
    (tmp_path / "log").unlink()
    assert files(tmp_path) == uninterrupted
    assert main(["merge", str(tmp_path)]) == 0
    assert f"{tmp_path}/train: 800 samples in {SHARDS} shards" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "none")]) == 1


def test_kill_between_manifest_and_clean_up_leaves_a_complete_dataset(
    pictures, uninterrupted, tmp_path, capsys
):
    for name, data in uninterrupted.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "train" / ".parts" / "tmp-old").mkdir(parents=True)
    assert main(command(pictures, tmp_path)) == 0
    assert "already complete" in capsys.readouterr().out
    assert files(tmp_path) == uninterrupted and not (tmp_path / "train" / ".parts").exists()


def test_unfinished_conversion_of_something_else_is_refused(pictures, tmp_path, capsys):
    assert main([*command(pictures, tmp_path), "--shard", "1/20"]) == 0
    before = files(tmp_path)
    assert main([*command(pictures, tmp_path), "--flips"]) == 1
    assert "different dataset: `flips` is false there and true here" in capsys.readouterr().err
    next((pictures / "a").iterdir()).touch()  # the same bytes: still the same input
    assert main([*command(pictures, tmp_path), "--shard", "1/20"]) == 0
    assert files(tmp_path) == before


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_write_error_is_clear_and_keeps_what_is_there(pictures, uninterrupted, tmp_path):
    assert main([*command(pictures, tmp_path), "--shard", "1/4"]) == 0
    before = finished_parts(tmp_path / "train")
    assert len(before) == SHARDS // 4
    run = Run(command(pictures, tmp_path), tmp_path.with_suffix(".log"), _small_files)
    assert run.wait() == 1
    assert run.error().startswith("error: cannot write part") and "File too large" in run.error()
    assert before.items() <= finished_parts(tmp_path / "train").items()
    assert main(command(pictures, tmp_path)) == 0
    assert files(tmp_path) == uninterrupted


def test_full_disk_is_clear_and_keeps_what_is_there(pictures, uninterrupted, tmp_path):
    """On a real file system of 2 MB, which takes 14 of the 40 shards."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a small file system here")
    try:
        run = Run(command(pictures, tmp_path / "out"), tmp_path.with_suffix(".log"))
        assert run.wait() == 1
        assert run.error().startswith("error: cannot write part") and "No space left on device" in run.error()
        done = finished_parts(tmp_path / "out" / "train")
        assert done
        for name in done:
            assert (tmp_path / "out" / "train" / name).read_bytes() == uninterrupted[f"train/{name}"]
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path], check=True)
        assert main(command(pictures, tmp_path / "out")) == 0
        assert files(tmp_path / "out") == uninterrupted
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# A bucket


def _serve_s3(port: multiprocessing.connection.Connection) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    port.send(server.get_host_and_port())
    signal.pause()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An S3 client on a fresh bucket `data` of a real HTTP server on this machine."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    server = context.Process(target=_serve_s3, args=(sender,), daemon=True)
    server.start()
    endpoint = "http://{}:{}".format(*receiver.recv())
    environment = {
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(
        tempfile, "tempdir", str(tmp_path)
    )  # a killed upload leaves its scratch folder behind
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="data")
    yield client
    server.kill()


def objects(client, prefix: str = "") -> dict[str, tuple]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="data", Prefix=prefix)
    return {o["Key"]: o["LastModified"] for page in pages for o in page.get("Contents", [])}


@pytest.mark.slow
def test_killed_upload_is_continued_shard_by_shard(bucket, pictures, uninterrupted, tmp_path):
    run = Run(command(pictures, "s3://data/set"), tmp_path / "log")
    wait_for(lambda: len(objects(bucket, "set/train/.parts/0")) >= 7)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    with pytest.raises(DatasetError, match="did not finish"):
        read_manifest("s3://data/set/train")
    records = objects(bucket, "set/train/.parts/0")
    shards = {f"set/train/shard.{Path(key).stem}.mds" for key in records}
    before = {key: when for key, when in objects(bucket).items() if key in shards}
    assert len(before) == len(records) < SHARDS
    time.sleep(1)  # the server's times are in whole seconds

    assert main(command(pictures, "s3://data/set")) == 0
    after = objects(bucket)
    assert before.items() <= after.items(), "a finished part was uploaded again"
    found = {
        key.removeprefix("set/"): bucket.get_object(Bucket="data", Key=key)["Body"].read()
        for key in after
        if "/.parts/" not in key and not key.endswith(".yaml")
    }
    assert found == uninterrupted
    assert read_manifest("s3://data/set/train").num_samples == 800
    assert main(["verify", "s3://data/set"]) == 0
    assert (
        main(["mds", "s3://data/set", "--limit", "30", "--out", str(tmp_path / "copy"), "--workers", "1"])
        == 0
    )
    assert read_manifest(str(tmp_path / "copy" / "train")).num_samples == 30


def test_whole_bucket_may_be_the_target(bucket):
    assert main(["digits", "--limit", "20", "--workers", "1", "--out", "s3://data"]) == 0
    assert main(["verify", "s3://data"]) == 0


def test_only_an_answer_of_404_means_missing(monkeypatch):
    def refuse(self: S3, key: str, target: str) -> None:
        raise PermissionError(f"{key}: forbidden")

    monkeypatch.setattr(S3, "get", refuse)
    with pytest.raises(StorageError, match="forbidden") as caught:
        Folder("s3://bucket-404/set").read("index.json")
    assert not isinstance(caught.value, FileNotFoundError)


def test_missing_bucket_is_one_clear_error(bucket, pictures, capsys):
    assert main(command(pictures, "s3://nowhere/set")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: cannot list s3://nowhere/set/train: ")
