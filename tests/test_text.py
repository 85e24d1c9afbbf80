"""Prompts in the network and in training: no tangent, no trace of padding, nothing before the first step."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPImageProcessor

from eval.report import read_lines
from eval.sample import main as sample_main
from eval.sweep import main as sweep_main
from recipe import load
from recipe.config import ConfigError, TrainConfig, load_config
from recipe.data import collate
from recipe.dit import DiT, DiTConfig
from recipe.dual import Dual
from recipe.generator import Generator
from recipe.metrics import retrieval
from recipe.model import GenerativeModel
from recipe.normalizer import Normalizer
from recipe.objectives import IMF, TVM, FlowMatching, MeanFlow
from recipe.preflight import check_data
from recipe.settings import make
from recipe.text import BEGIN, Prompts, Text, TextConfig, byte_tokens, empty_prompt, summary
from recipe.train import build_model
from recipe.weights import load_weights, save_weights
from storage import Folders
from tests.conftest import TINY, begin, findings, run
from tests.test_text_encoder import save_clip, save_t5

PROMPTS = ["red heart", "", "flag: Côte d’Ivoire", "a" * 300]
SIZES = {"size": 4, "channels": 1, "patch": 2, "width": 32, "depth": 2, "heads": 2, "label_std": 0.5}
OBJECTIVES = {
    "tvm": TVM(guidance=[1, 2]),
    "flow_matching": FlowMatching(),
    "meanflow": MeanFlow(omega=1.5, kappa=0.25),
    "imf": IMF(guidance=[1, 2]),
}
STORED = {"encoder": "t5", "tokens": 12, "width": 8, "empty": "ADwAPAA8ADwAPAA8ADwAPA=="}  # eight ones


def network(classes=0, **text):
    torch.manual_seed(0)
    net = DiT(DiTConfig(**SIZES, classes=classes, text=TextConfig(**text) if text else None)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def texts(config):
    """Four prompts: bytes, or embeddings of lengths 1 to 12, with garbage beyond."""
    if config.encoder == "bytes":
        return byte_tokens(PROMPTS, config.tokens)[0]
    torch.manual_seed(3)
    return Text(torch.randn(4, config.tokens, config.width).half(), torch.tensor([1, 5, 12, 7]))


def query(batch=4):
    torch.manual_seed(1)
    x, tx = torch.randn(2, batch, 1, 4, 4, dtype=torch.float64)
    t, d, tt, td = torch.rand(4, batch, dtype=torch.float64)
    return Dual(x, tx), Dual(t, tt), Dual(d, td), torch.arange(batch) % 2


BYTES = {"encoder": "bytes", "tokens": 24, "width": 64}
STORE = {"encoder": "dataset", "tokens": 12, "width": 8}
either = pytest.mark.parametrize("text", [BYTES, STORE], ids=["bytes", "dataset"])


@either
def test_dual_forward_and_its_gradients_equal_torch_func(text):
    net = network(**text)
    x, t, d, label = query()
    prompts = texts(net.config.text)
    value, tangent = net(x, t, d, label, text=prompts)
    params = dict(net.named_parameters())

    def plain(x, t, d):
        return functional_call(net, params, (x, t, d, label), {"text": prompts}).value

    with sdpa_kernel(SDPBackend.MATH):
        expected = jvp(plain, *zip(x, t, d, strict=True))
    torch.testing.assert_close((value, tangent), expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(2, *value.shape, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad((weights[0] * y + weights[1] * ty).sum(), [*params.values()], allow_unused=True)
        for y, ty in ((value, tangent), expected)
    )
    for name, a, b in zip(params, found, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a - b).norm() / b.norm().clamp(min=1e-8) < 1e-10, name
    assert all(g.any() for name, g in zip(params, found, strict=True) if "text" in name)


@either
def test_a_network_with_text_begins_as_the_one_without(text):
    without = network(classes=3)
    torch.manual_seed(0)
    net = DiT(DiTConfig(**SIZES, classes=3, text=TextConfig(**text))).double()
    net.load_state_dict({**net.state_dict(), **without.state_dict()})
    x, t, d, label = query()
    assert all(map(torch.equal, net(x, t, d, label, text=texts(net.config.text)), without(x, t, d, label)))


@either
def test_padding_changes_nothing_to_the_bit(text):
    net = network(**text)
    x, t, d, label = query()
    prompts = texts(net.config.text)
    expected = net(x, t, d, label, text=prompts)
    beyond = torch.arange(prompts.tokens.shape[1]) >= prompts.length[:, None]
    tokens = prompts.tokens.clone()
    tokens[beyond] = 65 if text["encoder"] == "bytes" else -1000.0
    assert all(map(torch.equal, net(x, t, d, label, text=Text(tokens, prompts.length)), expected))
    if text["encoder"] == "dataset":
        longer = Text(torch.nn.functional.pad(tokens, (0, 0, 0, 65)), prompts.length)
        assert all(map(torch.equal, net(x, t, d, label, text=longer), expected))


@pytest.mark.parametrize("length", [1, 17, 77, 300])
def test_any_number_of_tokens(length):
    net = network(encoder="bytes", tokens=length, width=32)
    x, t, d, label = query()
    tokens, cut = byte_tokens(PROMPTS, length)
    F = net(x, t, d, label, text=tokens)
    assert F.value.isfinite().all()
    assert F.tangent.isfinite().all()
    assert cut == sum(len(prompt.encode()) > length - 1 for prompt in PROMPTS)


def test_bytes_of_prompts():
    (tokens, length), cut = byte_tokens(["", "ab", "é", "abcdef"], 5)
    B = BEGIN
    assert tokens.tolist() == [[B] * 5, [B, 97, 98, B, B], [B, 0xC3, 0xA9, B, B], [B, 97, 98, 99, 100]]
    assert length.tolist() == [1, 3, 3, 5]
    assert cut == 1


def test_a_summary_tells_prompts_apart_and_sees_no_padding():
    prompts = ["red heart", "red heart", "green heart", "flag: Japan", "ab", ""]
    found = summary(byte_tokens(prompts, 16)[0])
    assert torch.equal(found, summary(byte_tokens(prompts, 12)[0]))
    assert torch.equal(found[0], found[1])
    assert not found[5].any()
    assert torch.pdist(found[1:]).min() > 1
    heart, other, flag = found[1:4]
    assert heart @ other > 2 * (heart @ flag).abs()
    short = summary(byte_tokens(["abcd", "abce"], 3)[0])
    assert torch.equal(short[0], short[1])
    assert short[0].any()
    assert summary(byte_tokens(prompts, 2)[0]).shape == found.shape


def test_a_summary_of_embeddings_is_of_their_mean():
    tokens, length = torch.randn(3, 5, 7, dtype=torch.float64), torch.tensor([1, 3, 5])
    means = torch.stack([x[:n].mean(0) for x, n in zip(tokens, length, strict=True)])
    found = summary(Text(tokens, length))
    torch.testing.assert_close(found, summary(Text(means[:, None], torch.ones_like(length))))
    assert torch.linalg.matrix_rank(found) == 3


def test_the_empty_prompt_of_stored_embeddings():
    tokens, length = empty_prompt(TextConfig(**STORE), STORED)
    assert length.tolist() == [1]
    assert (tokens[0, :1] == 1).all()
    assert not tokens[0, 1:].any()


def batch(config, ids):
    """Samples of a dataset as training gets them, whatever else is in the batch."""
    samples = []
    for i in ids:
        torch.manual_seed(i)
        image = torch.rand(1, 4, 4).numpy()
        text = torch.randn(STORE["tokens"], STORE["width"]).half().numpy()
        samples.append(
            {
                "image": image,
                "label": i % 3,
                "sample": i,
                "caption": PROMPTS[i % 4],
                "text": text,
                "text_length": 1 + i,
            }
        )
    return {**collate(samples, config), "step": torch.zeros(len(ids), dtype=torch.int64)}


@either
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("classes", [0, 3])
def test_every_objective_trains_and_a_sample_does_not_depend_on_its_batch(name, classes, text):
    net = network(classes, **text)
    config = net.config.text
    model = GenerativeModel(
        net, OBJECTIVES[name], Normalizer([0.0], [1.0]), 0, Prompts(config, STORED, net.config.null)
    ).double()
    together = model(batch(config, range(8)))
    apart = torch.cat([model(batch(config, [i])).total for i in range(8)])
    torch.testing.assert_close(together.total, apart, rtol=1e-10, atol=1e-12)
    together.total.mean().backward()
    for key in (
        "text_embedder.proj.weight",
        "blocks.0.text_attn.q.weight",
        "blocks.1.text_adaLN_modulation.1.weight",
    ):
        assert net.get_parameter(key).grad.any(), key


def test_the_empty_prompt_is_sampled_at_w_1_and_no_prompts_mean_no_labels(tmp_path):
    """TVM has seen it there alone, whatever w is asked for; named, left out, or among others."""
    for classes in (0, 3):
        net = network(classes=classes, **BYTES)
        facts = {"method": TVM(guidance=[1.0, 4.0]).facts(), "average": "ema", "step": 1}
        facts["data"] = {"column": "image", "mean": [127.5], "std": [63.75]}
        save_weights(tmp_path / "w", net.state_dict(), net.config, facts)
        generator, seeds, null = Generator(tmp_path / "w", dtype="fp64"), torch.arange(4), net.config.null
        label, none = 0 * seeds, torch.full((4,), null)
        text = byte_tokens(["red heart", "", "green apple", ""], BYTES["tokens"])[0]
        nothing = generator(none, seeds, 2, 1.0)
        assert torch.equal(generator(label, seeds, 2, 4.0), nothing)
        guided, plain = (generator(label, seeds, 2, w, text) for w in (4.0, 1.0))
        assert not torch.equal(guided[0], plain[0])
        if not classes:  # with a class, a prompt that is empty is not all that is known
            assert torch.equal(guided[1::2], nothing[1::2])


@either
def test_without_label_the_prompt_is_the_empty_one(text):
    net = network(**text)
    null = net.config.null
    prompts = Prompts(net.config.text, STORED, null)
    x, t, d, _ = query()
    given, empty = texts(net.config.text), empty_prompt(net.config.text, STORED)
    evaluate = prompts(net, given)
    label = torch.tensor([0, null, 0, null])
    twice = [Dual(*(torch.cat([y, y]) for y in pair)) for pair in (x, t, d)]
    found = evaluate(*twice, torch.cat([label, label + 1 - 2 * label])).value
    with_prompt = net(x, t, d, label, text=given).value
    without = net(
        x, t, d, label, text=Text(empty.tokens.expand_as(given.tokens), empty.length.expand(4))
    ).value
    expected = torch.stack([with_prompt, without], 1)
    rows = torch.arange(4)
    torch.testing.assert_close(found[:4], expected[rows, label], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[4:], expected[rows, 1 - label], rtol=1e-12, atol=1e-14)


def test_captions_that_nothing_asks_for_are_left_out():
    samples = [{"label": 1, "caption": "x", "text": torch.zeros(2).numpy(), "text_length": 1}]
    assert collate(samples).keys() == {"label"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"encoder": "clip"}, "model.text.encoder: 'clip' must be 'bytes' or 'dataset'"),
        ({"tokens": 0}, "model.text.tokens: 0"),
        ({"width": 100}, "model.text.width: 100 must be a multiple of 32"),
    ],
)
def test_a_bad_setting_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        make(TextConfig, text, "model.text")


CONFIG = [
    "model.channels=3",
    "model.text.tokens=8",
    "model.text.width=32",
    "grid.interval=2ba",
    "grid.columns=2",
]


@pytest.fixture(scope="module")
def named(digits):
    return digits / "../named/train"


@pytest.fixture(scope="module")
def trained(named, tmp_path_factory):
    """Weights of a two-step run with prompts and without classes."""
    folder = tmp_path_factory.mktemp("run") / "prompts"
    command = [
        "recipe/train.py",
        "yamls/digits.yaml",
        f"data.local={named}",
        f"folder={folder}",
        *TINY,
        *CONFIG,
    ]
    said = run(*command, "model.classes=0", "duration=2ba", "export_interval=2ba")
    assert "model.text.tokens: 8 cuts 39 of the 400 captions" in said.stdout + said.stderr
    assert Image.open(folder / "samples/ba0000002-nfe1.png").size == (2 + 2 * 10, 2 + 10 * 10)
    return folder / "weights/ba0000002-ema"


def test_samples_of_prompts_at_the_command_line(trained, tmp_path, capsys):
    weights, out = str(trained), str(tmp_path / "grid.png")
    with pytest.warns(UserWarning, match="1 of 3 prompts are longer than 8 tokens"):
        sample_main([weights, "--prompts", "one", "八", "far too long", "--columns", "2", "--out", out])
    with Image.open(out) as picture:
        assert picture.width == 2 + 2 * (4 * 8 + 2)
        assert picture.height > 3 * (4 * 8 + 2 * 2)
    (tmp_path / "prompts.txt").write_text("one\n\nnine\n")
    sample_main([weights, "--prompts", str(tmp_path / "prompts.txt"), "--columns", "1", "--out", out])
    folder = str(tmp_path / "some")
    sample_main(
        [weights, "--prompts", "one", "eight, nine", "--samples", "3", "--dtype", "fp64", "--out", folder]
    )
    rows = list(csv.DictReader((tmp_path / "some/samples.csv").open(encoding="utf-8")))
    assert [(row["prompt"], row["label"]) for row in rows] == [("one", "")] * 3 + [("eight, nine", "")] * 3
    generator = Generator(weights, dtype="fp64")
    text, seeds = generator.encode(["one"] * 3 + ["eight, nine"] * 3), torch.arange(6)
    expected = generator(0 * seeds, seeds, 1, generator.objective.default_w, text)
    for row, image in zip(rows, expected.permute(0, 2, 3, 1).numpy(), strict=True):
        assert np.array_equal(np.array(Image.open(tmp_path / "some" / row["file"])), image)
    sample_main([weights, "--samples", "2", "--out", str(tmp_path / "free")])
    assert "000001.png,1,none," in (tmp_path / "free/samples.csv").read_text()
    for options, message in (
        ([weights, "--prompts", "one", "--out", str(tmp_path / "x.npz")], "has no place for prompts"),
        ([weights, "--labels", "1"], "--labels: '1' is not `none`"),
        ([weights, "--labels", "0"], "--labels: '0' is not `none`"),
    ):
        with pytest.raises(SystemExit):
            sample_main(options)
        assert message in capsys.readouterr().err


def test_prompts_in_python(trained):
    model, prompts = load(trained, dtype="fp64"), ["one", "eight, nine"]
    images = model.sample(prompts=prompts, n=3, seed=1)
    text = model.encode([prompt for prompt in prompts for _ in range(3)])
    expected = model(
        torch.zeros(6, dtype=torch.int64), 1 + torch.arange(6), 1, model.objective.default_w, text
    )
    assert np.array_equal(images, expected.permute(0, 2, 3, 1))
    assert np.array_equal(model.sample(prompts="one", n=3, seed=1), images[:3])
    assert len(model.sample(n=2)) == 2  # of the empty prompt
    for bad in ([], [3]):
        with pytest.raises(ValueError, match=r"^prompts: \[.*\] must be one text or more$"):
            model.sample(prompts=bad)


def test_a_prompt_changes_its_sample_alone(trained):
    generator = Generator(trained, dtype="fp64")
    with torch.no_grad():
        for p in generator.net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    label, seeds = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    first, second = (
        generator(label, seeds, 2, 1.25, generator.encode(["one", x, ""])) for x in ("due", "八")
    )
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    null = torch.full_like(label, generator.net.config.null)
    assert torch.equal(generator(null, seeds, 2, 1.25, generator.encode(["one", "due", "x"]))[2], first[2])


def test_a_sweep_asks_for_own_shuffled_and_no_captions(trained, named, tiny_run, tmp_path, digits):
    common = [f"reference={named}", "samples=100", "floor_splits=0", "nfe=[1]"]
    common += [f"folder={tmp_path}/sweep", f"weights=[{trained}]", "prompts=[own,shuffled,empty]"]
    clip = save_clip(tmp_path / "clip", whole=True)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8).save_pretrained(clip)
    sweep_main(["yamls/eval/digits.yaml", *common, f"clip={clip}"])
    rows = read_lines(tmp_path / "sweep/results.jsonl")
    assert [(r["prompts"], r["encoder"]) for r in rows] == [
        (x, "bytes") for x in ("own", "shuffled", "empty")
    ]
    assert all(0 <= r["retrieval"] <= 1 and 0 <= r["clip_score"] <= 100 for r in rows)
    assert "| shuffled |" in (tmp_path / "sweep/results.md").read_text()
    with pytest.raises(SystemExit, match="prompts: .* takes some: own, shuffled and/or empty"):
        sweep_main(["yamls/eval/digits.yaml", *common, "prompts=[]"])
    with pytest.raises(SystemExit, match="prompts: the reference must be a dataset folder with captions"):
        sweep_main(["yamls/eval/digits.yaml", *common, f"reference={digits}"])
    with pytest.raises(SystemExit, match=f"clip: cannot load {tmp_path}/none"):
        sweep_main(["yamls/eval/digits.yaml", *common, f"clip={tmp_path}/none"])
    with pytest.raises(SystemExit, match="prompts.*: 'mine' must be 'own', 'shuffled' or 'empty'"):
        sweep_main(["yamls/eval/digits.yaml", *common, "prompts=[mine]"])


def test_retrieval_is_certain_for_the_own_picture_and_chance_for_another():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(500, 8, dtype=torch.float64, generator=generator)
    own = torch.arange(500)
    assert retrieval(real + 0.01, real, own, 0) == 1
    assert retrieval(
        torch.randn(500, 8, dtype=torch.float64, generator=generator), real, own, 0
    ) == pytest.approx(0.1, abs=0.05)
    assert retrieval(real[:50], real[:50], torch.arange(50).roll(1), 0) < 0.5


def test_stored_embeddings_from_conversion_to_samples(digits, tmp_path, capsys):
    encoder, other = save_t5(tmp_path / "t5"), save_t5(tmp_path / "other", seed=1)
    pictures, names = digits.parent / "pictures", digits.parent / "names.csv"
    options = ["--size", 8, "--captions", names, "--text-encoder", encoder, "--text-tokens", 6]
    run("-m", "streaming_convert", "images", pictures, *options, "--out", tmp_path / "data")
    command = ["recipe/train.py", tmp_path / "data/train.yaml", f"data.local={tmp_path}/data/train", *TINY]
    command += [
        f"folder={tmp_path}/run",
        "duration=2ba",
        "grid.interval=2ba",
        "model.patch=2",
        "data.workers=1",
    ]
    run(*command)
    weights, out = str(tmp_path / "run/weights/ba0000002-ema"), str(tmp_path / "grid.png")
    options = [weights, "--prompts", "one", "nine", "--labels", "1", "--columns", "1", "--out", out]
    sample_main(options)
    with pytest.raises(SystemExit):
        sample_main([*options, "--text-encoder", other])
    assert "the network was trained with" in capsys.readouterr().err
    common = [f"reference={tmp_path}/data/train", "samples=100", "floor_splits=0", "nfe=[1]", "prompts=[own]"]
    sweep_main(["yamls/eval/digits.yaml", *common, f"folder={tmp_path}/sweep", f"weights=[{weights}]"])
    assert read_lines(tmp_path / "sweep/results.jsonl")[0]["encoder"].startswith(f"{encoder} ")
    named = digits / "../named/train"
    said = run(*command, f"data.local={named}", f"folder={tmp_path}/b", check=False)
    assert "model.text.encoder: dataset needs embeddings" in said.stderr
    said = run(*command, f"folder={tmp_path}/c", "model.text.tokens=5", check=False)
    assert "model.text.tokens: 5 differs from the 6 of" in said.stderr


def test_prompts_need_captions(digits):
    config = load_config(TrainConfig, "yamls/digits.yaml", [f"data.local={digits}", "model.text.tokens=8"])
    with pytest.raises(ConfigError, match="model.text: .* has no captions"):
        check_data(config.data, config.model, Folders())


def test_weights_without_prompts_begin_a_run_with_them(tiny_run, digits):
    plain = [f"data.local={digits}", *TINY, f"init_from={tiny_run}/weights"]
    config = load_config(TrainConfig, "yamls/digits.yaml", [*plain, *CONFIG[1:]])
    model = build_model(config, findings(load_config(TrainConfig, "yamls/digits.yaml", plain)))
    assert begin(model, config).endswith("new: text")
    net, _ = load_weights(tiny_run / "weights/ba0000008-ema")
    x, t, d, label = query()
    x = torch.randn(4, 1, 8, 8)
    text = byte_tokens(PROMPTS, 8)[0]
    beta = torch.full((4,), 0.8)
    expected = net(x, t.value.float(), 0 * d.value.float(), label, beta).value
    assert torch.equal(
        model.net(x, t.value.float(), 0 * d.value.float(), label, beta, text=text).value, expected
    )
