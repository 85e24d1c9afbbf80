"""From training checkpoints to weights, programs and post-hoc averages."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from scipy.integrate import quad

from eval.card import draw, public
from eval.export import Program, export_program, find_weights
from eval.export import main as export_main
from recipe import ema
from recipe.dit import DiT, DiTConfig
from recipe.generator import Generator
from recipe.mit import MiT, MiTConfig
from recipe.pictures import grid
from recipe.text import TextConfig, byte_tokens
from recipe.weights import load_weights, read_facts, save_weights
from tests.conftest import TINY, run
from tests.test_convert_resume import bucket  # noqa: F401
from tests.test_train import fit


def same(a, b):
    """Whether two pairs of weights are equal to the last bit and describe themselves alike."""
    one, two = load_file(f"{a}.safetensors"), load_file(f"{b}.safetensors")
    assert one.keys() == two.keys()
    described = [
        {k: read_facts(x)[k] for k in ("model", "method", "data", "average", "step")} for x in (a, b)
    ]
    return all(torch.equal(one[k], two[k]) for k in one) and described[0] == described[1]


@pytest.mark.parametrize("average", ["ema", "net"])
def test_a_full_checkpoint_gives_the_weights_that_training_exported(tiny_run, tmp_path, average):
    checkpoint = str(tiny_run / "checkpoints/ep0-ba8/rank0.pt")
    assert export_main([checkpoint, "--average", average, "--out", str(tmp_path / "w")]) == 0
    assert same(tmp_path / "w", tiny_run / f"weights/ba0000008-{average}")


@pytest.fixture(scope="module")
def sharded_run(digits, tmp_path_factory):
    """A run that shards, keeps two post-hoc averages, was stopped at step 4 and resumed to step 8."""
    folder = tmp_path_factory.mktemp("sharded")
    command = ["recipe/train.py", "yamls/digits.yaml", f"folder={folder}", f"data.local={digits}", *TINY]
    command += ["save_interval=4ba", "export_interval=2ba", "parallel.fsdp2=true", "ema.posthoc=[0.05,0.1]"]
    run(*command, "duration=4ba")
    run(*command, "duration=8ba")
    return folder


def test_a_sharded_checkpoint_gives_the_weights_that_training_exported(sharded_run, tmp_path):
    (checkpoint,) = sharded_run.glob("checkpoints/*ba8*")
    assert list(checkpoint.glob("*.distcp"))
    assert export_main([str(checkpoint), "--out", str(tmp_path / "w")]) == 0
    assert same(tmp_path / "w", sharded_run / "weights/ba0000008-ema")


def test_a_checkpoint_in_a_bucket_is_exported(sharded_run, tmp_path, bucket, capsys):  # noqa: F811
    (checkpoint,) = sharded_run.glob("checkpoints/*ba8*")
    for file in checkpoint.iterdir():
        bucket.upload_file(str(file), "data", f"run/ep0-ba8/{file.name}")
    assert export_main(["s3://data/run/ep0-ba8", "--out", str(tmp_path / "w")]) == 0
    assert same(tmp_path / "w", sharded_run / "weights/ba0000008-ema")
    assert export_main(["s3://data/run/ep0-ba9", "--out", str(tmp_path / "w")]) == 1
    assert "ep0-ba9 does not exist" in capsys.readouterr().err


def test_a_damaged_sharded_checkpoint_is_named(sharded_run, tmp_path, capsys):
    (checkpoint,) = sharded_run.glob("checkpoints/*ba8*")
    for name in ("__0_0.distcp", ".metadata"):
        copy = shutil.copytree(checkpoint, tmp_path / f"copy{name}")
        (copy / name).write_bytes((copy / name).read_bytes()[:100])
        assert export_main([str(copy), "--out", str(tmp_path / "w")]) == 1
        assert f"error: {copy} is " in capsys.readouterr().err


def test_a_sweep_finds_stored_and_synthesised_averages(sharded_run, tmp_path):
    names = [str(sharded_run / "weights")]
    found = find_weights(names, ["posthoc:0.05", "posthoc:0.075"], False, tmp_path)
    averages = [(export.facts["step"], export.facts["average"]) for export in found]
    assert sorted(averages) == [(s, f"posthoc:{a}") for s in (2, 4, 6, 8) for a in (0.05, 0.075)]
    again = find_weights(names, ["posthoc:0.075"], True, tmp_path)
    assert [e.facts["sha256"] for e in again] == [e.facts["sha256"] for e in found if e.path == again[0].path]
    assert export_main([names[0], "--average", "posthoc:0.1", "--out", str(tmp_path / "w")]) == 0
    synthesised, stored = (
        load_weights(tmp_path / "w")[0],
        load_weights(f"{names[0]}/ba0000008-posthoc_100")[0],
    )
    for a, b in zip(synthesised.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.pt", "nowhere.pt does not exist"),
        ("text.pt", "not a checkpoint"),
        (".", "not a folder of a sharded"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, monkeypatch, capsys, source, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": 1}, "text.pt")
    assert export_main([source, "--out", "w"]) == 1
    assert message in capsys.readouterr().err


def test_the_program_is_the_sampler_and_takes_any_batch(tiny_run, tmp_path):
    weights, file = str(tiny_run / "weights/ba0000008-net"), str(tmp_path / "sampler.pt2")
    assert export_main([weights, "--program", file, "--nfe", "2", "--w", "1.25"]) == 0
    program = torch.export.load(file).module()
    generator = Generator(weights)
    for batch in (1, 5):
        label, seeds = torch.arange(batch), torch.arange(batch)
        found = program(generator.noise(seeds), label)
        expected = generator(label, seeds, 2, 1.25)
        assert found.dtype == torch.uint8
        assert (found.int() - expected.int()).abs().max() <= 1


def test_a_program_of_another_kind_is_refused_before_any_work(tmp_path, capsys):
    for name in ("x.pt", "x"):
        with pytest.raises(SystemExit):
            export_main(["nowhere", "--program", str(tmp_path / name)])
        assert f"--program: {tmp_path / name} must end in .pt2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export_main(["nowhere", "--hub", "name"])
    assert "--hub: name must be USER/MODEL" in capsys.readouterr().err


def disturbed(folder, column="image", channels=2, **options):
    """Weights of a small network whose output is not zero."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(size=4, channels=channels, width=32, depth=1, heads=2, **options))
    state = {name: x + 0.2 * torch.randn_like(x) for name, x in net.state_dict().items()}
    facts = {"method": {"objective": "tvm", "guidance": [1.0, 4.0]}, "average": "ema", "step": 1}
    mean, std = [127.5, 100.0][:channels], [63.75, 50.0][:channels]
    data = {"column": column, "mean": mean, "std": std, "class_names": ["a|b", "c"]}
    data |= {"encoder": {"name": "vae", "model": "some/vae"}, "source": "/home/me/secret/photos"}
    save_weights(folder / "w", state, net.config, {**facts, "data": data, "train_seconds": 1.0})
    return folder / "w"


