"""The objective `frechet`: its gradient, its value, its convergence, and what a run of it keeps and says."""

import shutil

import pytest
import torch

from benchmarks.step import blended_distance
from eval.export import read_checkpoint
from recipe.metrics import frechet_distance
from recipe.objectives.frechet import Match, round_through
from recipe.weights import read_facts
from tests.conftest import EACH, TINY, run


def gaussian(count, size, seed, rank=None):
    """Correlated features (count, size), of a rank, around a mean that is not zero."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or size, size, generator=g, dtype=torch.float64) / (rank or size) ** 0.5
    return torch.randn(count, rank or size, generator=g, dtype=torch.float64) @ mix + seed


def moments(features):
    """Mean and covariance of a population."""
    return features.mean(0), features.T.cov(correction=0)


def matched(real, samples):
    one = Match(None, *moments(real))
    one.add(samples)
    one.fold(0)
    one.refresh()
    return one


CASES = {
    "plain": ({}, {}),
    "few samples": ({}, {"count": 5}),
    "flat samples": ({}, {"rank": 5}),
    "flat real": ({"rank": 5}, {}),
    "both flat": ({"rank": 4}, {"rank": 6}),
}


@pytest.mark.parametrize("size", [8, 64, 300])
@pytest.mark.parametrize("case", CASES)
def test_the_mean_of_the_loss_is_the_frechet_distance(size, case):
    real_options, options = CASES[case]
    real = gaussian(1000, size, 1, **real_options)
    samples = gaussian(options.get("count", 900), size, 2, options.get("rank"))
    one = matched(real, samples)
    expected = frechet_distance(*moments(samples), *moments(real))
    assert one.distance.item() == pytest.approx(expected, rel=1e-9)
    assert one.cost(samples).mean().item() == pytest.approx(expected, rel=1e-9)
    assert (one.unreached > 1e-6) == (case in ("few samples", "flat samples"))


@pytest.mark.parametrize("size", [8, 64, 300])
@pytest.mark.parametrize("rank", [None, 5])
def test_the_gradient_is_that_of_the_distance_of_blended_moments(size, rank):
    """rank: of the real images' covariance, where it is singular."""
    real, before, decay = gaussian(1000, size, 1, rank), gaussian(900, size, 2), 0.9
    batch = gaussian(32, size, 3).requires_grad_()
    raw = before.mean(0), before.T @ before / len(before)
    mean, covariance = moments(real)
    values, vectors = torch.linalg.eigh(covariance)
    distance = blended_distance(batch, *raw, mean, vectors * values.clamp_min(0).sqrt(), decay)
    (expected,) = torch.autograd.grad(distance, batch)
    one = matched(real, before)
    one.add(batch.detach())
    one.fold(decay)
    one.refresh()
    (found,) = torch.autograd.grad(one.cost(batch).mean(), batch)
    assert ((1 - decay) * found - expected).norm() < 1e-9 * expected.norm()


def test_rounding_is_exact_forward_and_the_identity_backward():
    values = torch.tensor([-3.2, 0.4, 77.5, 254.7, 300.0], dtype=torch.float64, requires_grad=True)
    rounded = round_through(values)
    assert rounded.tolist() == [0, 0, 78, 255, 255]
    rounded.square().sum().backward()
    assert torch.equal(values.grad, 2 * rounded.detach())


def test_a_linear_generator_of_gaussian_data_comes_to_distance_zero():
    real = gaussian(4000, 6, 1)
    torch.manual_seed(0)
    generator = torch.nn.Linear(6, 6).double()
    one = Match(None, *moments(real))
    optimizer = torch.optim.Adam(generator.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    distances = []
    for step in range(600):
        features = generator(torch.randn(512, 6, dtype=torch.float64))
        if step == 0:
            one.add(features)
            one.fold(0)
            one.refresh()
        (one.cost(features).mean() / (one.distance + 0.01)).backward()
        one.add(features)
        one.fold(0.9)
        one.refresh()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        distances.append(one.distance.item())
    assert distances[0] > 5
    weight = generator.weight.detach()
    exact = frechet_distance(generator.bias.detach(), weight @ weight.T, *moments(real))
    assert exact < 1e-2


def test_a_run_says_what_it_was_finished_on_and_resumes_without_the_weights_it_began_with(digits, tmp_path):
    for suffix in (".safetensors", ".json"):
        shutil.copy(digits.parent / f"begin{suffix}", tmp_path / f"w{suffix}")
    command = ["recipe/train.py", "yamls/digits.yaml", f"data.local={digits}", *TINY, *EACH["frechet"][:-1]]
    command = [
        word.format(digits=digits) for word in (*command, f"folder={tmp_path}/run", "save_interval=2ba")
    ]
    command.append(f"init_from={tmp_path}/w")
    run(*command, "duration=2ba")
    (tmp_path / "w.json").unlink()
    assert "resumed at step 2" in run(*command, "duration=4ba").stderr
    facts = read_facts(tmp_path / "run/weights/ba0000004-ema")
    assert facts["method"] == read_facts(digits.parent / "begin")["method"]
    assert [(one["extractor"], one["reference"]) for one in facts["finished"]] == [
        ("pixels", str(digits)),
        ("pixels:2", str(digits)),
    ]
    again = run(*command[:-1], f"init_from={tmp_path}/run/weights", "duration=1ba", f"folder={tmp_path}/two")
    assert "(tvm, step 4)" in again.stderr
    finished = read_facts(tmp_path / "two/weights/ba0000001-ema")["finished"]
    assert [one.get("steps") for one in finished] == [4, 4, None, None]
    tvm = [word for word in command[:-1] if "objective" not in word and "init_from" not in word]
    tvm += [f"folder={tmp_path}/three", "save_interval=1ba", f"init_from={tmp_path}/two/weights"]
    run(*tvm, "duration=1ba")
    shutil.rmtree(tmp_path / "two")
    assert "resumed at step 1" in run(*tvm, "duration=2ba").stderr
    kept = read_facts(tmp_path / "three/weights/ba0000002-ema")["finished"]
    assert kept == [{"steps": 1, **one} for one in finished]
    (checkpoint,) = (tmp_path / "three/checkpoints").glob("*-ba2")
    assert read_checkpoint(checkpoint / "rank0.pt", "ema")[1]["finished"] == kept
    shutil.copytree(digits, tmp_path / "other")
    with (tmp_path / "other/index.json").open("a") as file:
        file.write("\n")
    other = run(*command, "duration=6ba", f"objective.features.pixels={tmp_path}/other", check=False)
    assert "features.pixels: its weights or real images are not the checkpoint's" in other.stderr
    assert "Traceback" not in other.stderr
    other = run(*command, "duration=6ba", f"objective.features.pixels:4={digits}", check=False)
    assert "objective.features: ['pixels', 'pixels:2', 'pixels:4'] differs from" in other.stderr
    assert "Traceback" not in other.stderr
