"""What a run says: lines of progress, the bar's length, what a resume changes, where the results are."""

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from composer.core import Time, Timestamp

from recipe import console
from recipe.checkpoints import Resume, dataset_facts
from recipe.config import TrainConfig, load_config
from recipe.console import Bar, ConsoleLines, summary
from recipe.preemption import Preemption
from recipe.train import build_trainer, changes, differences
from storage.manifest import read_manifest
from tests.conftest import TINY, findings


def config_of(digits, folder, *more):
    given = [f"data.local={digits}", f"folder={folder}", *TINY, "grid.interval=null", *more]
    return load_config(TrainConfig, "yamls/digits.yaml", given)


def state_at(step):
    """A state of composer's at a step of a run of 60, in mid-epoch."""
    return SimpleNamespace(
        timestamp=Timestamp(batch=step, batch_in_epoch=step),
        max_duration=Time(60, "ba"),
        train_dataloader=range(100),
        dataloader_len=100,
        dataloader_label="train",
    )


def test_a_line_comes_at_the_first_interval_and_then_so_often(digits, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "recipe.train")
    lines = ConsoleLines(config_of(digits, tmp_path, "log.interval=5", "duration=60ba"))
    lines.log_metrics({"loss/train/total": 1.23456, "train/learning_rate": 1e-3})
    for step in range(1, 21):
        monkeypatch.setattr(console.time, "monotonic", lambda now=4.0 * step: now)
        lines.batch_end(state_at(step), None)
    assert caplog.messages == [  # 16 samples in 4 seconds; at step 10 it is 20 seconds later
        f"digits: step {step} of 60, loss 1.2346, learning rate 0.001, 4 samples/s, {left} left"
        for step, left in ((5, "0:03:40"), (10, "0:03:20"), (15, "0:03:00"), (20, "0:02:40"))
    ]
    for step in range(21, 41):
        monkeypatch.setattr(console.time, "monotonic", lambda now=80 + 1.0 * (step - 20): now)
        lines.batch_end(state_at(step), None)
    assert [message.split(",")[0] for message in caplog.messages[4:]] == ["digits: step 40 of 60"]


def test_a_resumed_bar_has_the_length_of_the_new_duration_and_no_state(capsys):
    with open(os.devnull, "w") as stream:
        bar = Bar(stream)
        bar.load_state_dict({"train_pbar": {"n": 30, "total": 40}, "eval_pbar": None})
        bar.fit_start(state_at(30), None)
        assert (bar.train_pbar.pbar.total, bar.train_pbar.pbar.n, bar.train_pbar.pbar.initial) == (60, 30, 30)
        assert bar.state_dict() == {}
        bar.close(None, None)


def test_settings_that_differ_are_named():
    before = {"a": 1, "b": {"c": [1], "d": None}, "gone": 3}
    assert differences(before, {"a": 1, "b": {"c": [2], "d": "x"}, "new": 4}) == [
        "b.c [1] => [2]",
        "b.d None => x",
    ]


def test_a_resume_says_which_settings_changed_and_how_the_rate_jumps(digits, tmp_path):
    decay = ["optimizer.schedule=linear", "optimizer.lr=0.01", "data.batch_size=256"]
    config = config_of(digits, tmp_path, *decay, "duration=4ba", "save_interval=4ba")
    manifest = read_manifest(str(digits))
    trainer = build_trainer(config, findings(config), None, Preemption(None))
    trainer.fit()
    trainer.close()
    receipt = json.loads((tmp_path / "checkpoints/ep0-ba4/rank0.json").read_text())
    assert (receipt["settings"], receipt["dataset"]) == (asdict(config), dataset_facts(manifest))
    said = summary(config, manifest, 4)
    assert f"  weights: {tmp_path}/weights/ba0000004-ema\n" in said
    draw = shlex.split(said.partition("next, to draw samples: ")[2].splitlines()[0])
    assert Path(draw[0]).exists() and draw[1:4] == ["-m", "eval.sample", f"{tmp_path}/weights/ba0000004-ema"]
    load = str(tmp_path / "checkpoints/ep0-ba4/rank0.pt")
    longer = config_of(digits, tmp_path, *decay, "duration=8ba", "save_interval=4ba")
    trainer = build_trainer(longer, findings(longer), Resume(load, load, None), Preemption(None))
    assert list(changes(trainer, longer, receipt["settings"])) == [
        "changed since then: duration 4ba => 8ba",
        "the learning rate jumps from 0.0025 at step 3 to 0.005 at step 4",
    ]
    assert list(changes(trainer, config, receipt["settings"])) == []
    trainer.close()