@pytest.mark.slow
def test_a_program_of_the_network_of_imf_is_the_sampler(tmp_path):
    torch.manual_seed(0)
    net = MiT(MiTConfig(size=4, channels=1, classes=3, width=32, depth=2, heads=2, head_depth=1))
    state = {name: x + 0.2 * torch.randn_like(x) for name, x in net.state_dict().items()}
    facts = {"method": {"objective": "imf", "guidance": [1.0, 4.0]}, "average": "ema", "step": 1}
    facts["data"] = {"column": "image", "mean": [127.5], "std": [63.75], "class_names": ["2", "0", "1"]}
    save_weights(tmp_path / "w", state, net.config, facts)
    how = ["--nfe", "2", "--w", "2", "--interval", "0.2,0.6", "--program", str(tmp_path / "x.pt2")]
    assert export_main([str(tmp_path / "w"), *how]) == 0
    generator = Generator(tmp_path / "w")
    noise, label = generator.noise(torch.arange(3)), torch.arange(3)
    found = torch.export.load(tmp_path / "x.pt2").module()(noise, label)
    wanted = generator.from_noise(noise, label, 2, 2.0, interval=[0.2, 0.6])
    assert (found.int() - wanted.int()).abs().max() <= 1
    assert (wanted.int() - generator.from_noise(noise, label, 2, 2.0).int()).abs().max() > 2
    assert generator.labels(["1", "2", 1]).tolist() == [2, 0, 1]  # names before numbers


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.slow
def test_a_program_takes_prompts(tmp_path, classes):
    weights = disturbed(tmp_path, classes=classes, text=TextConfig(tokens=8, width=32))
    program, generator = export_program(weights, 2, 4.0).module(), Generator(weights)
    text, label = (
        generator.encode(["red heart"[:6], "", "due"]),
        torch.arange(3) if classes else torch.zeros(3).long(),
    )
    noise = generator.noise(torch.arange(3))
    found = program(noise, *([label] if classes else []), *text)
    expected = generator.from_noise(noise, label, 2, 4.0, text)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(
        found[0], program(noise, *([label] if classes else []), *generator.encode([""] * 3))[0]
    )


