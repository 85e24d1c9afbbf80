"""`make gpu` without one: every stage at tiny size, what is resumed, stopped and reported."""

import json
import re

import pytest

from benchmarks import environment, gpu
from benchmarks.step import make_step, predicted
from recipe import plan
from recipe.config import TrainConfig, load_config
from recipe.muon import Muon
from tests.conftest import TINY, run

XL = ["data.batch_size=32", "parallel.fsdp2=false"]


def found(out, stage, **result):
    """A stage's file as this checkout leaves it."""
    (out / f"{stage}.json").write_text(
        json.dumps({"page": [], "missed": [], **environment(), "minutes": 1, **result})
    )


def forked(*arguments, expect=0):
    """`gpu.python` without its imports; a launcher's command as its one rank."""
    launcher = ("-m", "composer.cli.launcher", "-n", "1")
    alone = arguments[:4] != launcher
    process = run(*(arguments if alone else arguments[4:]), check=False, ranks=None if alone else 1)
    assert process.returncode == expect, process.stderr


def test_the_optimizer_that_is_timed_is_the_configuration_s(monkeypatch):
    taken = []
    monkeypatch.setattr(Muon, "step", taken.append)
    make_step(load_config(TrainConfig, "yamls/digits.yaml", [*TINY, "optimizer.name=muon"]), "cpu")()
    assert len(taken) == 1


def test_stages_at_tiny_size(tmp_path, monkeypatch):
    size = gpu.TINY._replace(minutes=0.1, train=(*gpu.TINY.train, "log.interval=1"))
    gpu.run_here("attention", size, tmp_path)  # which Triton's interpreter wants for itself
    monkeypatch.setattr(gpu, "python", forked)
    for stage in ("step", "emoji_data", "emoji_tvm"):
        gpu.run_here(stage, size, tmp_path)
    page = gpu.report(tmp_path, {})
    text = (tmp_path / "report.md").read_text()
    assert page == [f"{stage}: not run" for stage in ("correctness", "emoji_flow_matching", "emoji_agree")]
    assert "| attention, B, H, N, D = 1, 2, 33, 16: error |" in text
    assert "| pictures |  | 1797 |  |" in text
    assert re.search(r"\| step, tvm, s \| not predicted \| \d\.\d{3} ", text)
    result = gpu.result_of(tmp_path, "emoji_tvm")
    assert list(result["frechet_distance"]) == ["1", "2"]
    assert 0.55 < result["floor_H"] < 0.7
    assert result["skipped_steps"] == 0
    log = (tmp_path / "emoji_tvm_train.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == result["steps"] > 0


def test_kernels_that_are_wrong_are_counted(tmp_path, monkeypatch):
    suite = '<testsuite tests="121" skipped="2" failures="{}" errors="0"/>'

    def python(*_, **__):
        (tmp_path / "correctness.xml").write_text(f"<testsuites>{suite.format(wrong)}</testsuites>")

    monkeypatch.setattr(gpu, "python", python)
    for wrong, missed in ((0, []), (1, ["1 of 119 tests failed"])):
        page = [("kernels' tests that failed", "", f"{wrong} of 119", "0")]
        assert gpu.correctness(gpu.TINY, tmp_path) == {"page": page, "missed": missed}


def test_predicted_stands_beside_measured(tmp_path, monkeypatch):
    where = {**environment(), "device": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(gpu, "environment", lambda: where)
    config = load_config(TrainConfig, "yamls/imagenet256_w2.yaml", XL)
    guess = predicted(config, where["device"])
    flops = 32 * plan.step_flops(config.model, config.objective)
    assert guess["seconds"] == pytest.approx(flops / 989e12 / 0.45, rel=0.2)
    assert predicted(config, "NVIDIA L4") == {}
    variants = {"tvm": {"predicted": guess, "seconds": 0.31, "peak_gib": 50.0, "share_of_peak": 0.25}}
    variants["tvm, eager"] = {"predicted": guess, "error": "out of memory"}
    page = list(gpu.step_rows(variants))
    found(tmp_path, "step", **where, page=page, missed=["tvm, eager: out of memory"])
    times = {"ours": {"forward_ms": 0.6, "both_ms": 2.0}, "flash SDPA": {"forward_ms": 0.2, "both_ms": 0.5}}
    row = {"size": [32, 18, 256, 64], "error": 4e-3, "tolerance": 1e-2, "times": times}
    found(tmp_path, "attention", **where, page=list(gpu.attention_rows(row)))
    assert "step: tvm, eager: out of memory" in gpu.report(tmp_path, {"emoji_data": "no fonts"})
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# NVIDIA H100 80GB HBM3, ")
    assert f"| step, tvm, s | {guess['seconds']:.3f} | 0.310 |" in text
    assert f"| step, tvm, eager, peak GiB | {guess['peak_gib']:.1f} | not measured |" in text
    assert (
        "N, D = 32, 18, 256, 64: forward, ms | not predicted | 0.600 (3.00 of flash SDPA) | 3.2 of flash"
        in text
    )
    assert "* emoji_data: no fonts" in text


def test_only_what_is_missing_or_of_another_commit_is_run(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu, "run_apart", lambda stage, *_: ran.append(stage) or "stopped")
    words = ["--tiny", "--out", str(tmp_path)]
    found(tmp_path, "correctness")
    found(tmp_path, "attention")
    found(tmp_path, "step", commit="another")
    assert gpu.main(words) == 1
    assert ran == ["step", "emoji_data", "emoji_tvm", "emoji_flow_matching", "emoji_agree"]
    assert "step: stopped" in capsys.readouterr().out
    ran.clear()
    found(tmp_path, "correctness", missed=["1 of 3 tests failed"])
    assert gpu.main(words) == 1
    assert not ran  # the speed of wrong kernels is of no interest
    assert gpu.main([]) == 2


def test_a_stage_that_fails_or_hangs_is_named(tmp_path, monkeypatch):
    reason = gpu.run_apart("nonsense", tmp_path, True)
    assert "error: 'nonsense' is not one of correctness, attention" in reason
    assert reason.endswith("; see nonsense.log")
    monkeypatch.setattr(gpu, "LIMIT", 0.1)
    assert gpu.run_apart("correctness", tmp_path, True) == "still ran after 0.1 s"
