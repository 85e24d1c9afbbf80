"""Published SiT weights: what is taken, what is refused, and a run that begins with them."""

import os
from argparse import Namespace

import pytest
import torch

from eval.import_sit import import_sit, main
from recipe.config import TrainConfig, load_config
from recipe.data import Normalizer
from recipe.dit import DiT
from recipe.model import GenerativeModel
from recipe.warm_start import warm_start
from recipe.weights import read_facts
from tests.test_parity import DATA

PLAIN, TRAIN = DATA / "objectives/sit_a.pt", DATA / "objectives/sit_a_train.pt"


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
    said = warm_start(model, config)
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


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/terminal-velocity-was-here",)


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
        (lambda s: s | {"x_embedder.proj.weight": torch.zeros(3)}, "not a SiT"),
    ],
)
def test_what_is_not_a_sit_is_refused_by_name_and_nothing_is_executed(tmp_path, capsys, change, message):
    torch.save(change(dict(state())), tmp_path / "x.pt")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "x.pt"), "--out", str(tmp_path / "out"), "--heads", "4"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert not os.path.exists("/tmp/terminal-velocity-was-here")
    assert not list(tmp_path.glob("out*"))


def test_damaged_files_and_unknown_sizes_are_one_line(tmp_path, capsys):
    (tmp_path / "cut.pt").write_bytes(PLAIN.read_bytes()[:5000])
    for arguments, message in (
        ([str(tmp_path / "cut.pt")], "cut.pt: refused"),
        ([str(tmp_path / "none.pt")], "none.pt"),
        ([str(PLAIN)], "--heads: needed, width 64 and depth 3"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err.splitlines()[-1]


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
