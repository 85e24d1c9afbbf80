"""Published SiT weights: what is taken, what is refused, and a run that begins with them."""

import os
import re
import zipfile
from argparse import Namespace
from contextlib import suppress

import pytest
import torch

from eval.import_weights import Told, import_weights, main
from recipe.config import TrainConfig, load_config
from recipe.dit import DiT
from recipe.model import GenerativeModel
from recipe.normalizer import Normalizer
from recipe.weights import load_weights, read_facts
from tests.conftest import Evil, begin, damaged
from tests.test_parity import DATA

PLAIN, TRAIN = DATA / "objectives/sit_a.pt", DATA / "objectives/sit_a_train.pt"


def import_sit(path, heads, **told):
    """Weights, and the facts with the network's settings among them."""
    found = import_weights(path, Told(heads=heads, **told))
    return found.state, {"config": found.config, **found.facts}


def state():
    return torch.load(PLAIN, weights_only=True)


def test_the_command_writes_weights_that_sample_and_say_what_they_are(tmp_path, capsys):
    main([str(TRAIN), "--out", str(tmp_path / "sit"), "--heads", "4"])
    assert capsys.readouterr().out == f"{tmp_path}/sit.json\n"
    facts = read_facts(tmp_path / "sit")
    assert facts["method"]["objective"] == "flow_matching"
    assert facts["data"]["std"] == pytest.approx([1 / 0.18215] * 4)
    assert facts["model"]["norm"] == "layer"
    assert facts["model"]["reverse_time"]
    assert (facts["model"]["classes"], facts["model"]["size"], facts["model"]["depth"]) == (7, 8, 3)


