"""Resuming, preemption and preflight against object storage on loopback: real sockets, real processes."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from composer.utils.misc import get_free_tcp_port

import storage
from recipe import preflight
from recipe.checkpoints import (
    Checkpoints,
    Owner,
    check_identity,
    checkpoints,
    dataset_facts,
    identity,
    newest_checkpoint,
    prune,
    receipts,
)
from recipe.config import ConfigError, TrainConfig, load_config
from recipe.preemption import Preemption
from recipe.train import build_trainer, start
from recipe.weights import load_weights
from storage import Folder, Folders, StorageError, normalize_uri
from storage.manifest import read_manifest
from tests.conftest import NAMESPACES, ROOT, TINY, findings, outputs, run
from tests.fakes import Cloud


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    cloud = Cloud("s3", tmp_path_factory.mktemp("home"))
    yield cloud
    cloud.close()


@pytest.fixture
def oci(tmp_path_factory, monkeypatch):
    """Its settings hold for this process, too."""
    cloud = Cloud("oci", tmp_path_factory.mktemp("home"))
    for name, value in cloud.env.items():
        monkeypatch.setenv(name, value)
    importlib.import_module("tests.fakes.site.sitecustomize")
    yield cloud
    cloud.close()


@pytest.fixture(scope="module")
def s3_digits(s3, digits):
    """The dataset in the bucket."""
    folder = Folder(s3.uri("digits"))
    for file in digits.iterdir():
        if file.is_file():
            folder.put(file.name, file)
    return folder.uri


def settings(folder, data, save_folder, *more):
    return [
        *(
            "yamls/digits.yaml",
            f"folder={folder}",
            f"data.local={folder}/cache",
            f"data.remote={data}",
            *TINY,
        ),
        *(f"save_folder={save_folder}", "save_interval=4ba", "duration=12ba", "log.interval=1"),
        *("export=[ema,net]", *more),
    ]


PORT = get_free_tcp_port()  # of all launchers of a run on several nodes

# Streaming's shared memory is one for a machine: two nodes on one need a private /dev/shm each.
OWN_SHM = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"]


class Job:
    """`composer recipe/train.py` as a process; its launcher's output goes to one file."""

    def __init__(self, env, *arguments, ranks=1, node=0, nodes=1):
        launcher = ["-m", "composer.cli.launcher", "-n", str(ranks)]
        if nodes > 1:
            launcher += ["--world_size", str(nodes * ranks), "--node_rank", str(node)]
            launcher += ["--master_addr", "127.0.0.1", "--master_port", str(PORT)]
        self.process = subprocess.Popen(
            [
                *(OWN_SHM if nodes > 1 else ()),
                sys.executable,
                *launcher,
                "recipe/train.py",
                *map(str, arguments),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self):
        """(exit status, output)."""
        output, _ = outputs(self.process)
        return self.process.returncode, output

    def kill(self):
        """SIGKILL to the launcher and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def result(folder, step=12):
    """Losses of all steps, and final weights, as written by a run."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss/train/total"] for row in rows}
    nets = [load_weights(folder / f"weights/ba{step:07d}-{average}")[0] for average in ("ema", "net")]
    return losses, [t.tolist() for net in nets for t in net.state_dict().values()]


