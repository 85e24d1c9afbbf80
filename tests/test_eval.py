"""Weights, protocols and samples."""

import csv
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from eval.sample import PROTOCOLS, choose_labels, describe
from eval.sample import main as sample_main
from recipe import load
from recipe.dit import DiT, DiTConfig
from recipe.generator import Generator, great_circle, quantize
from recipe.pictures import grid
from recipe.weights import load_weights, newest_weights, read_facts, save_weights

FACTS = {"method": {"objective": "tvm", "scaled": True, "guidance": [1.0]}, "average": "ema"}
FACTS["data"] = {"column": "image", "mean": [127.5] * 2, "std": [127.5] * 2}


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


@pytest.mark.parametrize(("dtype", "most"), [("fp64", 0), ("fp32", 1)])
def test_an_image_depends_on_its_seed_and_label_alone(tiny_run, dtype, most):
    generator = Generator(tiny_run / "weights/ba0000008-net", dtype=dtype)
    label, seeds = torch.arange(10), torch.arange(10) + 100
    together = generator(label, seeds, 2, 1.25)
    assert together.dtype == torch.uint8
    batches = list(generator.batches(label, seeds, 2, 1.25, batch_size=3, rank=1, world=2))
    assert [index.tolist() for _, index in batches] == [[3, 4, 5], [9]]
    for images, index in batches:
        assert (images.int() - together[index].int()).abs().max() <= most
    assert not torch.equal(generator(label, seeds + 1, 2, 1.25), together)


def test_each_protocol_chooses_its_labels():
    counts, seeds = [3, 0, 2], torch.arange(5)
    assert choose_labels("matched", 3, counts, seeds).tolist() == [0, 0, 0, 2, 2]
    assert Counter(choose_labels("matched", 2, [100, 300], torch.arange(40)).tolist()) == {0: 10, 1: 30}
    assert Counter(choose_labels("balanced", 3, [], torch.arange(9)).tolist()) == {0: 3, 1: 3, 2: 3}
    with pytest.raises(ValueError, match="samples: 10 is not a multiple of the 3 classes"):
        choose_labels("balanced", 3, counts, torch.arange(10))
    n = 100_000
    drawn = choose_labels("tvm", 3, counts, torch.arange(n)).bincount(minlength=3) / n
    assert drawn.tolist() == pytest.approx([0.6, 0, 0.4], abs=5 * (0.24 / n) ** 0.5)
    uniform = choose_labels("adm", 3, [], torch.arange(n)).bincount(minlength=3) / n
    assert uniform.tolist() == pytest.approx([1 / 3] * 3, abs=5 * (0.23 / n) ** 0.5)
    assert choose_labels("tvm", 0, [], seeds).tolist() == [0] * 5
    with pytest.raises(
        ValueError, match="protocol tvm needs the number of training samples of each of the 3"
    ):
        choose_labels("tvm", 3, [], seeds)


def test_a_drawn_label_belongs_to_its_seed():
    many = choose_labels("tvm", 3, [3, 1, 2], torch.arange(1000))
    assert torch.equal(choose_labels("tvm", 3, [3, 1, 2], torch.arange(500, 600)), many[500:600])


def test_pixels_are_rounded_as_the_protocol_says():
    values = torch.tensor([-3.0, 0.4, 0.6, 254.7, 300.0])
    assert quantize(values, PROTOCOLS["balanced"].rounding).tolist() == [0, 0, 1, 255, 255]
    assert quantize(values, PROTOCOLS["tvm"].rounding).tolist() == [0, 0, 0, 254, 255]
    assert "pixels rounded down" in describe("tvm", 10)
    assert "10 samples (the protocol's number is 50,000)" in describe("tvm", 10)
    assert "protocol's number" not in describe("tvm", 50_000)


def test_a_grid_holds_every_image():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2)
    picture = grid(images, columns=3, gap=1)
    assert picture.shape == (7, 10, 3)
    assert picture[1, 1, 0] == 0
    assert picture[4, 4, 0] == 4
    assert (picture[4, 7] == 255).all()


def test_interpolated_noise_stays_noise():
    ends = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = great_circle(ends[0], ends[1], 5)
    torch.testing.assert_close(path[[0, -1]], ends)
    assert path.flatten(1).std(1) == pytest.approx(torch.ones(5), abs=0.05)