@pytest.mark.parametrize("text", [None, TextConfig(tokens=8, width=32)])
@pytest.mark.slow
def test_an_onnx_program_gives_the_same_latents(tmp_path, text):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    weights = disturbed(tmp_path, "latents", classes=3, text=text)
    file = str(tmp_path / "x.onnx")
    assert export_main([str(weights), "--program", file, "--nfe", "1", "--w", "4"]) == 0
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    sampler = Program(weights, 1, 4.0)
    for batch in (1, 5):
        noise, label = torch.randn(batch, 2, 4, 4), torch.arange(batch) % 4
        asked = [noise, label, *(byte_tokens(["a cat"] * batch, 8)[0] if text else [])]
        names = [one.name for one in session.get_inputs()]
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, asked, strict=True)})
        # in units of the data's deviation, at most 63.75
        np.testing.assert_allclose(found / 63.75, sampler(*asked) / 63.75, rtol=0, atol=1e-4)


ROW = {"protocol": "matched", "samples": 10, "nfe": 1, "w": 1.0, "frechet_distance": 0.5, "floor": 0.25}
ROW |= {"weights": "runs/x/weights/w", "objective": "tvm", "average": "ema", "step": 1, "seed": 0}
ROW |= {"extractor": "pixels", "reference": "real", "dtype": "fp32", "class_agreement": None, "commit": "c"}
ROW |= {"classifier_accuracy": None, "time": "t", "train_seconds": 1.0, "trained_on": True}


def test_a_card_says_what_the_weights_are_and_how_they_score(tmp_path, capsys, monkeypatch):
    weights = disturbed(tmp_path, channels=1, classes=2)
    rows = [
        {**ROW, "sha256": read_facts(weights)["sha256"], "reference": "/home/me/secret/train"},
        {**ROW, "sha256": "0", "frechet_distance": 77.125},
    ]
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sweep/samples.png").write_bytes(b"of other weights, and of real images")
    folder = tmp_path / "mi'ne"
    command = [str(weights), "--card", str(folder), "--results", str(tmp_path / "sweep")]
    assert export_main(command) == 0
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == "unconditional-image-generation" and "tvm" in head["tags"]
    for part in (
        "4x4 of 1 channels",
        "a\\|b, c",
        "1 to 4",
        "0.500 (trained on)",
        "Protocol `matched`",
        "samples.png",
        "Not selected: seeds 0 to 15, steps: 1, w = 1",
        "Reference: train.",
    ):
        assert part in card, part
    drawn = grid(Generator(weights).sample(n=8).transpose(0, 3, 1, 2), 8, 16)
    assert np.array_equal(np.array(Image.open(folder / "samples.png")), drawn)
    facts = read_facts(folder / "model")
    assert facts["data"]["source"] == "photos" and facts["data"]["encoder"]["model"] == "some/vae"
    assert all("secret" not in text for text in (card, (folder / "model.json").read_text()))
    assert "77.12" not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code, space)
    assert space["images"].shape == (16, 4, 4, 1)
    assert export_main(command) == 0  # again, with newer scores perhaps
    (folder / "mine.txt").write_text("")
    assert export_main(command) == 1
    assert "--card: " in (said := capsys.readouterr().err) and "holds other files, such as mine.txt" in said