@pytest.fixture(scope="module")
def straight(s3, s3_digits, tmp_path_factory):
    """Losses and weights of a run of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    run("recipe/train.py", *settings(folder, s3_digits, s3.uri("straight")), env=s3.env)
    return result(folder)


def test_killed_in_an_upload_then_preempted_then_on_another_node_the_run_ends_with_the_same_bits(
    s3, s3_digits, straight, tmp_path
):
    killed = Job(s3.env, *settings(tmp_path / "one", s3_digits, s3.uri("faults"), "time_limit=600sec"))
    s3.faults.watch = lambda method, path: (
        killed.kill() if method == "PUT" and path.endswith("ep0-ba8/rank0.pt") else None
    )
    assert killed.end()[0] == -signal.SIGKILL
    s3.faults.heal()
    command = settings(tmp_path / "one", s3_digits, s3.uri("faults"))
    preempted = Job(s3.env, *command)
    s3.faults.watch = lambda method, path: (
        preempted.process.terminate() if method == "PUT" and path.endswith("ep0-ba8/rank0.pt") else None
    )
    status, output = preempted.end()
    s3.faults.heal()
    assert status == 75, output
    assert "resumed at step 4 from s3://tests/faults/ep0-ba4" in output
    stopped = int(re.search(r"stopped at step (\d+)", output)[1])
    assert 8 <= stopped < 12
    shutil.rmtree(tmp_path / "one")
    resumed = run("recipe/train.py", *settings(tmp_path / "two", s3_digits, s3.uri("faults")), env=s3.env)
    assert f"resumed at step {stopped} from" in resumed.stderr
    assert result(tmp_path / "two") == straight
    names = Folder(s3.uri("faults")).names()
    assert len(checkpoints(Folder(s3.uri("faults")), names)) == 2
    assert "weights/ba0000012-ema.safetensors" in names


@pytest.mark.skipif(not NAMESPACES, reason="needs user namespaces")
def test_two_sharded_ranks_through_two_launchers_stop_together_and_one_rank_goes_on(
    s3, s3_digits, straight, tmp_path
):
    sharded = settings(tmp_path / "run", s3_digits, s3.uri("sharded"), "parallel.fsdp2=true")
    own = [(f"data.local={tmp_path}/cache{node}", "time_limit=0sec") for node in (0, 1)]
    nodes = [Job(s3.env, *sharded, *own[node], node=node, nodes=2) for node in (0, 1)]
    for node in nodes:
        status, output = node.end()
        assert status == 75, output
    resumed = run("recipe/train.py", *sharded, env=s3.env, ranks=1)
    assert "resumed at step 1 from" in resumed.stderr
    losses, _ = result(tmp_path / "run")
    assert losses == pytest.approx(straight[0], rel=1e-5)


@pytest.mark.skipif(not NAMESPACES, reason="needs user namespaces")
def test_nodes_with_a_folder_each_are_refused(digits, tmp_path):
    run = [
        "yamls/digits.yaml",
        *TINY,
        f"data.local={digits}",
        f"folder={tmp_path}",
        "save_folder=/dev/shm/save",
    ]
    for node in [Job({}, *run, node=node, nodes=2) for node in (0, 1)]:
        status, output = node.end()
        assert status == 1, output
        assert "save_folder: /dev/shm/save is not one folder that all nodes see" in output


@pytest.fixture
def cloud_env(s3, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)


def config_of(digits, save_folder, *more):
    return load_config(
        TrainConfig, "yamls/digits.yaml", [f"data.local={digits}", f"save_folder={save_folder}", *TINY, *more]
    )


def trainer_of(config):
    return build_trainer(config, findings(config), None, Preemption(None))


@pytest.fixture
def saved(s3, s3_digits, straight, tmp_path, request):
    """A copy, under its own URI, of the finished run's two checkpoints."""
    source, target = Folder(s3.uri("straight")), Folder(s3.uri(f"copy-{request.node.name[:40]}"))
    for name in source.names():
        source.get(name, tmp_path / "file")
        target.put(name, tmp_path / "file")
    return target


def sign(folder, name, rank=0, **more):
    """Writes a receipt for no files."""
    receipt = {"run_name": "digits", "ranks": 1, "attempt": "a", "files": {}, **more}
    folder.write(f"{name}/rank{rank}.json", json.dumps(receipt).encode())


def resumed_from(config):
    """The name of the checkpoint that a start goes on from, None for a new run; it claims the folder."""
    found = preflight.check(config)
    with newest_checkpoint(config.folder, found.point, found.folders) as resume:
        Owner(config, found.folders)
        return resume and resume.source.rpartition("/")[2]