def test_samples_at_the_command_line(tiny_run, tmp_path):
    weights = str(tiny_run / "weights/ba0000008-net")
    options = ["--labels", "0,1,none", "--columns", "4", "--scale", "2", "--out"]
    sample_main([weights, *options, str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").size == (2 + 4 * 18, 2 + 3 * 18)
    sample_main([weights, "--interpolate", "7", *options, str(tmp_path / "way.png")])
    assert Image.open(tmp_path / "way.png").size == (2 + 4 * 18, 2 + 3 * 18)
    options = ["--samples", "20", "--batch-size", "7", "--dtype", "fp64", "--seed", "5", "--out"]
    sample_main([weights, *options, str(tmp_path / "samples.npz")])
    sample_main([weights, *options, str(tmp_path / "samples")])
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays["arr_0"].shape == (20, 8, 8, 1)
    assert arrays["arr_1"].tolist() == list(range(10)) * 2
    expected = Generator(weights, dtype="fp64")(torch.arange(20) % 10, 5 + torch.arange(20), 1, 1.25)
    assert np.array_equal(arrays["arr_0"], expected.permute(0, 2, 3, 1))
    with pytest.warns(UserWarning, match=r"w = 2 is outside what tvm was trained for, 1.25"):
        sample_main([weights, "--w", "2", "--labels", "1", "--out", str(tmp_path / "other.png")])
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files[:2]] == ["000005.png", "000006.png"]
    table = files.pop().read_text().splitlines()
    assert (len(table), table[0], table[12]) == (21, "file,seed,label,prompt", "000016.png,16,1,")
    assert np.array_equal(np.stack([np.array(Image.open(f)) for f in files]), arrays["arr_0"][..., 0])


def test_labels_by_number_and_name_with_so_many_files_each(tiny_run, tmp_path):
    net, facts = load_weights(tiny_run / "weights/ba0000008-ema")
    facts["data"]["class_names"] = ["zero", "one, too", "2", "8", *"456789"]
    facts = {k: v for k, v in facts.items() if k not in ("model", "format")}
    save_weights(tmp_path / "w", net.state_dict(), net.config, facts)
    options = ["--labels", 'zero,"one, too",none, 8', "--seed", "3", "--dtype", "fp64", "--out"]
    sample_main([str(tmp_path / "w"), *options, str(tmp_path / "some"), "--samples", "2"])
    rows = list(csv.DictReader((tmp_path / "some/samples.csv").open()))
    assert [row["label"] for row in rows] == ["0", "0", "1", "1", "none", "none", "8", "8"]  # a number first
    assert [row["seed"] for row in rows] == [str(3 + i) for i in range(8)]
    labels = torch.tensor([0, 0, 1, 1, 10, 10, 8, 8])
    expected = Generator(tmp_path / "w", dtype="fp64")(labels, 3 + torch.arange(8), 1, 1.25)
    for row, image in zip(rows, expected, strict=True):
        assert np.array_equal(np.array(Image.open(tmp_path / "some" / row["file"])), image[0])
    sample_main([str(tmp_path / "w"), *options, str(tmp_path / "x.npz"), "--samples", "2"])
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == labels.tolist()
    with pytest.raises(SystemExit):
        sample_main([str(tmp_path / "w"), "--labels", "zebra", "--out", str(tmp_path / "y.png")])


def test_a_folder_of_weights_means_its_newest_average(tiny_run, tmp_path):
    folder = tiny_run / "weights"
    assert newest_weights(folder) == folder / "ba0000008-ema.json"
    assert newest_weights(folder / "ba0000004-net") == folder / "ba0000004-net"
    assert Generator(folder).facts["step"] == 8
    with pytest.raises(FileNotFoundError, match="is a folder without weights of a run"):
        newest_weights(tmp_path)


def test_five_lines_of_python_draw_what_the_command_line_draws(tiny_run, tmp_path):
    weights = tiny_run / "weights"
    images = load(weights).sample(labels=[3, "7", "none"], n=4, nfe=2, w=1.25, seed=5)
    assert images.dtype == np.uint8 and images.shape == (12, 8, 8, 1)
    how = ["--labels", "3,7,none", "--nfe", "2", "--w", "1.25", "--seed", "5", "--samples", "4", "--out"]
    sample_main([str(weights), *how, str(tmp_path / "same")])
    files = sorted((tmp_path / "same").glob("*.png"))
    assert np.array_equal(np.stack([np.array(Image.open(file)) for file in files]), images[..., 0])
    model = load(weights, dtype="fp64")
    assert np.array_equal(model.sample(3, n=4, batch_size=3), model.sample([3, 5], n=4)[:4])
    assert len(model.sample(n=1)) == 10  # the first ten classes
    ends = model.sample(3, n=3, seed=5, interpolate=9)[[0, -1]]
    assert np.array_equal(ends, [model.sample(3, n=1, seed=seed)[0] for seed in (5, 9)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["cat"]}, "labels: 'cat' is not in 0..9, nor `none`, nor a class such as '0'"),
        ({"labels": [10]}, "labels: '10' is not in 0..9"),
        ({"labels": []}, "labels: none are given"),
        ({"prompts": "a cat"}, "prompts: these weights take none"),
        ({"n": 0}, "n: 0 must be"),
        ({"n": None}, "n: None must be a number"),
        ({"seed": None}, "seed: None must be a number"),
        ({"batch_size": None}, "batch_size: None must be a number"),
        ({"nfe": None}, "nfe: None must be a whole number"),
        (
            {"interval": (0.2, 0.6)},
            "interval: [0.2, 0.6] is for iMF on the network mit, not for these weights",
        ),
        ({"interval": (0.6, 0.2)}, "interval: [0.6, 0.2] must be two times"),
        ({"interval": 1}, "interval: 1 must be two times"),
        ({"nfe": 1.5}, "nfe: 1.5 must be a whole number from 1 to 10000"),
        ({"w": 0}, "w: 0 must be"),
        ({"w": "2"}, "w: '2' must be"),
        ({"seed": -1}, "seed: -1 must be"),
        ({"batch_size": 0}, "batch_size: 0 must be"),
        ({"interpolate": 0}, "interpolate: 0 is the seed that the rows start from"),
    ],
)
def test_a_bad_argument_is_one_line_that_names_it(tiny_run, arguments, message):
    model = load(tiny_run / "weights")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        model.sample(**arguments)