def test_a_card_is_uploaded_or_stays_here(tmp_path, monkeypatch, capsys):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    weights, done = disturbed(tmp_path, channels=1), []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            done.append((name, private, exist_ok))
            return f"https://huggingface.co/{name}"

        def model_info(self, name):
            return SimpleNamespace(private=name == "me/private")

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            files = {file.name for file in Path(folder_path).iterdir()}
            done.append((repo_id, sorted(files & set(allow_patterns))))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert export_main([str(weights), "--hub", "me/mine"]) == 0
    files = ["README.md", "model.json", "model.safetensors", "samples.png"]
    assert done == [("me/mine", None, True), ("me/mine", files)]
    assert "https://huggingface.co/me/mine (public: anyone can see it)\n" in capsys.readouterr().out
    assert export_main([str(weights), "--hub", "me/private", "--private"]) == 0
    assert done[2:] == [("me/private", True, True), ("me/private", files)]
    assert "https://huggingface.co/me/private (private)\n" in capsys.readouterr().out
    del done[:]
    assert export_main([str(weights), "--hub", "me/mine", "--private", "--card", "a card"]) == 1
    error = capsys.readouterr().err
    assert "me/mine exists and is public. Later: hf upload --private me/mine 'a card'" in error
    assert done == [("me/mine", True, True)]  # nothing was uploaded
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: 1 / 0)
    assert export_main([str(weights), "--hub", "me/other"]) == 1
    error = capsys.readouterr().err
    assert "other is written, not uploaded: division by zero. Later: hf upload me/other other" in error
    assert sorted(file.name for file in (tmp_path / "other").iterdir()) == files


def test_what_is_published_says_of_paths_the_last_part():
    row = {
        "reference": "/home/me/x/train",
        "extractor": "pixels:4, image-model:/home/me/dino, inception-2015",
    }
    row |= {"floor[image-model:/home/me/dino]": 1.0, "encoder": "google/t5 0123", "nfe": 1}
    row |= {"held_out": "s3://secret/val/", "class_names": ["a/b"]}
    assert public([row]) == [
        {
            "reference": "train",
            "extractor": "pixels:4, image-model:dino, inception-2015",
            "floor[image-model:dino]": 1.0,
            "encoder": "google/t5 0123",
            "nfe": 1,
            "held_out": "val",
            "class_names": ["a/b"],
        }
    ]
    for folder in ("/home/me, and you/x", "C:\\me\\secret\\x", "s3://me/a, b/x", "me/x"):
        adapter = {"base": folder, "reference": folder, "extractor": f"image-model:{folder}, pixels"}
        hub = "me/" if folder == "me/x" else ""
        named = {"base": "x", "reference": "x", "extractor": f"image-model:{hub}x, pixels"}
        assert public(adapter) == named
    text = {"encoder": {"model": "s3://secret/vae", "name": "me/vae"}, "text": {"encoder": "/home/me/t5"}}
    assert public(text) == {"encoder": {"model": "vae", "name": "me/vae"}, "text": {"encoder": "t5"}}


def test_a_card_says_when_its_samples_were_guided(tmp_path, monkeypatch):
    weights = disturbed(tmp_path, channels=1, classes=2)
    model = SimpleNamespace(prompts=None, facts=read_facts(weights), w=8.0, interval=[0.42, 0.62])
    model.sample = lambda n, nfe: np.zeros((n, 4, 4, 1), np.uint8)
    monkeypatch.setattr("eval.card.load", lambda _: model)
    assert draw(weights, tmp_path / "x.png").endswith("steps: 1, w = 8 for t from 0.42 to 0.62")


