"""Training through Composer and Streaming: real processes, real digits."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from composer import Trainer
from composer.core import Callback
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from recipe.callbacks import append_line
from recipe.config import EMAConfig, TrainConfig, load_config
from recipe.data import train_loader
from recipe.ema import ema_decay
from recipe.guard import DivergedError
from recipe.model import StepKey
from recipe.parallel import unwrap
from recipe.train import build_algorithms, build_model, short_for_average
from recipe.weights import load_weights
from storage import StorageError, writing
from tests.conftest import EACH, JOINT, NAMESPACES, PATIENCE, ROOT, TINY, findings, refusal, run


class Recorder(Callback):
    """Per-step sample ids and losses in full precision; poisons the samples of one step if told to."""

    def __init__(self, poison_step=None):
        self.poison_step, self.rows, self.states = poison_step, [], []

    def after_dataloader(self, state, logger):
        self.samples = state.batch["sample"].tolist()
        self.loss = 0.0
        if int(state.timestamp.batch) == self.poison_step:
            state.batch["image"] = state.batch["image"].float()
            state.batch["image"][3] = torch.nan
            if state.model.objective.finishes:  # from noise alone
                self.hook = state.model.net.register_forward_hook(self.poison)
        elif hasattr(self, "hook"):
            self.hook.remove()

    @staticmethod
    def poison(net, arguments, out):
        bad = torch.zeros_like(out.value)
        bad[3] = torch.nan
        return out._replace(value=out.value + bad)

    def after_loss(self, state, logger):
        self.loss += float(state.loss["total"].detach()) * len(state.batch["sample"]) / len(self.samples)

    def batch_end(self, state, logger):
        self.rows.append((self.samples, self.loss))
        optimizer = {k: v for s in state.optimizers[0].state.values() for k, v in s.items()}
        tensors = [*state.model.state_dict().values(), *optimizer.values()]
        self.states.append([t.clone() for t in tensors])


def fit(digits, steps, *overrides, recorder=None, **trainer):
    """Train in this process; returns (model, recorder)."""
    overrides = [f"data.local={digits}", *TINY, *(o.format(digits=digits) for o in overrides)]
    config = load_config(TrainConfig, "yamls/digits.yaml", overrides)
    model = build_model(config, findings(config)).double()
    recorder = recorder or Recorder()
    optimizer = torch.optim.AdamW([p for p in model.net.parameters() if p.requires_grad], lr=1e-3)
    algorithms = build_algorithms(config)
    Trainer(
        model=model,
        train_dataloader=train_loader(config.data, config.seed, config.model.text),
        optimizers=optimizer,
        max_duration=f"{steps}ba",
        algorithms=algorithms,
        callbacks=[StepKey(), recorder],
        device="cpu",
        device_train_microbatch_size=config.microbatch,
        progress_bar=False,
        **trainer,
    ).fit()
    recorder.guard = algorithms[0]
    return model, recorder


@pytest.mark.parametrize("objective", EACH)
def test_the_same_seed_gives_the_same_run_and_microbatches_change_nothing(digits, objective):
    whole, recorder = fit(digits, 4, *EACH[objective])
    again, repeated = fit(digits, 4, *EACH[objective])
    assert recorder.rows == repeated.rows
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    parts, split = fit(digits, 4, "microbatch=4", *EACH[objective])
    assert [row[0] for row in split.rows] == [row[0] for row in recorder.rows]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", EACH)
def test_a_bad_sample_leaves_weights_averages_and_optimizer_untouched_and_is_named(digits, objective):
    _, recorder = fit(digits, 5, *EACH[objective], recorder=Recorder(poison_step=2))
    before, after, last = recorder.states[1], recorder.states[2], recorder.states[4]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, last, strict=True))
    assert recorder.guard.skipped == 1
    assert recorder.guard.bad_samples == [recorder.rows[2][0][3]]


def test_several_bad_steps_in_a_row_stop_the_run(digits):
    class AlwaysBad(Recorder):
        def after_dataloader(self, state, logger):
            self.poison_step = int(state.timestamp.batch)
            super().after_dataloader(state, logger)

    with pytest.raises(DivergedError, match=r"gradient not finite.*3 in a row.* step.max_skipped is 3"):
        fit(digits, 10, "step.max_skipped=3", recorder=AlwaysBad())


def test_a_run_that_diverges_says_in_one_line_what_to_try_and_where_to_go_back_to(digits, tmp_path):
    """Until the gradient is not finite; checkpoints of the steps that were skipped do not count."""
    command = ["recipe/train.py", "yamls/digits.yaml", f"data.local={digits}", *TINY, f"folder={tmp_path}"]
    much = ["optimizer.lr=1e6", "optimizer.warmup=0ba", "duration=40ba", "save_interval=1ba"]
    process = run(*command, *much, check=False)
    assert process.returncode == 1
    *_, last = process.stderr.strip().splitlines()
    found = re.search(r"training error: step (\d+): gradient not finite, .*\(5 in a row, 5 in all\)", last)
    assert found, process.stderr
    assert "; samples with a non-finite loss: " in last
    assert "Try a smaller optimizer.lr (1e+06)" in last
    assert last.endswith(f"newest checkpoint from before: {tmp_path}/checkpoints/ep0-ba{int(found[1]) - 4}")
    assert "Traceback" not in process.stderr
    assert len(list((tmp_path / "checkpoints").glob("ep*"))) >= 2 + 4  # of steps in doubt none prunes


def test_weights_that_are_not_finite_are_neither_exported_nor_saved_nor_a_reason_to_prune(digits, tmp_path):
    """An update that float32 cannot hold, after finite gradients."""
    command = ["recipe/train.py", "yamls/digits.yaml", f"data.local={digits}", *TINY, f"folder={tmp_path}"]
    command += ["optimizer.warmup=0ba", "save_interval=1ba", "save_keep=1", "export_interval=1ba"]
    run(*command, "duration=1ba")
    process = run(*command, "duration=2ba", "optimizer.lr=1e300", check=False)
    assert process.returncode == 1
    *_, last = process.stderr.strip().splitlines()
    assert last.startswith("training error: step 2: the weights are not finite, so they are not saved. Try ")
    assert last.endswith(f"newest checkpoint from before: {tmp_path}/checkpoints/ep0-ba1")
    assert [path.name for path in (tmp_path / "checkpoints").glob("ep*")] == ["ep0-ba1"]
    assert [path.name for path in (tmp_path / "weights").glob("*.json")] == ["ba0000001-ema.json"]


STUCK = """
import sys, time
from recipe import data, preemption, train

