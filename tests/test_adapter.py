"""Low-rank adapters: what is evaluated, trained, written, read again, and read by peft."""

import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from composer.core import Event
from safetensors.torch import load_file

from eval.card import make_folder, upload
from eval.export import find_weights, local_copy
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
from recipe.objectives.frechet import Frechet
from recipe.text import Prompts, TextConfig, byte_tokens
from recipe.weights import load_weights, read_facts, save_weights
from storage import Folder
from tests.conftest import TINY, begin, edit, refusal, run

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


def written(model, path, average="ema", step=8, whole=()):
    """The path of a model's adapter, written as a run does."""
    facts = {**inference_facts(model, DATA), "average": average, "step": step}
    state = adapter_state(getattr(model, average).state_dict(), whole)
    save_weights(path, state, model.net.config, facts)
    return path


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
    net, _ = load_weights(written(model, tmp_path / "small", whole=whole))
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
    with pytest.raises(ValueError, match="is an adapter, and .*other lacks x_embedder.proj.weight for it$"):
        load_weights(written(model, tmp_path / "small"))


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


def test_a_part_that_no_network_has_is_one_line():
    message = "^adapter.modules_to_save: 'y_embeder' is no part of the network: .*t_embedder, .*y_embedder"
    with pytest.raises(ConfigError, match=message):
        add_adapter(network("dit"), AdapterConfig(modules_to_save=["y_embedder", "y_embeder"]))
    add_adapter(network("dit"), AdapterConfig(modules_to_save=["y_embedder", "fc1"]))


def test_a_run_begins_with_an_adapter_whose_base_lies_beside_it(tmp_path):
    """The base has gone from the place where init_from found it."""
    model, _ = started(tmp_path, TVM(), TVM())
    perturb(model.net, trained_alone=True)
    written(model, tmp_path / "other/ba0000008-net", "net")
    shutil.move(tmp_path / "weights", tmp_path / "elsewhere")
    config = load_config(
        TrainConfig, "yamls/digits.yaml", [f"data.local={tmp_path}", f"init_from={tmp_path}/other"]
    )
    config.model, config.objective = model.net.config, TVM()
    fresh = GenerativeModel(network("dit"), TVM(), model.normalizer, 0)
    message = refusal(ConfigError, begin, fresh, config)
    assert message.startswith(f"init_from: weights: {tmp_path}/other/ba0000008-net is an adapter of")
    for file in (tmp_path / "elsewhere").iterdir():
        shutil.copy(file, tmp_path / "other")
    config.init_from = f"{tmp_path}/other/ba0000008-net"
    begin(fresh, config)
    x, t = torch.randn(4, 2, 4, 4), torch.rand(4)
    with torch.no_grad():
        want, found = (one(x, t, t / 2, torch.arange(4), t).value for one in (model.net, fresh.net))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_a_base_in_a_bucket_is_to_be_put_beside_its_adapter(tmp_path):
    model, _ = started(tmp_path, TVM(), TVM())
    model.adapter["base"] = "s3://data/weights/ba0000005-ema"
    written(model, tmp_path / "a", "net")
    message = "of s3://data/weights/ba0000005-ema .*which is not beside it: download it and put it beside"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "a")
    for file in (tmp_path / "weights").iterdir():
        shutil.copy(file, tmp_path)
    load_weights(tmp_path / "a")


@pytest.mark.parametrize("target", [FlowMatching(), Frechet(features={"pixels": "x"})])
def test_an_adapter_of_flow_matching_needs_no_step_to_be_trained(tmp_path, monkeypatch, target):
    """Flow matching has d = 0 always, so an `s_embedder` that says nothing may be frozen."""
    monkeypatch.setattr("tests.test_adapter.network", without_steps)
    assert "new: s_embedder, an adapter" in started(tmp_path, FlowMatching(), target)[1]
    with pytest.raises(ConfigError, match="^adapter.modules_to_save: guidance_embedder, s_embedder: not in"):
        started(tmp_path, FlowMatching(), TVM(guidance=[1.0, 2.0], scaled=False))


