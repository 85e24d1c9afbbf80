"""Weights, sampling and sweeps, on a short real run."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from eval.report import read_log
from eval.sample import Generator, grid, spread_labels
from eval.sample import main as sample_main
from eval.sweep import main as sweep_main
from eval.sweep import read_results
from recipe.dit import DiT, DiTConfig
from recipe.weights import load_weights, read_facts, save_weights
from tests.conftest import run

FACTS = {"method": {"objective": "tvm", "scaled": True, "guidance": [1.0]}, "data": {}, "average": "ema"}


def test_weights_come_back_as_they_were_with_readable_facts(tmp_path):
    net = DiT(DiTConfig(size=4, channels=2, classes=3, width=16, depth=1, heads=2))
    description = save_weights(tmp_path / "w", net.state_dict(), net.config, {**FACTS, "step": 3})
    facts = json.loads(description.read_text())
    assert (facts["step"], facts["model"]["width"], facts["method"]["objective"]) == (3, 16, "tvm")
    assert set(facts) >= {"commit", "sha256", "data", "average"}
    loaded, _ = load_weights(tmp_path / "w.safetensors")
    for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_missing_or_foreign_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors does not exist"):
        read_facts(tmp_path / "w")
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "w.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        read_facts(tmp_path / "w")


def test_an_image_depends_on_its_seed_and_label_alone(tiny_run):
    generator = Generator(tiny_run / "weights/ba0000008-net")
    label, seeds = torch.arange(10), torch.arange(10) + 100
    together = generator(label, seeds, 2, 1.25)
    assert together.dtype == torch.uint8
    batches = list(generator.batches(label, seeds, 2, 1.25, batch_size=3, rank=1, world=2))
    assert [b[1].tolist() for b in batches] == [[3, 4, 5], [9]]
    for images, part in batches:
        difference = (images.int() - together[part].int()).abs()
        assert difference.max() <= 1  # float32 products depend on the batch size in the last bit
    assert not torch.equal(generator(label, seeds + 1, 2, 1.25), together)


def test_the_sampler_at_the_command_line_writes_a_grid(tiny_run, tmp_path):
    weights, out = tiny_run / "weights/ba0000008-ema", tmp_path / "grid.png"
    options = ["--nfe", 1, "--w", 2, "--labels", "0,1,none", "--seed", 0, "--columns", 4, "--scale", 2]
    run("-m", "eval.sample", weights, *options, "--out", out)
    assert Image.open(out).size == (2 + 4 * 18, 2 + 3 * 18)


@pytest.mark.parametrize("bad", [["--labels", "11"], ["--nfe", "0"], ["--w", "0"]])
def test_bad_sampling_options_are_named(tiny_run, bad, capsys):
    with pytest.raises(SystemExit):
        sample_main([str(tiny_run / "weights/ba0000008-ema"), *bad])
    assert f"{bad[0]}: {bad[1]}" in capsys.readouterr().err


def test_labels_are_spread_like_the_real_ones():
    assert Counter(spread_labels([3, 0, 2], 5).tolist()) == {0: 3, 2: 2}
    assert Counter(spread_labels([100, 300], 40).tolist()) == {0: 10, 1: 30}
    assert spread_labels([], 3).tolist() == [0, 0, 0]


def test_a_grid_holds_every_image():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2)
    picture = grid(images, columns=3, gap=1)
    assert picture.shape == (7, 10, 3)
    assert picture[1, 1, 0] == 0
    assert picture[4, 4, 0] == 4
    assert (picture[4, 7] == 255).all()


def test_an_interrupted_sweep_continues_and_ends_with_the_same_table(tiny_run, digits, tmp_path):
    command = ["eval/sweep.py", "yamls/eval/digits.yaml", f"folder={tmp_path}/sweep", f"reference={digits}"]
    command += [f"weights=[{tiny_run}/weights]", "averages=[ema,net]", "nfe=[1,2]", "w=[1.25]", "samples=200"]
    run(*command)
    results = tmp_path / "sweep/results.jsonl"
    complete, table = results.read_text(), (tmp_path / "sweep/results.md").read_text()
    rows = read_results(results)
    assert len(rows) == 8
    wanted = {"nfe", "w", "frechet_distance", "class_agreement", "floor", "objective", "weights", "seconds"}
    assert wanted <= set(rows[0])
    assert all(np.isfinite(r["frechet_distance"]) and r["classifier_accuracy"] > 0.98 for r in rows)
    assert (tmp_path / "sweep/samples.png").stat().st_size > 1000
    assert (tmp_path / "sweep/metrics.png").stat().st_size > 1000
    results.write_text(complete[: len(complete) * 2 // 3])
    run(*command)
    assert (tmp_path / "sweep/results.md").read_text() == table
    again = read_results(results)
    assert again[:5] == rows[:5]
    assert [r["frechet_distance"] for r in again] == [r["frechet_distance"] for r in rows]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights=[nowhere]", "nowhere"),
        ("nfe=[0]", "nfe"),
        ("averages=[raw]", "average in ['raw']"),
        ("w=[-1]", "w: [-1"),
    ],
)
def test_sweep_settings_are_checked(tiny_run, digits, tmp_path, override, message):
    overrides = [f"weights=[{tiny_run}/weights]", f"reference={digits}", f"folder={tmp_path}", override]
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        sweep_main(["yamls/eval/digits.yaml", *overrides])
    assert str(error.value).startswith("config error: ")


def test_the_log_keeps_the_last_line_of_a_repeated_step(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 2, "a": 3.0}\n')
    assert read_log(path)["a"].tolist() == [1.0, 3.0]
