"""Low-rank adapters: what is evaluated, trained, written, read again, and read by peft."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from composer.core import Event
from safetensors.torch import load_file

from eval.card import make_folder
from eval.export import main as export_main
from recipe.adapter import AdapterConfig, adapter_state, add_adapter, merge
from recipe.callbacks import inference_facts
from recipe.config import ConfigError, TrainConfig, load_config
from recipe.dual import Dual
from recipe.ema import EMA, EMAConfig, ema_update
from recipe.model import GenerativeModel
from recipe.networks import CONFIGS, build
from recipe.normalizer import Normalizer
from recipe.objectives import IMF, TVM, FlowMatching, MeanFlow
from recipe.objectives.base import Condition
from recipe.text import Prompts, TextConfig, byte_tokens
from recipe.weights import load_weights, read_facts, save_weights
from tests.conftest import TINY, begin, edit, run

DATA = {"column": "image", "mean": [0.0, 0.0], "std": [1.0, 1.0]}
SMALL = {"size": 4, "channels": 2, "classes": 3, "width": 32, "depth": 2, "heads": 2}
OPTIONS = {"dit": {}, "mit": {"head_depth": 1, "context": [2, 1, 1, 1]}}


def perturb(net, trained_alone=False):
    """Add noise to weights, the adapter's among them, since many begin as zero."""
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad or not trained_alone:
                p.add_(0.2 * torch.randn_like(p))
    return net


def network(kind, **options):
    torch.manual_seed(1)
    return perturb(build(CONFIGS[kind](**{**SMALL, **OPTIONS[kind], **options})))


@pytest.mark.parametrize("kind", ["dit", "mit", "prompts"])
def test_an_adapter_is_its_merged_weights_in_value_and_tangent(kind):
    text = TextConfig(tokens=9, width=32) if kind == "prompts" else None
    net = network("mit") if kind == "mit" else network("dit", text=text)
    base = {name: p.clone().double() for name, p in net.state_dict().items()}
    config = AdapterConfig(rank=3, alpha=6, modules_to_save=["y_embedder"])
    add_adapter(net, config)
    perturb(net.double(), trained_alone=True)
    state = adapter_state(net.state_dict(), config.modules_to_save)
    assert state["base_model.model.blocks.1.mlp.fc1.lora_A.weight"].shape == (3, 32)
    assert not [name for name, p in net.named_parameters() if not p.requires_grad and "lora" in name]
    merged = build(net.config).double()
    merged.load_state_dict(merge(base, state, config))
    x, t, dx = torch.randn(4, 2, 4, 4).double(), torch.rand(4).double(), torch.randn(4, 2, 4, 4).double()
    found = []
    for one in (net, merged):
        if text is not None:
            one = Prompts(text, None, 3)(one, byte_tokens(["a", "", "b", "cc"], 9)[0])
        plain = one(x, t, t / 2, torch.arange(4), t)
        pair = one(Dual(x, dx), Dual(t, t / t), Dual(t / 2, t / t), torch.arange(4), t)
        torch.testing.assert_close(plain.value, pair.value)
        found.append(pair)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert found[0].tangent.abs().max() > 0.1


def started(folder, source, target, kind="dit", rank=2, whole=(), **options):
    """A model of `target` that begins, below an adapter, with weights of `source` in a folder."""
    trained = network(kind)
    facts = {"method": source.facts(), "data": DATA, "average": "ema", "step": 5}
    save_weights(folder / "weights/ba0000005-ema", trained.state_dict(), trained.config, facts)
    settings = [f"adapter.rank={rank}", f"adapter.modules_to_save=[{','.join(whole)}]"]
    config = load_config(
        TrainConfig, "yamls/digits.yaml", [f"data.local={folder}", f"init_from={folder}/weights", *settings]
    )
    net = network(kind, **options)
    config.model, config.objective = net.config, target
    add_adapter(net, config.adapter)
    normalizer = Normalizer([0.0, 0.0], [1.0, 1.0])
    model = GenerativeModel(net, target, normalizer, 0, adapter=asdict(config.adapter), share=True)
    return model, begin(model, config)


@pytest.mark.parametrize(
    ("source", "target", "kind", "whole", "options"),
    [
        (TVM(guidance=1.25), TVM(guidance=1.25), "dit", [], {}),
        (FlowMatching(), TVM(guidance=1.25), "dit", ["guidance_embedder"], {}),
        (TVM(guidance=2.0), MeanFlow(omega=2.0), "dit", [], {}),
        (TVM(guidance=1.25), TVM(guidance=1.25), "dit", ["y_embedder"], {"classes": 5}),
        (IMF(guidance=[1, 8]), FlowMatching(), "mit", [], {}),
    ],
)
def test_weights_of_an_adapter_and_the_base_are_the_network_that_was_trained(
    tmp_path, source, target, kind, whole, options
):
    model, said = started(tmp_path, source, target, kind, whole=whole, **options)
    assert "an adapter of rank 2" in said
    with torch.no_grad():
        for one, two in zip(model.net.parameters(), model.ema.parameters(), strict=True):
            assert (one is two) != one.requires_grad  # what is frozen is there once
            if one.requires_grad:
                two.add_(0.2 * torch.randn_like(two))
    facts = {**inference_facts(model, DATA), "average": "ema", "step": 8}
    state = adapter_state(model.ema.state_dict(), whole)
    save_weights(tmp_path / "small", state, model.net.config, facts)
    net, _ = load_weights(tmp_path / "small")
    x, label = torch.randn(4, 2, 4, 4), torch.arange(4)
    asked = Condition(label, target.default_w, model.net.config.null)
    with torch.no_grad():
        want, found = (target.average_velocity(one, x, 0.7, 0.4, asked) for one in (model.ema, net))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_a_base_that_is_another_network_is_one_line(tmp_path):
    model, _ = started(tmp_path, TVM(), TVM())
    other = network("dit", width=16)
    facts = {"method": TVM().facts(), "data": DATA, "average": "ema", "step": 5}
    save_weights(tmp_path / "other", other.state_dict(), other.config, facts)
    model.adapter |= {"base": f"{tmp_path}/other", "sha256": read_facts(tmp_path / "other")["sha256"]}
    facts = {**inference_facts(model, DATA), "average": "ema", "step": 8}
    save_weights(tmp_path / "small", adapter_state(model.ema.state_dict(), []), model.net.config, facts)
    with pytest.raises(ValueError, match="is an adapter, and .*other lacks x_embedder.proj.weight for it$"):
        load_weights(tmp_path / "small")