def test_the_newest_sound_checkpoint_is_taken_and_damage_is_said(saved, digits, tmp_path, caplog):
    config = config_of(digits, saved.uri, f"folder={tmp_path}/run")
    assert resumed_from(config) == "ep0-ba12"
    good = saved.read("ep0-ba12/rank0.pt")
    saved.write("ep0-ba12/rank0.pt", good[: len(good) // 2])
    assert resumed_from(config) == "ep0-ba8"
    assert "ep0-ba12 is damaged: not used (rank0.pt has another checksum" in caplog.text
    saved.delete("ep0-ba12/rank0.pt")
    assert resumed_from(config) == "ep0-ba8"
    assert "rank0.pt is gone" in caplog.text
    saved.write("ep0-ba12/rank0.pt", good)
    saved.delete("ep0-ba12/rank0.json")
    assert resumed_from(config) == "ep0-ba8"
    assert "ep0-ba12 was never completed" in caplog.text
    saved.write("latest-rank0.pt.symlink", b"elsewhere/ep0-ba99")  # a pointer as Composer writes it
    assert resumed_from(config) == "ep0-ba8"
    saved.write("ep0-ba8/rank0.pt", b"")
    with pytest.raises(
        ConfigError, match=r"none of the checkpoints in .* can be read .*ep0-ba8.*Restore one"
    ):
        resumed_from(config)


def test_a_first_checkpoint_that_was_never_completed_is_no_obstacle(s3, digits, tmp_path, cloud_env):
    config = config_of(digits, s3.uri("first"), f"folder={tmp_path}/run")
    assert resumed_from(config) is None
    Folder(s3.uri("first")).write("ep0-ba4/rank0.pt", b"half")
    assert resumed_from(config) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=32", r"model\.width: 32 differs from the 16"),
        ("objective.name=flow_matching", r"objective\.name: flow_matching differs from the tvm"),
        ("optimizer.name=muon", r"optimizer\.name: muon differs from the adamw"),
        ("parallel.fsdp2=true", r"parallel\.fsdp2: True differs from the False"),
        ("ema.posthoc=[0.05]", r"ema\.posthoc: \[0\.05\] differs from the \[\]"),
        ("run_name=other", r"belongs to run_name 'digits', not 'other'"),
    ],
)
def test_checkpoints_of_another_run_or_architecture_are_refused(s3, straight, digits, override, message):
    with pytest.raises(ConfigError, match=message):
        resumed_from(config_of(digits, s3.uri("straight"), override))


@pytest.mark.parametrize(
    ("key", "older", "newer"), [("model.embedding_scale", 1.0, 10.0), ("optimizer.name", "adamw", "muon")]
)
def test_a_setting_that_is_newer_than_the_run_had_its_older_value(key, older, newer, tmp_path):
    network = ["model.network=mit", "model.head_depth=1", "objective.name=imf"]
    before, now = (
        load_config(TrainConfig, "yamls/digits.yaml", [*network, f"{key}={value}"])
        for value in (older, newer)
    )
    known = identity(before)
    del known[key]
    folder = Folder(str(tmp_path))
    folder.write("run.json", json.dumps({"run_name": "digits", "identity": known}).encode())
    check_identity(before, folder, folder.names())
    for fork, way in ((False, "choose another run_name"), (True, "begin with its weights alone")):
        with pytest.raises(ConfigError, match=f"^{re.escape(key)}: {newer} differs from the {older}.* {way}"):
            check_identity(now, folder, folder.names(), fork)


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(s3, digits, cloud_env):
    Folder(s3.uri("foreign")).write("ep0-ba40/__0_0.distcp", b"")
    with pytest.raises(ConfigError, match=r"foreign is not empty and holds no run.json"):
        resumed_from(config_of(digits, s3.uri("foreign")))
    assert Folder(s3.uri("foreign")).names() == ["ep0-ba40/__0_0.distcp"]


def test_a_folder_that_may_not_be_listed_is_an_error(s3, straight, digits):
    s3.faults.denied = "prefix=straight/"
    try:
        with pytest.raises(ConfigError, match="^save_folder: cannot list s3://tests/straight: .*403"):
            resumed_from(config_of(digits, s3.uri("straight")))
    finally:
        s3.faults.heal()


def test_a_fork_starts_from_another_runs_checkpoint_in_its_own_folder(s3, straight, digits, tmp_path):
    fork = f"fork_from={s3.uri('straight')}/ep0-ba8"
    config = config_of(digits, s3.uri("fork"), fork, "run_name=fork", f"folder={tmp_path}")
    assert resumed_from(config) == "ep0-ba8"
    assert Folder(s3.uri("fork")).names() == ["run.json"]
    with pytest.raises(ConfigError, match="fork_from: .*ep0-ba9 is not a complete checkpoint"):
        resumed_from(config_of(digits, s3.uri("fork2"), f"{fork[:-1]}9"))


