"""Released weights of iMF, pMF and FD-loss: what their files tell, what is refused, what they begin."""

import os
import re
from contextlib import suppress

import numpy as np
import pytest
import torch

from eval.export import Export
from eval.import_weights import Told, import_weights, main
from eval.sample import main as sample_main
from eval.sweep import Setup, SweepConfig, cells, sweep
from recipe import load
from recipe.config import TrainConfig, load_config
from recipe.generator import Generator, check_interval, default_guidance, usual_steps
from recipe.model import GenerativeModel
from recipe.networks import build
from recipe.normalizer import Normalizer
from recipe.objectives import IMF, TVM, FlowMatching, MeanFlow
from recipe.weights import load_weights, read_facts
from tests.conftest import Evil, begin, damaged, edit, store
from tests.test_parity import DATA

IMF_FILE, PMF_FILE = DATA / "mit/imf_a.pth", DATA / "mit/pmf_a.pth"
LATENT = ["--size", "8", "--mean", "0", "--std", "2"]


def state(path=IMF_FILE):
    return dict(torch.load(path, weights_only=True))


def finished_by_fd_loss(path):
    """The content of a file as FD-loss's training writes it."""
    named = {re.sub("_flax_(linear|embedding)", r"\1", name): x for name, x in state(path).items()}
    content = {"model": {name: x + 1 for name, x in named.items()}, "model_ema": named, "step": 5}
    return {**content, "optimizer": {"state": {0: {"step": torch.tensor(5), "exp_avg": torch.ones(2)}}}}


def command(path, out, *options):
    return main([str(path), "--out", str(out), *options])


def test_the_command_tells_imf_from_pmf_and_says_what_it_has_found(tmp_path, capsys):
    assert command(IMF_FILE, tmp_path / "imf", *LATENT) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"{tmp_path}/imf.json\n", "iMF, noise of deviation 1\n")
    assert command(DATA / "mit/pmf_a_inference.pth", tmp_path / "pmf", "--noise-scale", "2") == 0
    said = capsys.readouterr().err
    assert said.startswith("pMF, noise of deviation 2\nno auxiliary head in the file: iMF trains on with")
    imf, pmf = (read_facts(tmp_path / name) for name in ("imf", "pmf"))
    assert (imf["model"]["output"], pmf["model"]["output"]) == ("v", "x")
    assert (imf["model"]["v_head"], pmf["model"]["v_head"]) == (True, False)
    assert [x["model"]["context"] for x in (imf, pmf)] == [[3, 2, 1, 2], [2, 2, 2, 2]]
    assert [x["model"]["depth"] for x in (imf, pmf)] == [4, 3]
    assert (imf["method"]["guidance"], pmf["method"]["guidance"]) == ([1, 9], [1, 8])
    assert (pmf["method"]["noise_scale"], pmf["method"]["t_mean"]) == (2, 0.8)
    assert (pmf["data"]["column"], pmf["data"]["mean"], pmf["data"]["std"]) == (
        "image",
        [127.5] * 3,
        [127.5] * 3,
    )
    assert (imf["data"]["column"], imf["data"]["std"]) == ("latents", [2] * 4)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("mit/pmf_a_inference.pth", ["--size", "32"], "--size: 32, but its positions are those of 16"),
        (IMF_FILE, ["--size", "0"], "model.size: 0 must be a whole number from 1 to 8192"),
        (IMF_FILE, [*LATENT, "--heads", "2"], "--heads: 2 is not for a file of iMF"),
        (IMF_FILE, [*LATENT, "--guidance", "2"], "--guidance: 2.0 is not for a file of iMF"),
        (IMF_FILE, [*LATENT, "--convention", "repa"], "--convention: repa is not for a file of iMF"),
    ],
)
def test_an_option_that_says_nothing_of_a_file_is_refused(tmp_path, capsys, file, options, message):
    assert command(DATA / file, tmp_path / "x", *options) == 1
    assert capsys.readouterr().err == f"error: {DATA / file}: {message}\n"


def test_a_training_file_of_fd_loss_holds_an_average_and_weights_as_they_are(tmp_path):
    torch.save(finished_by_fd_loss(PMF_FILE), tmp_path / "x.pth")
    plain = import_weights(PMF_FILE).state
    average, net = (import_weights(tmp_path / "x.pth", Told(average=name)) for name in ("ema", "net"))
    assert average.state.keys() == plain.keys()
    for name, x in plain.items():
        assert torch.equal(average.state[name], x)
        assert torch.equal(net.state[name], x + 1)
    assert (average.facts["average"], net.facts["average"]) == ("ema", "net")


