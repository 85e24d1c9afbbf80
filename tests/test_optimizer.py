"""The learning rate of every step: from the settings alone, on a straight run and after a resume."""

import json
import math

import pytest

from recipe.checkpoints import Resume
from recipe.config import OptimizerConfig, TrainConfig, load_config
from recipe.optimizer import in_steps, learning_rate, rate_of_step
from recipe.preemption import Preemption
from recipe.train import build_trainer
from tests.conftest import TINY, findings


def rates(schedule, warmup, duration):
    config = OptimizerConfig(lr=0.5, schedule=schedule)
    return [learning_rate(config, step, warmup, duration) for step in range(duration)]


def test_the_first_step_of_a_warm_up_counts_and_its_last_has_the_full_rate():
    assert rates("constant", 4, 6) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert rates("constant", 0, 3) == [0.5, 0.5, 0.5]


def test_schedules_fall_from_the_full_rate_to_zero_where_the_run_ends():
    assert rates("linear", 2, 6) == [0.25, 0.5, 0.5, 0.375, 0.25, 0.125]
    assert rates("cosine", 0, 4) == pytest.approx(
        [0.5, 0.25 + math.sqrt(0.5) / 4, 0.25, 0.25 - math.sqrt(0.5) / 4]
    )
    for schedule in ("linear", "cosine"):
        assert learning_rate(OptimizerConfig(schedule=schedule), 6, 2, 6) == 0
        assert learning_rate(OptimizerConfig(schedule=schedule), 9, 2, 6) == 0


def test_times_in_steps():
    assert [in_steps(time, 7, 256) for time in ("12ba", "3ep", "512sp", "513sp")] == [12, 21, 2, 3]


def test_a_warmup_has_any_unit():
    overrides = ["data.batch_size=256", "optimizer.lr=0.01", "duration=6ba"]
    for warmup in ("2ba", "512sp", "500sp"):
        config = load_config(TrainConfig, "yamls/digits.yaml", [*overrides, f"optimizer.warmup={warmup}"])
        assert [rate_of_step(config, step, 7) for step in range(3)] == [0.005, 0.01, 0.01]


def logged_rates(digits, folder, *overrides, load_path=None):
    """Steps and rates in train.jsonl of a run in this process."""
    overrides = [
        f"data.local={digits}",
        f"folder={folder}",
        "log.interval=1",
        "grid.interval=null",
        *overrides,
    ]
    config = load_config(TrainConfig, "yamls/digits.yaml", [*TINY, "data.batch_size=256", *overrides])
    resume = load_path and Resume(load_path, load_path, None)
    trainer = build_trainer(config, findings(config), resume, Preemption(None))
    used = []
    step = trainer.state.optimizers[0].step
    trainer.state.optimizers[0].step = lambda *a, **k: (
        used.append(trainer.state.optimizers[0].param_groups[0]["lr"]),
        step(*a, **k),
    )[1]
    trainer.fit()
    trainer.close()
    lines = (folder / "train.jsonl").read_text().splitlines()[-len(used) :]
    assert [json.loads(line)["train/learning_rate"] for line in lines] == used
    return used


def test_every_step_has_its_rate_also_after_a_resume_with_other_settings(digits, tmp_path):
    decay = ["optimizer.lr=0.01", "optimizer.schedule=linear", "optimizer.warmup=2ba"]
    straight = logged_rates(digits, tmp_path / "a", *decay, "duration=6ba", "save_interval=3ba")
    assert straight == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    half = f"{tmp_path}/a/checkpoints/ep0-ba3/rank0.pt"
    assert logged_rates(digits, tmp_path / "b", *decay, "duration=6ba", load_path=half) == straight[3:]
    longer = logged_rates(digits, tmp_path / "c", *decay, "duration=1ep", load_path=half)
    assert longer == pytest.approx([0.008, 0.006, 0.004, 0.002])  # an epoch has 7 steps
    other = ["optimizer.lr=0.02", "optimizer.warmup=8ba", "duration=6ba"]
    assert logged_rates(digits, tmp_path / "d", *other, load_path=half) == pytest.approx(
        [0.01, 0.0125, 0.015]
    )