@pytest.mark.parametrize("objective", ["tvm", "meanflow", "imf", "flow_matching"])
def test_a_run_of_any_objective_begins_at_its_velocities(tmp_path, objective):
    main([str(PLAIN), "--out", str(tmp_path / "sit"), "--heads", "4"])
    overrides = [f"objective.name={objective}", "objective.scaled=false"][: 2 if objective == "tvm" else 1]
    overrides += ["objective.guidance=[1,3]"] if objective in ("tvm", "imf") else []
    overrides += [f"data.local={tmp_path}", f"init_from={tmp_path}/sit"]
    config = load_config(TrainConfig, "yamls/digits.yaml", overrides)
    weights, facts = import_sit(PLAIN, 4)
    config.model = facts["config"]
    model = GenerativeModel(
        DiT(config.model), config.objective, Normalizer([0.0] * 4, facts["data"]["std"]), 0
    )
    said = begin(model, config)
    assert "new: s_embedder" in said
    assert ("guidance_embedder" in said) == config.objective.guidance_input
    plain = DiT(config.model)
    plain.load_state_dict(weights)
    x, t, label = torch.randn(5, 4, 8, 8), torch.rand(5), torch.arange(5) + 3  # 7: no label
    want = plain(x, t, torch.zeros(5), label).value
    for d in (torch.zeros(5), 0.5 * t):  # the second time changes nothing yet
        for w in config.objective.guidance_range if config.objective.guidance_input else (1.0,):
            beta = config.objective.beta(torch.full((5,), w))
            got = model.net(x, t, d, label, beta).value
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"x": Evil()}, "system"),
        (lambda s: {"ema": s, "opt": Evil()}, "system"),
        (lambda s: [1, 2], "neither a state dict"),
        (lambda s: {"ema": {"a": 1}}, "neither a state dict"),
        (
            lambda s: {k: v for k, v in s.items() if k != "blocks.1.attn.qkv.weight"},
            "blocks.1.attn.qkv.weight",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "pos_embed"}, "pos_embed"),
        (lambda s: s | {"blocks.0.attn.q_norm.weight": torch.ones(16)}, "blocks.0.attn.q_norm.weight"),
        (lambda s: s | {"pos_embed": s["pos_embed"] + 1}, "pos_embed: not the fixed"),
        (lambda s: s | {"blocks.0.mlp.fc2.bias": torch.zeros(3)}, "blocks.0.mlp.fc2.bias"),
        (lambda s: s | {"blocks.0.mlp.fc2.bias": torch.zeros(0)}, "blocks.0.mlp.fc2.bias: its storage is"),
        (lambda s: s | {"x_embedder.proj.weight": torch.zeros(3)}, "not a network of SiT"),
    ],
)
def test_what_is_not_a_sit_is_refused_by_name_and_nothing_is_executed(tmp_path, capsys, change, message):
    torch.save(change(dict(state())), tmp_path / "x.pt")
    assert main([str(tmp_path / "x.pt"), "--out", str(tmp_path / "out"), "--heads", "4"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert not os.path.exists("/tmp/terminal-velocity-was-here")
    assert not list(tmp_path.glob("out*"))


def test_damaged_files_and_unknown_sizes_are_one_line(tmp_path, capsys):
    data = PLAIN.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:5000])
    (tmp_path / "name.pt").write_bytes(b"\xffata.pkl".join(data.rsplit(b"data.pkl", 1)))  # no UTF-8
    for arguments, message in (
        ([str(tmp_path / "cut.pt")], "cut.pt: damaged"),
        ([str(tmp_path / "name.pt")], "name.pt: damaged"),
        ([str(tmp_path / "none.pt")], "none.pt"),
        ([str(PLAIN)], "--heads: needed, width 64 and depth 3"),
        ([str(PLAIN), "--heads", "0"], "model.heads: 0 must be a whole number from 1"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_two_imports_give_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        main([str(PLAIN), "--out", str(tmp_path / name), "--heads", "4"])
    for suffix in ("safetensors", "json"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    weights, _ = import_sit(PLAIN, 4)
    assert weights["s_embedder.mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not weights["s_embedder.mlp.2.weight"].any()


def blocks(state, number):
    """The blocks of a network repeated: as many distinct names as that."""
    first = {k: x for k, x in state.items() if k.startswith("blocks.0.")}
    return state | {k.replace(".0.", f".{i}.", 1): x for i in range(number) for k, x in first.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"pos_embed": torch.zeros(1).expand(1, 16 * 10**6, 10**3)}, "pos_embed: size, stride"),
        (lambda s: s | {"x": torch.zeros(4)[:2]}, "x: size, stride and offset do not cover"),
        (lambda s: s | {"x": s["pos_embed"]}, "x: shared with another tensor"),
        (lambda s: s | {"x": torch.zeros(2, dtype=torch.int64)}, "x: of torch.LongStorage"),
        (lambda s: blocks(s, 100), "blocks.1.attn.qkv.weight: shared with another tensor"),
        (lambda s: s | {f"blocks.{i}.x": torch.zeros(1) for i in range(200)}, "blocks.0.x: shape (1,)"),
        (lambda s: s | {f"blocks.{i}.x": torch.zeros(1) for i in range(2000)}, "model.depth: 2000"),
        (lambda s: s | {"blocks.\n.x": torch.zeros(1)}, "is not the name of a parameter"),
        (lambda s: {k: x for k, x in s.items() if k != "final_layer.linear.bias"}, "final_layer.linear.bias"),
    ],
)
def test_declared_sizes_and_numbers_are_bounded_by_the_file(tmp_path, change, message):
    torch.save(change(dict(state())), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: .*{re.escape(message)}"):
        import_sit(tmp_path / "x.pt", 4)


def rewritten(source, target, change, how=zipfile.ZIP_STORED):
    """A file of torch.save whose data.pkl is another, stored or compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", how) as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, change(content) if info.filename.endswith("data.pkl") else content)


def test_a_pickle_that_is_compressed_or_endless_is_refused_before_it_is_read(tmp_path):
    rewritten(PLAIN, tmp_path / "bomb.pt", lambda _: b"\x80\x02" + b"(" * 10**7, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 10**6
    with pytest.raises(ValueError, match="bomb.pt: .* is compressed, which torch.save never does"):
        import_sit(tmp_path / "bomb.pt", 4)
    rewritten(PLAIN, tmp_path / "long.pt", lambda _: b"\x80\x02" + b"N" * (10**6 + 1))
    with pytest.raises(ValueError, match="long.pt: more than 1000000 pickle operations"):
        import_sit(tmp_path / "long.pt", 4)
    rewritten(PLAIN, tmp_path / "same.pt", lambda content: content)
    assert import_sit(tmp_path / "same.pt", 4)[1] == import_sit(PLAIN, 4)[1]


def test_no_damage_is_a_traceback(tmp_path):
    for path in damaged(PLAIN, tmp_path, 150):
        with suppress(ValueError):
            import_sit(path, 4)


def test_arguments_and_optimizer_state_of_a_checkpoint_are_passed_over(tmp_path):
    content = {
        "ema": state(),
        "model": {},
        "opt": {"state": {}},
        "args": Namespace(model="SiT-XL/2", lr=1e-4),
    }
    torch.save(content, tmp_path / "x.pt")
    weights, _ = import_sit(tmp_path / "x.pt", 4)
    assert torch.equal(weights["blocks.0.attn.qkv.weight"], state()["blocks.0.attn.qkv.weight"])


def test_repas_sit_has_our_time_and_its_projectors_are_left_out(tmp_path, capsys):
    """Its tensors look like SiT's: projectors are a sign of it, else the command says it."""
    torch.save(state(), tmp_path / "x.pt")
    torch.save({"ema": state() | {"projectors.0.0.weight": torch.ones(2, 2)}}, tmp_path / "repa.pt")
    x, t, label = torch.randn(3, 4, 8, 8), torch.rand(3), torch.arange(3)
    nets = {}
    for name, options in (("x", []), ("repa", []), ("x", ["--convention", "repa"])):
        main([str(tmp_path / f"{name}.pt"), "--out", str(tmp_path / "w"), "--heads", "4", *options])
        said = capsys.readouterr().err
        nets[(name, *options)] = load_weights(tmp_path / "w")[0]
        assert ("velocity of REPA" in said) == ((name, *options) != ("x",))
        assert ("as told" in said) == bool(options)
    sit, repa, told = (net(x, t, 0 * t, label).value for net in nets.values())
    assert torch.equal(repa, told)
    torch.testing.assert_close(sit, -nets[("repa",)](x, 1 - t, 0 * t, label).value, rtol=1e-5, atol=1e-6)