good, seen, collate = int(sys.argv[1]), [], data.collate

def stuck(samples, text):
    seen.append(samples)
    if len(seen) > good:
        print("stuck", flush=True)
        time.sleep(1000)
    return collate(samples, text)

data.collate, preemption.PATIENCE = stuck, 1.0
train.main(sys.argv[2:])
"""


def test_sigterm_ends_a_run_whose_loader_yields_nothing_more(digits, tmp_path):
    command = ["yamls/digits.yaml", f"data.local={digits}", *TINY, f"folder={tmp_path}", "data.workers=0"]
    command += ["duration=40ba", "save_interval=2ba", "log.interval=1"]
    for good, steps in ((0, 0), (3, 3)):
        process = subprocess.Popen(
            [sys.executable, "-c", STUCK, str(good), *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "stuck\n"
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 143
        assert "ended by SIGTERM without saving: no step has ended" in errors
        assert len(last_rows(tmp_path) if steps else []) == steps
    assert "resumed at step 2" in run("recipe/train.py", *command, "duration=4ba").stderr


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGKILL]])
def test_a_launcher_that_goes_early_leaves_no_process_behind_and_its_ranks_save(digits, tmp_path, signals):
    command = ["-m", "composer.cli.launcher", "-n", "1", "recipe/train.py", "yamls/digits.yaml", *TINY]
    command += [f"data.local={digits}", f"folder={tmp_path}", "duration=4000ba", "save_interval=4000ba"]
    process = subprocess.Popen(
        [sys.executable, *command, "grid.interval=null", "log.interval=1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "train.jsonl").exists():
        time.sleep(0.1)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    output, _ = process.communicate(timeout=PATIENCE)  # until the last rank has closed its output
    assert process.returncode in ((75, 143) if signal.SIGTERM in signals else (-9,))
    step = re.search(r"stopped at step (\d+), saved to", output)[1]
    assert (tmp_path / f"checkpoints/ep0-ba{step}/rank0.json").exists()


class Warmup(Recorder):
    """Whether a step matched plain velocities, and the factor of the derivative in it."""

    def batch_end(self, state, logger):
        model = unwrap(state.model)
        self.rows.append(None if model.flow_matching else model.tangent_scale)


@pytest.mark.parametrize("first", ["3ba", "1ep", "1536sp", "1025sp", "0sp"])
def test_the_derivative_warms_up_from_the_first_step_that_has_one(digits, tmp_path, first):
    """1797 digits are three steps of 512 in an epoch; a run resumed in the middle goes on with the ramp."""
    options = ["data.batch_size=512", "step.tangent_warmup=4"]
    options += [] if first == "0sp" else [f"objective.flow_matching_first={first}"]
    saving = {"save_folder": str(tmp_path), "save_interval": "5ba"}
    _, straight = fit(digits, 9, *options, recorder=Warmup(), **saving)
    plain = 0 if first == "0sp" else 3
    assert straight.rows == ([None] * plain + [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1])[:9]
    (half,) = tmp_path.glob("ep*-ba5-rank0.pt")
    _, resumed = fit(digits, 9, *options, recorder=Warmup(), load_path=str(half))
    assert resumed.rows == straight.rows[5:]


def test_gradients_are_clipped_to_the_norm_asked_for(digits):
    class Norms(Recorder):
        def batch_end(self, state, logger):
            grads = [p.grad.flatten() for p in state.model.net.parameters()]
            self.rows.append(torch.cat(grads).norm().item())

    _, free = fit(digits, 3, recorder=Norms())
    _, clipped = fit(digits, 3, "step.clip=0.01", recorder=Norms())
    assert min(free.rows) > 0.02
    assert clipped.rows == pytest.approx([0.01] * 3, rel=1e-3)


def test_the_average_ramps_up_to_its_decay():
    assert ema_decay(0.999, 0, ramp=True) == 0.1
    assert ema_decay(0.999, 10**6, ramp=True) == 0.999
    assert ema_decay(0.999, 0, ramp=False) == 0.999


@pytest.mark.parametrize(
    ("steps", "decay", "ramp", "left"),
    [
        (2000, 0.9999, False, "keeps 82% of the first weights"),
        (2999, 0.999, False, "keeps 5% of"),
        (3001, 0.999, False, None),
        (2000, 0.9999, True, None),
    ],
)
def test_an_average_too_long_for_its_run_is_said(steps, decay, ramp, left):
    advice = short_for_average(EMAConfig(decay=decay, ramp=ramp), steps)
    assert advice is None if left is None else left in advice


@pytest.mark.parametrize("interval", ["1ep", "7ba"])  # both are saved after the epoch's last batch
def test_a_run_resumed_between_two_epochs_goes_on_with_the_order_of_the_second(digits, tmp_path, interval):
    saving = {"save_folder": str(tmp_path), "save_interval": interval}
    _, straight = fit(digits, 10, "data.batch_size=256", **saving)
    (between,) = tmp_path.glob("ep*-ba7-rank0.pt")
    _, resumed = fit(digits, 10, "data.batch_size=256", load_path=str(between))
    assert resumed.rows == straight.rows[7:]


@pytest.mark.parametrize("overrides", [*EACH.values(), JOINT], ids=[*EACH, "joint"])
def test_every_objective_resumes_in_mid_epoch_to_the_last_bit(digits, tmp_path, overrides):
    straight, rows = fit(digits, 6, *overrides, save_folder=str(tmp_path), save_interval="3ba")
    (half,) = tmp_path.glob("ep*-ba3-rank0.pt")
    resumed, after = fit(digits, 6, *overrides, load_path=str(half))
    assert after.rows == rows.rows[3:]
    for a, b in zip(resumed.state_dict().values(), straight.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def last_rows(folder):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss/train/total"] for row in rows}


def test_a_run_stopped_in_mid_epoch_continues_to_the_last_bit(digits, tiny_run, tmp_path):
    command = ["recipe/train.py", "yamls/digits.yaml", f"data.local={digits}", *TINY]
    command += [f"folder={tmp_path}/run", "save_interval=4ba", "log.interval=1", "export=[ema,net]"]
    run(*command, "duration=4ba")
    run(*command, "duration=8ba")
    for average in ("ema", "net"):
        resumed, _ = load_weights(tmp_path / f"run/weights/ba0000008-{average}")
        straight, _ = load_weights(tiny_run / f"weights/ba0000008-{average}")
        for a, b in zip(resumed.state_dict().values(), straight.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    assert last_rows(tmp_path / "run") == last_rows(tiny_run)


FULL = """
mount -t tmpfs -o size=5m none "$1"
saved="$1/checkpoints/ep0-ba4/rank0.json"
(until [ -e "$saved" ]; do sleep 0.01; done; cat /dev/zero > "$DISK/other") 2>/dev/null &
shift
"$@"
status=$?
rm "$DISK/other"
"$@" && cp -r "$DISK/train.jsonl" "$DISK/weights" "$KEPT" && exit $status
"""


@pytest.mark.skipif(not NAMESPACES, reason="needs user namespaces")
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_the_restart_is_exact(digits, tiny_run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["recipe/train.py", "yamls/digits.yaml", f"data.local={digits}", *TINY, f"folder={disk}"]
    command += ["duration=8ba", "save_interval=4ba", "export_interval=4ba", "export=[ema,net]"]
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL, "sh", disk, sys.executable, *command, "log.interval=1"],
        cwd=ROOT,
        env={**os.environ, "DISK": str(disk), "KEPT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1, process.stderr
    assert re.search(rf"^storage error: cannot write {disk}/\S+: No space left", process.stderr, re.MULTILINE)
    assert "Traceback" not in process.stderr
    assert "resumed at step 4 from" in process.stderr
    assert last_rows(tmp_path) == last_rows(tiny_run)
    for average in ("ema", "net"):
        name = f"weights/ba0000008-{average}.safetensors"
        assert (tmp_path / name).read_bytes() == (tiny_run / name).read_bytes()


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
        (SafetensorError("Error while serializing: I/O error: No space left on device"), "No space left"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), "PytorchStream"),
        (CheckpointException("", {0: (OSError("No space left on device"), None)}), "No space left"),
    ],
)
def test_every_librarys_error_for_a_full_disk_is_one_line_that_names_the_file(error, answer):
    with pytest.raises(StorageError, match=f"^cannot write here: {answer}"), writing("here"):
        raise error


def test_other_errors_while_writing_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^CUDA out of memory"), writing("here"):
        raise RuntimeError("CUDA out of memory")


def test_half_a_line_of_the_log_makes_way_for_the_next_one(tmp_path):
    log = tmp_path / "log"
    append_line(log, "1")
    append_line(log, "2")
    log.write_bytes(log.read_bytes() + b'{"step": 3, "los')
    append_line(log, "3")
    assert log.read_text() == "1\n2\n3\n"
    log.write_bytes(b'{"st')
    append_line(log, "1")
    assert log.read_text() == "1\n"


def test_a_finished_run_says_so_and_changes_nothing(digits, tiny_run):
    before = (tiny_run / "weights/ba0000008-ema.safetensors").stat().st_mtime_ns
    command = ["recipe/train.py", "yamls/digits.yaml", f"data.local={digits}", *TINY]
    process = run(*command, f"folder={tiny_run}", "duration=8ba", "save_interval=4ba", "export=[ema,net]")
    assert "already finished at step 8" in process.stdout + process.stderr
    assert (tiny_run / "weights/ba0000008-ema.safetensors").stat().st_mtime_ns == before


def test_a_run_begins_with_weights_and_resumes_without_them(digits, tiny_run, tmp_path):
    shutil.copytree(tiny_run / "weights", tmp_path / "weights")
    command = ["recipe/train.py", "yamls/digits.yaml", f"data.local={digits}", *TINY, "save_interval=2ba"]
    command += ["objective.name=imf", "objective.guidance=1.25", f"init_from={tmp_path}/weights"]
    command += [f"folder={tmp_path}/run", "export=[net]", "log.interval=1"]
    said = run(*command, "duration=2ba")
    assert "ba0000008-ema (tvm, step 8)" in said.stdout + said.stderr
    shutil.rmtree(tmp_path / "weights")
    said = run(*command, "duration=4ba")
    assert "resumed at step 2" in said.stdout + said.stderr
    said = run(*command, "duration=4ba", f"folder={tmp_path}/other", check=False)
    assert "init_from" in said.stderr
    assert "Traceback" not in said.stderr


def test_two_ranks_take_the_same_samples_and_reach_the_same_weights(digits, tiny_run, tmp_path):
    run(
        *("recipe/train.py", "yamls/digits.yaml", f"data.local={digits}", *TINY, f"folder={tmp_path}/run"),
        *("duration=8ba", "save_interval=8ba", "log.interval=1", "export=[ema,net]"),
        ranks=2,
    )
    one, two = last_rows(tiny_run), last_rows(tmp_path / "run")
    assert one.keys() == two.keys()
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-3)
    a, _ = load_weights(tiny_run / "weights/ba0000008-net")
    b, _ = load_weights(tmp_path / "run/weights/ba0000008-net")
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_wandb_logs_offline_when_asked_to(digits, tmp_path):
    command = [
        "recipe/train.py",
        "yamls/digits.yaml",
        f"data.local={digits}",
        *TINY,
        f"folder={tmp_path}/run",
    ]
    run(*command, "duration=2ba", "log.wandb=offline")
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


def test_a_network_without_classes_trains_on_labelled_data_and_its_labels_change_nothing(digits):
    class Shifted(Recorder):
        def after_dataloader(self, state, logger):
            super().after_dataloader(state, logger)
            state.batch["label"] = (state.batch["label"] + 1) % 10

    _, recorder = fit(digits, 3, "model.classes=0")
    model, other = fit(digits, 3, "model.classes=0", recorder=Shifted())
    assert model.net.y_embedder.embedding_table.weight.shape[0] == 1
    assert len(recorder.rows) == 3
    assert recorder.rows == other.rows


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle.width=3"], "modle"),
        (["model.width=wide"], "model.width"),
        (["model.heads=3"], "model.heads: 3 does not divide model.width 128"),
        (["model.patch=3"], "model.patch: 3 does not divide model.size 8"),
        (["objective.guidance=0"], "objective.guidance"),
        (["data.local=nowhere"], "data.local: nowhere is not a folder"),
        (["data.local=yamls"], "data.local: yamls holds no manifest.json"),
        (["model.channels=3"], "model.channels: 3 differs from the 1"),
        (["precision=fp8"], "precision: 'fp8' must be 'fp32' or 'amp_bf16'"),
        (["duration"], "duration: overrides are written key=value"),
        (["data.batch_size=0"], "data.batch_size: 0"),
        (["data.normalize={mean: [1.0]}"], "data.normalize"),
        (["data.normalize={mean: [1.0], std: [x]}"], "data.normalize"),
        (["data.normalize={mean: [1.0, 2.0], std: [1.0, 2.0]}"], "data.normalize: needs 1 values"),
        (["data.normalize={mean:[1.0]}"], "data.normalize={mean:[1.0]}: not valid YAML"),
        (["duration=soon"], "duration: 'soon' must be a time"),
        (["save_interval=10"], "save_interval: 10 must be a time"),
        (["optimizer.warmup=3"], "optimizer.warmup: 3 must be a time"),
        (
            ["fork_from=http://x/ep0-ba1"],
            "fork_from: 'http://x/ep0-ba1' must be a local path or a place in s3://",
        ),
        (["log.wandb=yes"], "log.wandb"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_the_key(digits, overrides, message, capsys):
    from recipe.train import main

    text = refusal(SystemExit, main, ["yamls/digits.yaml", f"data.local={digits}", *overrides])
    assert text.startswith("config error: ")
    assert message in text
    assert "\n" not in text


OTHER = """
import atexit, json, sys

OURS = ("recipe", "eval", "kernels", "storage", "streaming_convert")
def report():
    files = {m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in OURS and m.__file__}
    print(json.dumps(sorted(files)), file=sys.stderr)

atexit.register(report)
"""


@pytest.mark.parametrize("script", ["recipe/train.py", "eval/sweep.py"])
def test_a_script_runs_the_code_of_its_own_checkout(tmp_path, script):
    """From another folder, with another checkout's packages on the path like those that are installed."""
    copy, site = tmp_path / "copy", tmp_path / "site"
    for package in ("recipe", "eval", "kernels", "storage", "streaming_convert", "yamls"):
        shutil.copytree(ROOT / package, copy / package)
    site.mkdir()
    (site / "sitecustomize.py").write_text(OTHER)
    process = subprocess.run(
        [sys.executable, copy / script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{site}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    files = json.loads(process.stderr.splitlines()[-1])
    assert len(files) > 10
    assert [file for file in files if not file.startswith(str(copy))] == []