def test_what_cannot_be_loaded_is_one_line(tiny_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder without weights of a run"):
        load(tmp_path)
    with pytest.raises(ValueError, match="^dtype: 'fp16' must be one of fp32, fp64, amp_bf16$"):
        load(tiny_run / "weights", dtype="fp16")


def test_impossible_labels_and_steps_are_one_line_in_python_too(tiny_run):
    generator, seeds = Generator(tiny_run / "weights"), torch.arange(2)
    for label in (-1, 11):
        with pytest.raises(ValueError, match=f"^label: {label} must be from 0 to 10, where 10 means none$"):
            generator(torch.tensor([0, label]), seeds, 1, 1.25)
    for nfe in (0, 1.5, 10**6):
        with pytest.raises(ValueError, match=f"^nfe: {nfe} must be a whole number from 1 to 10000$"):
            generator(0 * seeds, seeds, nfe, 1.25)


def test_every_option_says_what_it_means(capsys):
    with pytest.raises(SystemExit):
        sample_main(["--help"])
    said = capsys.readouterr().out.partition("\noptions:")[2]
    options = re.split(r"^  (?=\S)", said, flags=re.MULTILINE)[1:]
    assert len(options) == 17
    for option in options:  # more than its name and what it takes
        assert len(re.sub(r"^(-\S+,? ?)+(\{.*?\}|[A-Z_]+)?( \[.*?\])?", "", option).split()) >= 3, option


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "11"], "--labels: '11' is not in 0..9"),
        (["--labels", "1,,2"], "--labels: '' is not in 0..9"),
        (["--w", "inf"], "--w: inf"),
        (["--labels", "1", "--out", "nowhere/x.png"], "--out: folder nowhere does not exist"),
        (["--samples", "10", "--out", "recipe"], "--out: recipe is not empty"),
        (["--nfe", "0"], "--nfe: 0"),
        (["--seed", "9" * 20], "--seed: 99999999999999999999 must be at most 4611686018427387904"),
        (
            ["--interpolate", "9" * 20],
            "--interpolate: 99999999999999999999 must be at most",
        ),
        (
            ["--samples", "9" * 20, "--out", "x.npz"],
            "--samples: 99999999999999999999 must be at most 1000000000",
        ),
        (["--w", "0"], "--w: 0"),
        (["--interpolate", "0"], "--interpolate: 0 is the seed"),
        (["--samples", "9"], "--samples and --protocol need --out"),
        (["--interpolate", "1", "--out", "x.npz"], "--out x.npz must end in .png"),
        (["--samples", "9", "--out", "x.jpg"], "--out: x.jpg ends in .jpg: give .png, .npz, or a folder"),
        (["--out", "x.npz"], "--samples: say how many, or --protocol NAME"),
        (["--out", "some"], "--samples: say how many, or --protocol NAME"),
        (["--protocol", "tvm", "--labels", "1", "--out", "some"], "--protocol chooses the labels itself"),
        (["--prompts", "a", "--out", "x.npz"], "--prompts: x.npz has no place for prompts"),
        (["--prompts", "a", "--out", "some"], "--prompts: these weights take none"),
        (["--samples", "9", "--out", "x.npz"], "9 is not a multiple of the 10 classes"),
    ],
)
def test_bad_sampling_options_are_named(tiny_run, options, message, capsys):
    with pytest.raises(SystemExit):
        sample_main([str(tiny_run / "weights/ba0000008-ema"), *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "width", 10**7, "model.width: 10000000 must be a whole number from 1 to 65536"),
        (
            "model",
            "width",
            65536,
            "proj.weight is (16, 2, 2, 2), the JSON's `model` makes it (65536",
        ),
        (
            "model",
            "depth",
            2,
            "blocks.1.attn.qkv.weight is nothing, the JSON's `model` makes it (48, 16)",
        ),
        ("model", "colour", 1, "model.colour: is not a setting"),
        ("model", "heads", "x", "model.heads: 'x' must be a whole number"),
        ("data", "mean", "x", "data.mean: 'x' must be a list"),
        ("data", "mean", [1.0], "data.mean and data.std must have 2 numbers"),
        ("method", "guidance", None, "method.guidance: None must be w > 0"),
        ("method", None, None, "method: None must be a mapping of keys to values"),
    ],
)
def test_a_description_is_not_believed_before_it_fits_the_tensors(tmp_path, section, key, value, message):
    net = DiT(DiTConfig(size=4, channels=2, classes=3, width=16, depth=1, heads=2))
    file = save_weights(tmp_path / "w", net.state_dict(), net.config, {**FACTS, "step": 3})
    facts = json.loads(file.read_text())
    facts[section] = {**facts[section], key: value} if key else value
    file.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"^weights: .*{re.escape(message)}"):
        load_weights(file)