def test_averages_of_an_adapter_move_and_its_base_does_not(tmp_path):
    model, _ = started(tmp_path, TVM(), TVM())
    EMA(EMAConfig(posthoc=[0.1])).apply(Event.INIT, type("State", (), {"model": model}), None)
    before = {name: p.clone() for name, p in model.net.named_parameters()}
    perturb(model.net, trained_alone=True)
    ema_update(model.net, [(model.posthoc_100, 0.75)])
    for name, p in model.posthoc_100.named_parameters():
        student = model.net.get_parameter(name)
        torch.testing.assert_close(p, 0.75 * before[name] + 0.25 * student)
        assert (p is student) == ("lora_" not in name)


def test_what_would_begin_new_and_frozen_is_one_line_that_says_what_to_train(tmp_path):
    message = (
        r"^adapter.modules_to_save: y_embedder: not in the weights .* Fix: set .*=\[s_embedder,y_embedder\]$"
    )
    with pytest.raises(ConfigError, match=message):
        started(tmp_path, TVM(), TVM(), whole=["s_embedder"], classes=5)
    with pytest.raises(ConfigError, match="^adapter.modules_to_save: guidance_embedder: not"):
        started(tmp_path, FlowMatching(), TVM(guidance=[1.0, 2.0], scaled=False))
    with pytest.raises(ConfigError, match="^adapter: needs init_from"):
        load_config(TrainConfig, "yamls/digits.yaml", [f"data.local={tmp_path}", "adapter.rank=2"])


def test_peft_reads_the_folder_that_a_card_makes(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = started(tmp_path, TVM(), TVM(), whole=["y_embedder"])
    perturb(model.net, trained_alone=True)
    facts = {**inference_facts(model, DATA), "average": "net", "step": 8}
    save_weights(
        tmp_path / "a", adapter_state(model.net.state_dict(), ["y_embedder"]), model.net.config, facts
    )
    make_folder(tmp_path / "a", tmp_path / "card")
    base, _ = load_weights(facts["adapter"]["base"])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "card").merge_and_unload()
    x, t = torch.randn(4, 2, 4, 4), torch.rand(4)
    with torch.no_grad():
        want, found = (one(x, t, t / 2, torch.arange(4), t).value for one in (model.net, theirs))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_a_run_trains_resumes_exports_and_merges_an_adapter(digits, tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run / "weights", tmp_path / "base")
    command = ["recipe/train.py", "yamls/digits.yaml", f"data.local={digits}", *TINY, "save_interval=2ba"]
    command += [f"init_from={tmp_path}/base", f"folder={tmp_path}/run", "adapter.rank=2", "export=[ema,net]"]
    run(*command, "duration=2ba")
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    run(*command, "duration=4ba")  # a checkpoint holds all that a run goes on with
    small, last = tmp_path / "run/weights/ba0000004-net", tmp_path / "run/checkpoints/ep0-ba4/rank0.pt"
    state, facts = load_file(f"{small}.safetensors"), read_facts(small)
    assert all(".lora_" in name for name in state)
    assert facts["adapter"]["base"] == f"{tmp_path}/base/ba0000008-ema"
    assert export_main([str(last), "--average", "net", "--out", str(tmp_path / "again")]) == 0
    assert all(torch.equal(x, state[name]) for name, x in load_file(tmp_path / "again.safetensors").items())
    assert export_main([str(small), "--merge", "--out", str(tmp_path / "whole")]) == 1
    assert "ba0000008-ema (sha256" in capsys.readouterr().err
    for file in (tmp_path / "elsewhere").glob("ba0000008-ema.*"):
        shutil.copy(file, small.parent)
    assert export_main([str(small), "--merge", "--out", str(tmp_path / "whole")]) == 0
    theirs, ours = load_weights(small)[0].state_dict(), load_weights(tmp_path / "whole")[0].state_dict()
    content = torch.load(last, weights_only=False)["state"]["model"]
    for name, weight in ours.items():
        assert torch.equal(theirs[name], weight)
        layer = name.removesuffix("weight")
        change = 0 * weight
        if f"net.{layer}lora_A.weight" in content:
            change = 8 * content[f"net.{layer}lora_B.weight"] @ content[f"net.{layer}lora_A.weight"]
            assert change.any()
        torch.testing.assert_close(weight, content[f"net.{name}"] + change)
    assert "adapter" not in json.loads((tmp_path / "whole.json").read_text())
    edit(small.with_suffix(".json"), lambda told: told["adapter"].update(rank=3))
    with pytest.raises(
        ValueError, match=r"lora_A.weight is \(2, 16\), the JSON's `model` makes it \(3, 16\)"
    ):
        load_weights(small)
