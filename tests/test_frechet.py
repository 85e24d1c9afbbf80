"""The objective `frechet`: its gradient, its value, its convergence, and what a run of it keeps and says."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.step import blended_distance
from eval.export import read_checkpoint
from recipe.checkpoints import RUN, check_identity
from recipe.config import ConfigError, TrainConfig, load_config
from recipe.finish import check_condition, joint_match, make_match
from recipe.metrics import frechet_distance
from recipe.objectives.frechet import Match, condition, round_through, weigh
from recipe.reference import MDSImages
from recipe.text import TextConfig, byte_tokens, summary
from recipe.weights import read_facts
from storage import Folder
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


def labelled(count, seed, classes=3):
    """Features (count, 8) that lean towards their labels, and the labels as conditions."""
    told = condition(torch.arange(count) % classes, None, classes)
    return gaussian(count, 8, seed) + told @ torch.arange(8.0 * classes).double().reshape(classes, 8), told


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_joint_gradient_is_that_of_the_distance_of_blended_pairs(share):
    """share: of samples without label, which stand with the mean condition, as often among real images."""
    features, told = labelled(1200, 1)
    mean, covariance, k = weigh(*moments(torch.cat([features, told], 1)), 8, 0.7, share)
    one = Match(None, mean, covariance, k)
    every = [x.repeat_interleave(4, 0) for x in (features, told)]
    pairs = one.join(*every, torch.arange(4800) % 4 < 4 * share)
    for found, expected in zip((mean, covariance), moments(pairs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if not share:
        spread = covariance.diagonal()
        assert (spread[8:].sum() / spread[:8].sum()).sqrt().item() == pytest.approx(0.7)

    (batch, told), decay = labelled(32, 3), 0.9
    before = one.join(*labelled(900, 2), torch.arange(900) % 4 < 4 * share)
    batch.requires_grad_()
    joined = one.join(batch, told, torch.arange(32) % 4 < 4 * share)
    raw = before.mean(0), before.T @ before / len(before)
    (expected,) = torch.autograd.grad(blended_distance(joined, *raw, mean, one.root, decay), batch)
    one.add(before)
    one.fold(0)
    one.add(joined.detach())
    one.fold(decay)
    one.refresh()
    joined = one.join(batch, told, torch.arange(32) % 4 < 4 * share)
    (found,) = torch.autograd.grad(one.cost(joined).mean(), batch)
    assert ((1 - decay) * found - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize(
    ("joint", "begin", "end"), [(None, -1, -1), (0.5, 0.3, 1), (0.5, -1, -1), (2.0, -1, 1)]
)
def test_the_joint_form_pulls_classes_to_their_places_and_above_1_mends_whole_swaps(joint, begin, end):
    """A generator puts two classes at `begin` times where they belong, and comes to `end` times that."""
    label, belongs = torch.arange(1000) % 2, torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    noise, told = 0.1 * gaussian(1000, 2, 0), condition(label, None, 2)
    real = torch.cat([belongs[label] + noise, told], 1)
    one = Match(None, *(moments(real[:, :2]) if joint is None else weigh(*moments(real), 2, joint, 0.0)))
    places = (begin * belongs + torch.tensor([[0.0, 0.05], [0.0, 0.0]])).requires_grad_()
    optimizer, distances = torch.optim.Adam([places], 0.1), []
    for _ in range(80):
        features = places[label] + noise
        seen = features if joint is None else one.join(features, told, label < 0)
        one.add(seen)
        one.fold(0)
        one.refresh()
        distances.append(one.distance.item())
        optimizer.zero_grad()
        one.cost(seen).mean().backward()
        optimizer.step()
    torch.testing.assert_close(places.detach(), end * belongs, rtol=0.05, atol=0)
    assert (distances[0] > 0.5) == (joint is not None)
    assert (distances[-1] < 0.01) == (joint is None or end == 1)


def measured(config, digits, **model):
    """The match of the digits with names that a joint run would make."""
    config.model = replace(config.model, **model)
    folder = digits.parent / "named/train"
    return make_match("pixels", str(folder), config, MDSImages(folder).manifest, torch.device("cpu"))


JOINT = ["objective.name=frechet", "objective.features.pixels=x", "init_from=x", "objective.joint=2"]


def test_a_reference_whose_labels_or_embeddings_mean_something_else_is_refused():
    config = load_config(TrainConfig, "yamls/digits.yaml", JOINT)
    names = [str(i) for i in range(10)]
    data = SimpleNamespace(class_names=names, text={"sha256": "a"})
    images = SimpleNamespace(folder="real", manifest=data)
    check_condition(images, config.model, data)
    images.manifest = SimpleNamespace(class_names=["1", "0", *names[2:]], text={"sha256": "b"})
    with pytest.raises(
        ValueError, match="^real: class 0 is '1', '0' in the data; joint needs the same names"
    ):
        joint_match(images, SimpleNamespace(num_features=1), config.objective, config.model, data)
    text = TextConfig(encoder="dataset", tokens=8, width=32)
    config.model = replace(config.model, classes=0, text=text)
    with pytest.raises(ValueError, match="^real: its text encoder has sha256 b, that of the data a; joint"):
        check_condition(images, config.model, data)


def test_real_images_are_measured_with_their_labels_or_captions(digits):
    config = load_config(TrainConfig, "yamls/digits.yaml", JOINT)
    names = MDSImages(digits.parent / "named/train")
    rows = names.rows(torch.arange(len(names)))
    pixels = torch.stack([torch.tensor(row["image"]) for row in rows]).flatten(1).double() / 32
    label = torch.tensor([int(row["label"]) for row in rows])
    text = TextConfig(tokens=24)
    prompts = byte_tokens([row["caption"] for row in rows], text.tokens)[0]
    for told, model in (
        (torch.eye(10).double()[label], {}),
        (summary(prompts), {"classes": 0, "text": text}),
    ):
        one = measured(config, digits, **model)
        offset = torch.cat([pixels, one.k * told], 1) - one.mean
        torch.testing.assert_close(offset.mean(0), torch.zeros_like(one.mean), atol=1e-9, rtol=0)
        torch.testing.assert_close(one.root @ one.root.T, offset.T.cov(), atol=1e-7, rtol=1e-7)
        spread = offset.var(0)
        assert (spread[192:].sum() / spread[:192].sum()).sqrt().item() == pytest.approx(2)
    with pytest.raises(ValueError, match="train has 10 classes, the network 0"):
        measured(config, digits, classes=0, text=None)
    with pytest.raises(ValueError, match="objective.joint needs more than one label or caption"):
        weigh(*moments(torch.cat([pixels, 0 * label[:, None]], 1)), 192, 1.0, 0.0)


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
    config = load_config(TrainConfig, "yamls/digits.yaml", [*command[2:], "objective.joint=1"])
    with pytest.raises(ConfigError, match="^objective.joint: 1.0 differs from the None of the checkpoints"):
        check_identity(config, Folder(f"{tmp_path}/run/checkpoints"), [RUN])