def test_a_start_opens_and_lists_its_save_folder_once(
    s3, s3_digits, digits, tmp_path, monkeypatch, cloud_env
):
    """Count for a new run, one that resumes, a fork with its source, and weights to begin with.

    The bucket of the data is opened once, too, also by the first start, whose cache has no index yet.
    """
    opened, listed = [], []
    names, made = Folder.names, Folder.__init__
    monkeypatch.setattr(Folder, "__init__", lambda self, uri: (opened.append(uri), made(self, uri))[1])
    monkeypatch.setattr(Folder, "names", lambda self: (listed.append(self.uri), names(self))[1])
    more = (f"data.remote={s3_digits}", f"data.local={tmp_path}/cache", "grid.interval=null")

    def begin(name, *others):
        opened.clear()
        listed.clear()
        folder = f"folder={tmp_path}/{name}"
        trainer, _ = start(config_of(digits, s3.uri(name), folder, *others, *more), Preemption(None))
        assert opened.count(s3_digits) == 1
        asked = [uri for uri in opened if not re.search("digits|cache", uri)]
        counted = {uri: (asked.count(uri), listed.count(uri)) for uri in asked}
        return trainer, counted

    trainer, counted = begin("once", "duration=2ba")
    assert counted == {s3.uri("once"): (1, 1), f"{tmp_path}/once": (1, 1)}
    trainer.fit()
    trainer.close()
    trainer, counted = begin("once", "duration=4ba")
    assert int(trainer.state.timestamp.batch) == 2
    assert counted == {s3.uri("once"): (1, 1), f"{tmp_path}/once": (1, 1)}
    trainer.close()
    for name, key, place in (("forked", "fork_from", "ep0-ba2"), ("warm", "init_from", "weights")):
        source = s3.uri("once") if key == "fork_from" else f"{s3.uri('once')}/weights"
        trainer, counted = begin(name, f"{key}={s3.uri('once')}/{place}", f"run_name={name}", "duration=4ba")
        here = {s3.uri(name): (1, 1), f"{tmp_path}/{name}": (1, 1)}
        assert counted == {**here, source: (1, 1)}
        trainer.close()


def test_a_fork_with_nothing_left_to_do_is_refused(s3, straight, digits, tmp_path):
    source = f"{s3.uri('straight')}/ep0-ba8"
    more = (f"fork_from={source}", f"folder={tmp_path}", "run_name=fork", "duration=8ba")
    with pytest.raises(ConfigError, match=r"duration: 8ba leaves nothing to do after step 8 of .*ep0-ba8"):
        start(config_of(digits, s3.uri("fork3"), *more), Preemption(None))


def test_pruning_deletes_old_checkpoints_of_this_run_alone(saved):
    saved.write("ep0-ba2/rank0.pt", b"left over")
    saved.write("ep0-ba8/notes.txt", b"not ours")
    sign(saved, "ep0-ba3", run_name="other")
    prune(saved, -1, "digits", 12)
    assert "ep0-ba8/rank0.pt" in saved.names()
    prune(saved, 1, "digits", 12)
    names = {n for n in saved.names() if n.startswith("ep")}
    assert names == {"ep0-ba12/rank0.pt", "ep0-ba12/rank0.json", "ep0-ba8/notes.txt", "ep0-ba3/rank0.json"}


def test_pruning_spares_the_checkpoint_just_saved_before_a_damaged_one(tmp_path):
    folder = Folder(str(tmp_path))
    for step in (4, 8, 12):
        sign(folder, f"ep0-ba{step}")
    prune(folder, 1, "digits", 8)
    assert sorted(folder.names()) == ["ep0-ba12/rank0.json", "ep0-ba8/rank0.json"]


def test_a_receipt_that_cannot_be_read_is_damage_and_never_a_fresh_start(digits, tmp_path, caplog):
    config = config_of(digits, tmp_path / "save", f"folder={tmp_path}/run")
    assert resumed_from(config) is None
    folder = Folder(config.save_folder)
    sign(folder, "ep0-ba4")
    folder.write("ep0-ba8/rank0.json", b'{"run')
    sign(folder, "ep0-ba12", settings=["duration"])
    sign(folder, "ep0-ba16", dataset={"samples": "1797", "xxh64": "0"})
    assert resumed_from(config) == "ep0-ba4"
    assert all(f"ep0-ba{step} is damaged: not used" in caplog.text for step in (8, 12, 16))
    folder.write("ep0-ba4/rank0.json", b"{}")
    with pytest.raises(ConfigError, match=r"none of the checkpoints .*ep0-ba4/rank0.json is damaged"):
        resumed_from(config)
    folder.write("run.json", b"[]")
    with pytest.raises(ConfigError, match=r"^save_folder: .*run.json is damaged"):
        resumed_from(config)