def test_weights_with_prompts_have_a_card_without_picture(tmp_path, capsys):
    weights = disturbed(tmp_path, channels=1, classes=0, text=TextConfig(tokens=8, width=32))
    assert export_main([str(weights), "--card", str(tmp_path / "mine")]) == 0
    assert "no samples.png on the card: the weights take prompts" in capsys.readouterr().err
    assert "samples.png" not in (tmp_path / "mine/README.md").read_text()


@pytest.mark.slow
def test_a_program_guides_each_sample_by_its_own_label(tmp_path):
    """TVM's rule, w = 1 without label, is in the graph: of a mixed batch, to the bit."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(size=4, channels=1, classes=2, width=16, depth=1, heads=2))
    state = {name: x + 0.2 * torch.randn_like(x) for name, x in net.state_dict().items()}
    facts = {"method": {"objective": "tvm", "guidance": [1.0, 4.0]}, "average": "ema", "step": 1}
    facts["data"] = {"column": "image", "mean": [127.5], "std": [63.75]}
    save_weights(tmp_path / "w", state, net.config, facts)
    one, four = (export_program(tmp_path / "w", 2, w).module() for w in (1.0, 4.0))
    noise = torch.randn(6, 1, 4, 4)
    label = torch.tensor([0, 2, 1, 2, 2, 0])
    plain, guided = one(noise, label), four(noise, label)
    assert torch.equal(guided[label == 2], plain[label == 2])
    assert not torch.equal(guided[0], plain[0])
    drawn = Generator(tmp_path / "w").from_noise(noise, label, 2, 4.0)
    assert (drawn.int() - guided.int()).abs().max() <= 1


def profile(gamma, step, tau):
    return (gamma + 1) * tau**gamma / step ** (gamma + 1)


def test_profiles_have_the_length_and_overlap_that_the_formulas_say():
    gamma = ema.exponent(0.1)
    mean = quad(lambda tau: tau * profile(gamma, 1, tau), 0, 1)[0]
    variance = quad(lambda tau: (tau - mean) ** 2 * profile(gamma, 1, tau), 0, 1)[0]
    assert variance**0.5 == pytest.approx(0.1, rel=1e-9)
    assert gamma == pytest.approx(6.94, abs=0.005)  # EDM2, section 3.1
    assert ema.exponent(0.05) == pytest.approx(16.97, abs=0.005)
    a, b = (3.0, 7), (5.0, 4)
    overlap = quad(lambda tau: profile(*a, tau) * profile(*b, tau), 0, 4)[0]
    assert ema.inner_product(a, b) == ema.inner_product(b, a) == pytest.approx(overlap, rel=1e-9)


@pytest.mark.parametrize("length", [0.0, 0.3, -1.0])
def test_impossible_lengths_are_named(length):
    with pytest.raises(ValueError, match=f"posthoc length {length} must lie in"):
        ema.exponent(length)


def tracked(values, length):
    """The power-function average of a sequence, updated step by step as training does; after each step."""
    average, history = np.zeros_like(values[0]), []
    for step, value in enumerate(values, start=1):
        decay = ema.posthoc_decay(ema.exponent(length), step)
        average = decay * average + (1 - decay) * value
        history.append(average)
    return history


def test_a_synthesised_average_is_the_one_that_tracking_gives():
    """On a random walk that drifts, with a snapshot every 50 of 2000 steps."""
    values = np.cumsum(np.random.default_rng(0).normal(0.1, 1, (2000, 16)), axis=0)
    snapshots = [(length, step) for step in range(50, 2001, 50) for length in (0.05, 0.1)]
    histories = {length: tracked(values, length) for length in (0.05, 0.1)}
    stored = np.stack([histories[length][step - 1] for length, step in snapshots])
    profiles = [(ema.exponent(length), step) for length, step in snapshots]
    scale = np.linalg.norm(values[-1] - histories[0.1][-1])
    for length, allowed in ((0.05, 1e-9), (0.075, 0.01), (0.15, 0.01), (0.03, 0.05)):
        made = ema.combination(profiles, (ema.exponent(length), 2000)) @ stored
        error = np.linalg.norm(made - tracked(values, length)[-1]) / scale
        assert error < allowed, (length, error)


@pytest.mark.parametrize("steps", [[1000], range(125, 1001, 125)], ids=["one", "eight"])
@pytest.mark.parametrize("length", [0.03, 0.075, 0.15, 0.25])
def test_factors_of_few_snapshots_still_make_an_average(steps, length):
    """Their sum is 1, so weights that never changed stay as they are; the closest sum shrinks them."""
    profiles = [(ema.exponent(0.1), step) for step in steps]
    assert ema.combination(profiles, (ema.exponent(length), 1000)).sum() == pytest.approx(1)


def test_equal_snapshots_are_one_line():
    with pytest.raises(ValueError, match="have the same length and step"):
        ema.combination([(7.0, 8), (7.0, 8)], (6.0, 8))


def snapshots(folder, values, **facts):
    """One post-hoc average of length 0.1 for each step and value of all its weights."""
    net = DiT(DiTConfig(size=4, channels=1, classes=2, width=16, depth=1, heads=2))
    facts = {"method": {"objective": "tvm"}, "average": "posthoc:0.1", "train_seconds": 0.0, **facts}
    facts["data"] = {"column": "image", "mean": [127.5], "std": [127.5]}
    for step, value in values.items():
        state = {name: torch.full_like(x, value) for name, x in net.state_dict().items()}
        save_weights(folder / f"ba{step:07d}-posthoc_100", state, net.config, {**facts, "step": step})


@pytest.mark.parametrize("steps", [[8], range(1, 9)], ids=["one", "eight"])
def test_weights_that_never_changed_are_their_own_average(tmp_path, steps):
    snapshots(tmp_path, dict.fromkeys(steps, 0.5))
    assert export_main([str(tmp_path), "--average", "posthoc:0.2", "--out", str(tmp_path / "w")]) == 0
    for tensor in load_file(tmp_path / "w.safetensors").values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 0.5), rtol=1e-6, atol=0)


def test_no_average_is_made_of_damaged_snapshots(tmp_path, capsys):
    def refused(message):
        assert export_main([str(tmp_path), "--average", "posthoc:0.2", "--out", str(tmp_path / "w")]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "w.json").exists()
        with pytest.raises(ValueError, match=message.split(":")[0]):
            find_weights([str(tmp_path)], ["posthoc:0.2"], True, tmp_path / "sweep")

    snapshots(tmp_path, {4: 0.5, 8: 0.5})
    file = tmp_path / "ba0000004-posthoc_100.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"!")
    refused("ba0000004-posthoc_100.safetensors is not the file that its JSON describes")
    snapshots(tmp_path, {4: float("nan")})
    refused("is not finite, so no average is made of it")
    snapshots(tmp_path, {0: 0.5})
    refused("step: 0 must be at least 1")


def test_training_tracks_power_function_averages(digits):
    model, recorder = fit(digits, 6, "ema.posthoc=[0.1]")
    count = len(list(model.net.state_dict()))
    values = [np.concatenate([t.numpy().ravel() for t in state[:count]]) for state in recorder.states]
    found = np.concatenate([p.detach().numpy().ravel() for p in model.posthoc_100.parameters()])
    np.testing.assert_allclose(found, tracked(values, 0.1)[-1], rtol=1e-12, atol=1e-14)
    assert not any(name.startswith("posthoc") for name, _ in fit(digits, 1)[0].named_children())


def test_weights_of_another_kind_hold_no_snapshots(tmp_path):
    net = DiT(DiTConfig(size=4, channels=1, classes=2, width=16, depth=1, heads=2))
    facts = {"method": {"objective": "tvm", "scaled": True, "guidance": [1.0]}, "average": "ema", "step": 1}
    facts["data"] = {"column": "image", "mean": [127.5], "std": [127.5]}
    save_weights(tmp_path / "w", net.state_dict(), net.config, facts)
    with pytest.raises(ValueError, match="holds no weights with average"):
        find_weights([str(tmp_path)], ["posthoc:0.1"], False, tmp_path)