def test_two_imports_give_the_same_bytes_and_they_sample(tmp_path):
    for name in ("a", "b"):
        assert command(PMF_FILE, tmp_path / name, "--noise-scale", "2") == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    generator, label = Generator(tmp_path / "a", dtype="fp64"), torch.arange(5)
    with np.load(DATA / "mit/pmf_a_io.npz") as golden:
        noise, want = torch.from_numpy(golden["noise"]) / 2, torch.from_numpy(golden["sample/1"])
        label = torch.from_numpy(golden["label"])
    pixels = (want * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(generator.from_noise(noise, label, 1, 5.0, None, [0.1, 0.7]), pixels)


@pytest.mark.parametrize("file", [IMF_FILE, DATA / "mit/imf_a_inference.pth"], ids=["whole", "inference"])
@pytest.mark.parametrize(
    "target", [IMF(guidance=[1, 9]), TVM(guidance=[1, 2], scaled=False), MeanFlow()], ids=lambda o: o.name
)
def test_a_run_of_any_objective_begins_at_its_velocities(tmp_path, file, target):
    assert command(file, tmp_path / "w", *LATENT) == 0
    config = load_config(
        TrainConfig, "yamls/digits.yaml", [f"data.local={tmp_path}", f"init_from={tmp_path}/w"]
    )
    source, _ = load_weights(tmp_path / "w")
    config.model, config.objective = source.config, target
    model = GenerativeModel(build(config.model), target, Normalizer([0.0] * 4, [2.0] * 4), 0)
    assert "new: none" in begin(model, config)
    x, t, label, w = torch.randn(3, 4, 8, 8), torch.rand(3), torch.arange(3), torch.tensor([1.0, 1.0, 1.0])
    want = source(x, t, 0.3 * t, label, 1 / w).value
    torch.testing.assert_close(model.net(x, t, 0.3 * t, label, target.beta(w)).value, want)
    trained = {name.split(".")[0] for name, p in model.net.named_parameters() if p.requires_grad}
    whole = file == IMF_FILE and target.auxiliary
    assert ("v_blocks" in trained) == whole
    batch = {"image": x, "label": label, "sample": label, "step": 0 * label}
    terms = model(batch).terms
    assert ("error_v" in terms) == whole


def without(name):
    return lambda s: {k: x for k, x in s.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"x": Evil()}, "system"),
        (lambda s: {"model_ema": s, "optimizer": Evil()}, "system"),
        (lambda s: {"model": s}, "neither a state dict"),
        (without("net.u_final_layer.norm.weight"), "not a network of iMF or pMF: 'final_layer.norm.weight'"),
        (without("net.shared_blocks.0.attn.k_proj._flax_linear.weight"), "attn.k_proj.weight: is missing"),
        (without("net.shared_blocks.1.norm1.weight"), "blocks.1.norm1.weight: shape None, expected (64,)"),
        (lambda s: s | {"net.extra": torch.ones(2)}, "extra: shape (2,), expected None"),
        (lambda s: s | {"net.h_embedder.mlp.0._flax_linear.bias": torch.ones(3)}, "s_embedder.mlp.0.bias"),
        (lambda s: s | {"time_tokens": torch.ones(2, 64)}, "two of its names mean the same tensor"),
        (lambda s: s | {f"net.shared_blocks.{i}.x": torch.ones(1) for i in range(2000)}, "model.depth: 2002"),
        (lambda s: s | {"net.x_embedder.proj.weight": torch.ones(3)}, "not a network of iMF or pMF"),
        (lambda s: s | {"net.y": torch.ones(2, dtype=torch.int64)}, "net.y: of torch.LongStorage"),
    ],
)
def test_what_is_not_such_a_network_is_refused_by_name_and_nothing_is_executed(
    tmp_path, capsys, change, message
):
    torch.save(change(state()), tmp_path / "x.pth")
    assert command(tmp_path / "x.pth", tmp_path / "out", *LATENT) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {tmp_path}/x.pth: ")
    assert message in said
    assert not os.path.exists("/tmp/terminal-velocity-was-here")
    assert not list(tmp_path.glob("out*"))


def test_tables_of_rotations_are_left_out_whatever_they_hold(tmp_path):
    torch.save(state() | {"net.rope_freqs": torch.ones(2, 2, dtype=torch.complex64)}, tmp_path / "x.pth")
    told = Told(size=8, mean=[0.0], std=[1.0])
    found, plain = (import_weights(path, told).state for path in (tmp_path / "x.pth", IMF_FILE))
    assert found.keys() == plain.keys()


def test_no_damage_is_a_traceback(tmp_path):
    for path in damaged(PMF_FILE, tmp_path, 100):
        with suppress(ValueError):
            import_weights(path)


