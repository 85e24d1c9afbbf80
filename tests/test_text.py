"""Prompts in the network and in training: no tangent, no trace of padding, nothing before the first step."""

import pytest
import torch
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipe.data import Normalizer, collate
from recipe.dit import DiT, DiTConfig
from recipe.dual import Dual
from recipe.model import GenerativeModel
from recipe.objectives import IMF, TVM, FlowMatching, MeanFlow
from recipe.text import BEGIN, Prompts, Text, TextConfig, byte_tokens, empty_prompt

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
        net, OBJECTIVES[name], Normalizer([0.0], [1.0]), 0, Prompts(config, STORED)
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


@either
def test_without_label_the_prompt_is_the_empty_one(text):
    net = network(**text)
    prompts, null = Prompts(net.config.text, STORED), net.config.null
    x, t, d, _ = query()
    given, empty = texts(net.config.text), empty_prompt(net.config.text, STORED)
    evaluate = prompts(net, given, null)
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
        ({"encoder": "clip"}, "model.text.encoder: 'clip' is not one of bytes, dataset"),
        ({"tokens": 0}, "model.text.tokens: 0"),
        ({"width": 100}, "model.text.width: 100 must be a multiple of 32"),
    ],
)
def test_a_bad_setting_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**text)