@pytest.mark.parametrize(("section", "key"), [("model", "norm"), ("method", "times"), ("data", "column")])
def test_a_description_cannot_read_the_environment(tmp_path, monkeypatch, section, key):
    monkeypatch.setenv("SECRET", "swordfish")
    net = DiT(DiTConfig(size=4, channels=2, classes=3, width=16, depth=1, heads=2))
    file = save_weights(tmp_path / "w", net.state_dict(), net.config, {**FACTS, "step": 3})
    facts = json.loads(file.read_text())
    facts[section][key] = "${oc.env:SECRET}"
    file.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=rf"{section}\.{key}: '\$\{{oc\.env:SECRET\}}' must be") as error:
        load_weights(file)
    assert "swordfish" not in str(error.value)


def test_weights_that_are_not_finite_make_no_pictures(tiny_run, tmp_path, capsys):
    net, facts = load_weights(tiny_run / "weights/ba0000008-ema")
    facts = {k: v for k, v in facts.items() if k not in ("model", "format")}
    save_weights(tmp_path / "nan", {k: v * np.nan for k, v in net.state_dict().items()}, net.config, facts)
    with pytest.raises(SystemExit):
        sample_main([str(tmp_path / "nan"), "--out", str(tmp_path / "grid.png")])
    assert "the network's output is not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"", "is not the file that its JSON describes"),
        ("w.json", b"[1]", "is not a description of weights"),
        ("w.json", b"{", "is not a description of weights"),
        ("w.json", b'{"format": 1}', "model: must be given"),
    ],
)
def test_damaged_weights_are_named(tiny_run, tmp_path, name, content, message):
    for suffix in ("json", "safetensors"):
        shutil.copy(tiny_run / f"weights/ba0000008-ema.{suffix}", tmp_path / f"w.{suffix}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load_weights(tmp_path / "w")