def test_the_guidance_interval_is_an_option_of_samples_and_an_axis_of_sweeps(tmp_path, capsys):
    assert command(PMF_FILE, tmp_path / "w") == 0
    grids = {}
    for interval in ("0,1", "0.1,0.7", None):
        told = ["--interval", interval] if interval else []
        sample_main(
            [str(tmp_path / "w"), "--w", "5", "--out", str(tmp_path / "x.png"), "--columns", "1", *told]
        )
        grids[interval] = (tmp_path / "x.png").read_bytes()
    assert grids["0,1"] == grids[None] != grids["0.1,0.7"]
    for wrong in ("0.7,0.1", "0.5", "a,b", "0,2"):
        with pytest.raises(SystemExit):
            sample_main([str(tmp_path / "w"), "--interval", wrong, "--out", str(tmp_path / "x.png")])
        assert f"--interval: {wrong} must be two times such as 0.4,0.65" in capsys.readouterr().err
    pictures = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), np.uint8)
    store(tmp_path / "real", pictures, np.arange(20) % 5, list("abcde"))
    given = [
        f"folder={tmp_path}/sweep",
        f"weights={tmp_path}/w",
        f"reference={tmp_path}/real",
        "nfe=1",
        "w=5",
    ]
    given += ["extractor=pixels:4", "floor_splits=0", "interval=[[0.1, 0.7], [0, 1]]", "dtype=fp64"]
    rows = sweep(load_config(SweepConfig, None, given))
    assert [row["interval"] for row in rows] == [[0.1, 0.7], [0, 1]]
    assert "| 0.1 to 0.7 |" in (tmp_path / "sweep/results.md").read_text()
    assert rows[0]["frechet_distance"] != pytest.approx(rows[1]["frechet_distance"], rel=1e-6)
    plain = sweep(load_config(SweepConfig, None, [*given[:-2], "dtype=fp64"]))
    assert "interval" not in plain[0]  # scored anew: a row of an interval is of another cell
    assert plain[0]["frechet_distance"] == pytest.approx(rows[1]["frechet_distance"], rel=1e-9)
    facts = {**read_facts(tmp_path / "w"), "method": FlowMatching().facts()}
    with pytest.raises(ValueError, match="interval: .* is for iMF on the network mit, not for these weights"):
        check_interval(facts, [0.1, 0.7])


def test_finished_weights_are_sampled_at_what_they_were_finished_at(tmp_path):
    assert command(PMF_FILE, tmp_path / "w") == 0
    plain = load(tmp_path / "w")
    asked = {"labels": [0, 1], "n": 2, "nfe": 1}
    wanted = plain.sample(**asked, w=5.0, interval=(0.1, 0.7))
    assert not np.array_equal(wanted, plain.sample(**asked, w=5.0))
    assert not np.array_equal(wanted, plain.sample(**asked))
    how = {"extractor": "pixels", "nfe": 2, "w": 5.0, "interval": [0.1, 0.7]}
    edit(tmp_path / "w.json", lambda facts: facts.update(finished=[{"extractor": "old", "steps": 3}, how]))
    finished = load(tmp_path / "w")
    assert np.array_equal(finished.sample(**asked), wanted)
    assert np.array_equal(finished.sample(**asked, interval=(0, 1)), plain.sample(**asked, w=5.0))
    sample_main([str(tmp_path / "w"), "--labels", "0,1", "--samples", "2", "--out", str(tmp_path / "x.npz")])
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], wanted)
    assert (usual_steps(finished.facts), usual_steps(plain.facts)) == (2, 1)
    assert default_guidance(finished.facts) == (5.0, [0.1, 0.7])
    export = Export(tmp_path / "w.json", finished.facts)
    config = SweepConfig(folder="x", weights=["w"], reference="r", nfe=[1])
    setup = Setup(config, [export], [torch.zeros(2)], {}, None, 2)
    assert [(cell["w"], cell["interval"]) for _, _, cell in cells(setup)] == [(5.0, [0.1, 0.7])]
    edit(tmp_path / "w.json", lambda facts: facts["finished"].append({"steps": 60, **how, "w": 9.0}))
    gone_on = load(tmp_path / "w")  # in a run of another objective, after the finish
    assert np.array_equal(gone_on.sample(**asked), plain.sample(**asked))
    edit(tmp_path / "w.json", lambda facts: facts["finished"][0].update(interval=[0.7, 0.1]))
    with pytest.raises(ValueError, match=r"finished\[0\].interval: \[0.7, 0.1\] must be two times"):
        load(tmp_path / "w")


def test_latents_of_another_size_need_their_normalisation(tmp_path, capsys):
    assert command(IMF_FILE, tmp_path / "w", "--size", "8") == 1
    assert capsys.readouterr().err.endswith("give --mean and --std\n")
    assert command(IMF_FILE, tmp_path / "w") == 0  # 32 x 32, as published
    facts = read_facts(tmp_path / "w")
    assert (facts["model"]["size"], facts["data"]["mean"][0]) == (32, 0.86488)