def without_steps(kind, make=network, **options):
    """A network whose velocity says nothing of the second time, as an imported one."""
    net = make(kind, **options)
    torch.nn.init.zeros_(net.s_embedder.mlp[2].weight)
    return net


@pytest.fixture
def small(tmp_path):
    """Weights of an adapter, whose base, of a later step, lies beside them and no more where it was."""
    model, _ = started(tmp_path, TVM(), TVM())
    perturb(model.net, trained_alone=True)
    model.ema.load_state_dict(model.net.state_dict())
    path = written(model, tmp_path / "small/ba0000003-ema", step=3)
    for file in (tmp_path / "weights").iterdir():
        shutil.move(file, tmp_path / "small")
    return path


@pytest.mark.parametrize("suffix", ["", ".json"])
def test_an_adapter_in_a_bucket_is_merged(small, monkeypatch, suffix):
    monkeypatch.setattr("eval.export.Folder", lambda _: Folder(str(small.parent)))
    out = small.parent.parent / "whole"
    assert export_main([f"s3://b/weights/{small.name}{suffix}", "--merge", "--out", str(out)]) == 0
    theirs, ours = (load_weights(path)[0].state_dict() for path in (small, out))
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())


def test_all_that_has_a_name_in_a_bucket_is_copied(small, monkeypatch):
    """Also a folder beside weights of its name, and tensors without their JSON, which is then missed."""
    monkeypatch.setattr("eval.export.Folder", lambda _: Folder(str(small.parent)))
    small.mkdir()
    for name in (f"{small.name}/part", "x.safetensors"):
        (small.parent / name).touch()
    with local_copy(f"s3://b/weights/{small.name}") as copy:
        assert (copy / "part").is_file()
        load_weights(copy)
    with local_copy("s3://b/weights/x") as copy, pytest.raises(FileNotFoundError, match="x.json does not"):
        load_weights(copy)


def test_the_newest_weights_of_a_bucket_are_the_adapter_with_its_base(small, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.export.Folder", lambda _: Folder(str(small.parent)))
    (found,) = find_weights(["s3://b/weights"], ["ema"], True, tmp_path)
    assert found.path.name == "ba0000003-ema.json"
    load_weights(found.path)


def test_options_that_merging_does_not_take_are_refused(tmp_path, capsys):
    for options, message in (
        ([], "--merge: needs --out NAME"),
        (["--out", "x", "--average", "net"], "--average: net is not with --merge"),
    ):
        with pytest.raises(SystemExit):
            export_main([str(tmp_path), "--merge", *options])
        assert message in capsys.readouterr().err


def test_a_card_of_an_adapter_is_of_the_adapter_and_leaves_its_base_alone(small, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    make_folder(small, tmp_path / "card")
    state = load_file(f"{small}.safetensors")
    count = sum(tensor.numel() for tensor in state.values())
    assert f"{count:,} parameters of the adapter" in (tmp_path / "card/README.md").read_text()
    told = json.loads((tmp_path / "card/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "ba0000005-ema"
    base = {file.name for file in small.parent.glob("ba0000005-ema.*")}
    for name in base:
        shutil.copy(small.parent / name, tmp_path / "card")
    make_folder(small, tmp_path / "card")
    allowed = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            return name

        def model_info(self, name):
            return SimpleNamespace(private=False)

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            allowed.extend(allow_patterns)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    upload(tmp_path / "card", "me/mine", False)
    there = {file.name for file in (tmp_path / "card").iterdir()}
    assert base == there - set(allowed) and {"adapter_model.json", "adapter_config.json"} <= set(allowed)
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="upload --exclude=ba0000005-ema.json --exclude=.* me/mine"):
        upload(tmp_path / "card", "me/mine", False)


def test_peft_reads_the_folder_that_a_card_makes(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = started(tmp_path, TVM(), TVM(), whole=["y_embedder"])
    perturb(model.net, trained_alone=True)
    make_folder(written(model, tmp_path / "a", "net", whole=["y_embedder"]), tmp_path / "card")
    base, _ = load_weights(model.adapter["base"])
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