def test_what_a_killed_start_left_is_no_obstacle_and_does_not_stay(digits, tmp_path):
    (tmp_path / "save").mkdir()
    (tmp_path / "save/run.json.tmp").write_bytes(b"{")
    (tmp_path / "run/resume-killed/ep0-ba4").mkdir(parents=True)
    assert resumed_from(config_of(digits, tmp_path / "save", f"folder={tmp_path}/run")) is None
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["start.json"]


class AtOnce:
    """A thread pool without threads."""

    def submit(self, action, *arguments):
        future = Future()
        future.set_result(action(*arguments))
        return future


def test_weights_reach_the_bucket_before_the_receipt_that_ends_the_run(s3, digits, tmp_path, monkeypatch):
    written, put = [], Folder.put
    monkeypatch.setattr(Folder, "put", lambda self, name, path: (written.append(name), put(self, name, path)))
    more = (f"folder={tmp_path}", "duration=1ep", "data.batch_size=1024", "grid.interval=null")
    trainer = trainer_of(config_of(digits, s3.uri("order"), *more))
    (saver,) = (c for c in trainer.state.callbacks if isinstance(c, Checkpoints))
    saver.thread = AtOnce()  # no export that comes after the save can overtake its upload
    trainer.fit()
    trainer.close()
    assert written.index("weights/ba0000001-ema.safetensors") < written.index("ep1-ba1/rank0.json")


@pytest.mark.parametrize(
    ("folder", "first", "message"),
    [
        ("a", "log.interval=1", r"folder: .*/a was taken over by a later start"),
        ("a", "grid.interval=1ba", r"folder: .*/a was taken over by a later start"),
        ("a", "export_interval=1ba", r"folder: .*/a was taken over by a later start"),
        ("b", "save_interval=1ba", r"save_folder: .*/save was taken over by a later start"),
    ],
)
def test_of_two_starts_of_one_run_the_earlier_one_writes_nothing_more(
    digits, tmp_path, folder, first, message
):
    more = ("duration=2ba", "grid.interval=null", "log.interval=10", first)
    trainer = trainer_of(config_of(digits, tmp_path / "save", f"folder={tmp_path}/a", *more))
    Owner(config_of(digits, tmp_path / "save", f"folder={tmp_path}/{folder}"), Folders())
    with pytest.raises(StorageError, match=message):
        trainer.fit()
    trainer.close()
    assert Folder(str(tmp_path / "save")).names() == ["run.json"]
    if folder == "a":
        assert Folder(str(tmp_path / "a")).names() == ["start.json"]


def test_a_bucket_gets_the_export_of_the_later_start(s3, digits, tmp_path, cloud_env):
    """Both wrote weights of one name, with other settings; the earlier one's were in the bucket already."""
    config = config_of(digits, s3.uri("replaced"), f"folder={tmp_path}")
    saver = Checkpoints(config, read_manifest(config.data.source), Owner(config, Folders()))
    (tmp_path / "weights").mkdir()
    for content in (b"one", b"two"):
        saver.mirrored.clear()  # as for another start
        for suffix in ("json", "safetensors"):
            (tmp_path / f"weights/ba0000001-ema.{suffix}").write_bytes(content)
        saver.mirror()
        assert saver.target.read("weights/ba0000001-ema.safetensors") == content


def test_checkpoints_of_another_dataset_are_refused_with_the_way_out(digits, tmp_path):
    config = config_of(digits, tmp_path / "save", f"folder={tmp_path}/run")
    here = dataset_facts(read_manifest(str(digits)))
    assert here["samples"] == 1797
    assert resumed_from(config) is None
    sign(Folder(config.save_folder), "ep0-ba4")  # as written before receipts named the dataset
    assert resumed_from(config) == "ep0-ba4"
    sign(Folder(config.save_folder), "ep0-ba8", dataset=here)
    assert resumed_from(config) == "ep0-ba8"
    for other in ({**here, "samples": 900}, {**here, "xxh64": "0" * 16}):
        sign(Folder(config.save_folder), "ep0-ba8", dataset=other)
        with pytest.raises(ConfigError, match=r"^data.local: .*1797 samples.* is not .*ep0-ba8 .*init_from"):
            resumed_from(config)
        fork = config_of(digits, tmp_path / "fork", f"fork_from={config.save_folder}/ep0-ba8")
        with pytest.raises(ConfigError, match=r"^data.local: "):
            resumed_from(fork)


def test_receipts_of_two_attempts_at_one_checkpoint_do_not_make_it_complete(tmp_path):
    folder = Folder(str(tmp_path))
    for rank, attempt in enumerate("ab"):
        sign(folder, "ep0-ba4", rank, ranks=2, attempt=attempt)
    (found,) = checkpoints(folder, folder.names())
    assert receipts(folder, found) is None


def test_a_flaky_endpoint_is_tried_again_until_it_answers(s3, cloud_env, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    folder, content = Folder(s3.uri("flaky")), os.urandom(100_000)
    s3.faults.rate, before = 0.3, s3.faults.failed
    try:
        for i in range(20):
            folder.write(f"{i}", content)
            assert folder.read(f"{i}") == content
        assert sorted(folder.names(), key=int) == [str(i) for i in range(20)]
    finally:
        s3.faults.heal()
    assert s3.faults.failed > before + 10


@pytest.mark.parametrize("uri", ["http://bucket/x", "s4://bucket/x"])
def test_an_unknown_scheme_is_refused(uri):
    with pytest.raises(ValueError, match="neither a local path nor one of s3://, gs://, oci://"):
        normalize_uri(uri)


class TestPreflight:
    def test_it_passes_where_all_is_well(self, s3, s3_digits, tmp_path, capsys):
        preflight.main(settings(tmp_path, s3_digits, s3.uri("preflight")))
        assert (
            "digits: ready on 1 rank(s): s3://tests/digits -> s3://tests/preflight" in capsys.readouterr().out
        )
        assert Folder(s3.uri("preflight")).names() == []

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("data.remote=s3://nowhere/x", r"data\.remote: .*Fix: aws s3 (mb|ls) s3://nowhere"),
            (
                "save_folder=s3://nowhere/x",
                r"Fix: aws s3 mb s3://nowhere --endpoint-url \"\$S3_ENDPOINT_URL",
            ),
            ("folder=/proc/none", r"folder: cannot write /proc/none/.*Fix: ls -ld /proc/none"),
            ("fork_from=s3://tests/none/ep0-ba4", r"fork_from: .* is not a complete checkpoint"),
            ("data.batch_size=5", r"data\.batch_size: 5 is not a multiple of the 2 ranks"),
            ("log.wandb=online", r"log\.wandb: online, but there is no key\. Fix: run wandb login"),
            ("model.size=16", r"model\.size: 16 differs from the 8"),
            ("data.cache_limit=50kb", r"data\.cache_limit: 50kb is less .*data\.cache_limit=1mb or more"),
            ("data.cache_limit=much", r"data\.cache_limit: 'much' must be a size such as 100gb"),
            ("model.width=40000", r"folder: .* \d+ MB needed, \d+ MB free"),
        ],
    )
    def test_each_failure_names_the_setting_and_the_command(
        self, s3, s3_digits, tmp_path, monkeypatch, override, message
    ):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".netrc").write_bytes(b"\xff")  # no text, and no business of most runs
        with pytest.raises(SystemExit, match=message):
            preflight.main([*settings(tmp_path, s3_digits, s3.uri("preflight")), override])

    def test_without_credentials_it_says_how_to_get_them(self, s3, s3_digits, tmp_path, monkeypatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(SystemExit, match=r"save_folder: .*NoCredentialsError.*Fix: aws configure"):
            preflight.main(settings(tmp_path, s3_digits, s3.uri("preflight")))

    def test_disks_need_room_for_what_is_not_there_yet_and_for_all_that_goes_there(
        self, digits, tmp_path, monkeypatch
    ):
        def disk_space(config):
            return list(preflight.disk_space(config, read_manifest(config.data.source)))

        config = config_of(digits, tmp_path / "save", f"folder={tmp_path}", "save_keep=2")
        size = preflight.checkpoint_bytes(config)
        more = config_of(digits, tmp_path / "save", "ema.posthoc=[0.05,0.1]")
        assert preflight.checkpoint_bytes(more) * 5 == size * 7  # of 5 tensors of that size, to 7
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * size))
        assert re.match(r"save_folder: .* MB needed, .* MB free\. Fix: df", *disk_space(config))
        Folder(config.save_folder).write("ep0-ba4/rank0.pt", bytes(size))
        assert disk_space(config) == []
        more = (f"data.remote={digits}", f"data.local={tmp_path}/cache")
        config = config_of(digits, config.save_folder, f"folder={tmp_path}", "save_keep=2", *more)
        assert re.match(r"save_folder: .*, data.local: .* MB needed", *disk_space(config))

    def test_an_endpoint_that_does_not_answer_is_named(self, s3, s3_digits, tmp_path, monkeypatch):
        monkeypatch.setattr(storage, "ATTEMPTS", 1)
        monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(SystemExit, match=r"save_folder: .*Fix: curl -I http://127.0.0.1:1"):
            preflight.main(settings(tmp_path, s3_digits, s3.uri("preflight")))

    def test_oci_configurations_that_differ_are_named(self, oci, tmp_path, monkeypatch):
        other = tmp_path / "config"
        other.write_text((oci.home / ".oci/config").read_text().replace("tester", "somebody"))
        other.chmod(0o600)
        for name, value in {**oci.env, "OCI_CONFIG_FILE": str(other)}.items():
            monkeypatch.setenv(name, value)
        (problem,) = preflight.oci_agreement({"save_folder": "oci://tests/run"})
        assert problem.startswith("OCI_CONFIG_FILE:")
        assert "differ in user; checkpoints would use the first" in problem
        assert problem.endswith("Fix: unset OCI_CONFIG_FILE")

    def test_a_namespace_that_is_not_the_accounts_is_named(self, oci):
        (problem,) = preflight.oci_agreement({"save_folder": "oci://tests@elsewhere/run"})
        assert (
            problem
            == "save_folder: namespace 'elsewhere' is not 'testing', the one that `oci os ns get` shows"
        )

    def test_without_an_oci_configuration_it_says_how_to_make_one(self, oci, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (problem,) = preflight.oci_agreement({"save_folder": "oci://tests/run"})
        assert "ConfigFileNotFound" in problem
        assert "Fix: oci setup config" in problem

    def test_a_bucket_that_is_not_there_comes_with_the_command_that_makes_it(self, oci):
        with pytest.raises(ConfigError, match="Fix: oci os bucket create --name nowhere"):
            preflight.writable("save_folder", "oci://nowhere/run", Folders())


def test_a_bucket_itself_is_a_folder(s3, cloud_env):
    Folder("s3://tests/below").write("a", b"")
    assert "below/a" in Folder("s3://tests").names()


@pytest.mark.parametrize("uri", ["oci://tests/folder", "oci://tests@testing/folder/"])
def test_one_spelling_of_an_oci_uri_serves_both_libraries(oci, digits, uri, tmp_path):
    folder = Folder(uri)
    for name in ("manifest.json", "index.json"):
        folder.put(name, digits / name)
    assert sorted(folder.names()) == ["index.json", "manifest.json"]
    assert read_manifest(normalize_uri(uri)).num_samples == 1797
    folder.delete("index.json")
    assert folder.names() == ["manifest.json"]


def test_the_run_resumes_to_the_same_bits_through_oci(oci, digits, straight, tmp_path):
    data = Folder(oci.uri("digits"))
    for file in digits.iterdir():
        if file.is_file():
            data.put(file.name, file)
    command = settings(tmp_path / "run", data.uri, oci.uri("run"))
    job = Job(oci.env, *command)
    oci.faults.watch = lambda method, path: job.kill() if path.endswith("o/run/ep0-ba8/rank0.pt") else None
    assert job.end()[0] == -signal.SIGKILL
    oci.faults.heal()
    status, output = Job(oci.env, *command).end()
    assert status == 0, output
    assert "resumed at step 4 from oci://tests/run/ep0-ba4" in output
    assert result(tmp_path / "run") == straight


def test_the_oci_command_uploads_what_training_reads_and_lists_what_it_wrote(oci, tmp_path):
    def command(*words):
        program = [sys.executable, "-m", "oci_cli.cli", "os", "object", *words, "--bucket-name", "tests"]
        env = {**os.environ, **oci.env, "OCI_CLI_SUPPRESS_FILE_PERMISSIONS_WARNING": "True"}
        return subprocess.run(program, env=env, capture_output=True, text=True, check=True).stdout

    (tmp_path / "a").write_bytes(b"by the command")
    command("put", "--name", "cli/a", "--file", str(tmp_path / "a"), "--force")
    folder = Folder(oci.uri("cli"))
    assert folder.read("a") == b"by the command"
    folder.write("b", b"by the recipe")
    assert [row["name"] for row in json.loads(command("list", "--prefix", "cli/"))["data"]] == [
        "cli/a",
        "cli/b",
    ]
