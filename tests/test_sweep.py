"""Sweeps over a short real run: resume, ranks, metrics, report."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from eval import sweep as sweep_module
from eval.export import Export, export_program, find_weights
from eval.reference import HeldOut, open_images
from eval.reference import main as reference_main
from eval.report import (
    best_curve,
    html_page,
    markdown,
    plain,
    plot_distances,
    plot_extractors,
    plot_samples,
    read_lines,
    read_log,
    write,
)
from eval.sweep import main as sweep_main
from recipe.features import Pixels, SmallImageClassifier, load_extractor
from recipe.objectives import OBJECTIVES
from recipe.pretrained import hash_weights
from recipe.reference import content_digest, labelled, make_extractor
from recipe.weights import load_weights, save_weights
from streaming_convert.__main__ import main as convert
from tests.conftest import ROOT, refusal, run
from tests.test_convert_resume import bucket  # noqa: F401

PUBLIC = {"nfe", "w", "frechet_distance", "class_agreement", "floor", "objective", "weights", "seconds"}
PUBLIC |= {
    "protocol",
    "labels",
    "rounding",
    "seed",
    "samples",
    "commit",
    "time",
    "extractor",
    "reference",
    "dtype",
}


@pytest.fixture(scope="module")
def classifier(digits, tmp_path_factory):
    """Path of a classifier of the digits, trained once for this file."""
    path = tmp_path_factory.mktemp("classifier") / "classifier"
    SmallImageClassifier.train(*labelled(open_images(digits)), path=path)
    return path


def sweep(tiny_run, digits, classifier, folder, *overrides, yaml="yamls/eval/digits.yaml"):
    """Runs a sweep in this process; returns its rows."""
    common = [f"weights=[{tiny_run}/weights]", f"reference={digits}", f"folder={folder}"]
    sweep_main(
        [yaml, *common, f"extractor_weights={classifier}", "samples=200", "floor_splits=2", *overrides]
    )
    return read_lines(folder / "results.jsonl")


def test_an_interrupted_sweep_continues_and_ends_with_the_same_table(
    tiny_run, digits, classifier, tmp_path, monkeypatch, capsys
):
    folder, grid = tmp_path / "sweep", ["averages=[ema,net]", "nfe=[1,2]", "w=[1.25]", f"labels={digits}"]
    read, manifests = sweep_module.read_manifest, []
    monkeypatch.setattr(sweep_module, "read_manifest", lambda uri: manifests.append(uri) or read(uri))
    rows = sweep(tiny_run, digits, classifier, folder, *grid)
    complete, table = (folder / "results.jsonl").read_text(), (folder / "results.md").read_text()
    assert len(rows) == 8
    assert manifests == [str(digits)]  # once, whatever the number of weights and cells
    assert set(rows[0]) >= PUBLIC
    assert all(np.isfinite(r["frechet_distance"]) and r["classifier_accuracy"] > 0.98 for r in rows)
    (folder / "results.jsonl").write_text(complete[: len(complete) * 2 // 3])
    scored = []
    score = sweep_module.score
    monkeypatch.setattr(sweep_module, "score", lambda *a: scored.append(a[1]) or score(*a))
    capsys.readouterr()
    again = sweep(tiny_run, digits, classifier, folder, *grid)
    assert len(scored) == 3
    assert "results.jsonl, line 6 is damaged: its cell is scored again" in capsys.readouterr().err
    assert (folder / "results.md").read_text() == table
    assert again[:5] == rows[:5]
    assert [r["frechet_distance"] for r in again] == [r["frechet_distance"] for r in rows]


ROW = {"weights": "runs/a/weights/ba1-ema", "sha256": "", "objective": "tvm", "average": "ema", "step": 1}
ROW |= {"nfe": 1, "w": 1.0, "frechet_distance": 2.0, "floor": None, "class_agreement": 0.5, "prompts": ""}
ROW |= {"extractor": "classifier", "classifier_accuracy": 1.0, "reference": "data/a/train", "dtype": "fp32"}
ROW |= {"seed": 0, "samples": 9, "train_seconds": 3.0, "time": "2026-01-01", "commit": "abc", "encoder": ""}


def test_lines_that_are_no_results_are_named_and_count_for_nothing(tmp_path, capsys):
    damaged = ["[1]", "7", '{"weights": ', "\xff", "[" * 100_000, "{}", '{"nfe": 1}']
    for change in (
        {"frechet_distance": None},
        {"frechet_distance": float("nan")},
        {"frechet_distance": "2.0"},
        {"step": "1"},
        {"weights": 3},
        {"time": 5},
        {"train_seconds": "x"},
        {"class_agreement": [1]},
        {"retrieval": 0.1, "encoder": None, "prompts": 4, "samples": 0, "nearer_share": 1},
    ):
        damaged.append(json.dumps({**ROW, **change}))
    file = tmp_path / "results.jsonl"
    file.write_bytes("\n".join([json.dumps(ROW), *damaged, json.dumps(ROW), ""]).encode("latin-1"))
    assert sweep_module.read_finished(file) == [ROW, ROW]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"warning: {file}, line {number} is damaged: its cell is scored again"
        for number in range(2, 2 + len(damaged))
    ]


@pytest.mark.parametrize("names", [["a"], "ab", {"a": 1, "b": 2}, ["a", None], 7])
def test_names_that_do_not_fit_the_classes_are_refused(names):
    export = Export("x.json", {"data": {"class_names": names}, "model": {"classes": 2}})
    with pytest.raises(ValueError, match=r"weights: x.json: data.class_names must name 2 classes, found"):
        sweep_module.check_class_names([export])
    for good in (["a", "b"], [], None):
        facts = {"data": {"class_names": good}, "model": {"classes": 2}}
        sweep_module.check_class_names([Export("x.json", facts)])


@pytest.mark.parametrize("name", ["classifier", "pixels"])
def test_weights_and_extractor_must_be_of_one_shape(classifier, name):
    extractor = Pixels((1, 8, 8), 4) if name == "pixels" else load_extractor("classifier", str(classifier))
    for shape, fits in (((1, 8), True), ((1, 16), False), ((3, 8), False)):
        model = dict(zip(("channels", "size"), shape, strict=True))
        exports = [Export("x.json", {"data": {"column": "image"}, "model": model})]
        with (
            nullcontext()
            if fits
            else pytest.raises(ValueError, match=f"{name} takes those of 1 channels and 8x8")
        ):
            sweep_module.check_shapes(exports, extractor)


def test_the_key_of_a_cell_has_the_weights_of_its_extractor(classifier, tmp_path):
    (tmp_path / "reference.npz").write_bytes(b"statistics")
    extractor = load_extractor("classifier", str(classifier))
    first = content_digest(str(tmp_path / "reference.npz"), extractor)
    assert content_digest(str(tmp_path / "reference.npz"), load_extractor("classifier", classifier)) == first
    extractor.network[0].weight[0, 0, 0, 0] += 1
    assert content_digest(str(tmp_path / "reference.npz"), extractor) != first


def test_a_plain_folder_as_reference_says_which_extractors_work(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for images, what in ((open_images(tmp_path), "plain folder of pictures"), (None, "file of statistics")):
        with pytest.raises(
            ValueError, match=f"the reference is a {what}. Fix: set extractor=inception-2015 or"
        ):
            make_extractor("classifier", None, images, str(tmp_path), "cpu")


def test_text_of_files_is_shown_as_it_stands():
    script, link = "<script>alert(1)", "[x](javascript:y) a|b *c*\n# d"
    row = {**ROW, "weights": f"{script}/weights/ba1 | x", "reference": link, "extractor": script}
    text = markdown([row], "Protocol `tvm`.", [script])
    assert "<script" not in text and text.count("&lt;script&gt;") == 3
    assert r"\[x\](javascript:y) a\|b \*c\* # d" in text
    head, rule, line, *_ = text.splitlines()
    assert head.count("|") == rule.count("|") == line.count("|") - line.count(r"\|")
    page = html_page([row], [script], script, {})
    assert "<script" not in page and page.count("&lt;script&gt;") == 4
    usual = "digits_cpu/ba0002400-ema, w = 1.25: 0.612 (0.5) +- 0.1, `tvm`."
    assert plain(usual) == usual


def test_the_hash_in_a_snapshots_json_leads_nowhere(tiny_run, tmp_path):
    net, facts = load_weights(tiny_run / "weights/ba0000008-ema")
    facts = {k: v for k, v in facts.items() if k not in ("model", "format")}
    folder = tmp_path / "run/weights"
    for length in (0.05, 0.1):
        description = {**facts, "average": f"posthoc:{length}"}
        file = save_weights(folder / f"ba8-posthoc_{length}", net.state_dict(), net.config, description)
        file.write_text(file.read_text().replace(json.loads(file.read_text())["sha256"], "/../../e"))
    (tmp_path / "sweep/posthoc/run-").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="sha256: '/../../e' must match"):
        find_weights([str(folder)], ["posthoc:0.075"], False, tmp_path / "sweep")
    assert sorted(tmp_path.rglob("*")) == before


def test_labels_are_drawn_as_they_stand(tmp_path):
    figure, panel = plt.subplots()
    write(panel.title, "$\\frac$ \u732b \U0001f600 cat")
    figure.savefig(tmp_path / "drawn.png")
    assert panel.title.get_text().startswith("$")
    plt.close(figure)


def test_a_cell_is_scored_again_when_its_inputs_have_changed(tiny_run, digits, classifier, tmp_path):
    statistics = tmp_path / "statistics.npz"
    grid = ["nfe=[1]", "latest=true", f"reference={statistics}", "floor_splits=0"]
    for shift in (0.0, 1.0):
        np.savez(statistics, mu=np.full(64, shift), sigma=np.eye(64))
        rows = sweep(tiny_run, digits, classifier, tmp_path / "sweep", *grid)
    assert len(rows) == 2
    assert rows[0]["frechet_distance"] != rows[1]["frechet_distance"]
    for changes in (["protocol=tvm"], ["seed=1"], []):
        rows = sweep(tiny_run, digits, classifier, tmp_path / "sweep", *grid, *changes)
    assert len(rows) == 4


def test_averages_of_two_runs_do_not_take_each_others_place(tiny_run, tmp_path):
    net, facts = load_weights(tiny_run / "weights/ba0000008-ema")
    facts = {k: v for k, v in facts.items() if k not in ("model", "format")}
    folders = [tmp_path / run / "x/weights" for run in "ab"]
    for factor, folder in enumerate(folders):
        for length in (0.05, 0.1):
            state = {name: factor * tensor for name, tensor in net.state_dict().items()}
            description = {**facts, "average": f"posthoc:{length}"}
            save_weights(folder / f"ba8-posthoc_{length}", state, net.config, description)
    found = find_weights(list(map(str, folders)), ["posthoc:0.075"], False, tmp_path)
    assert len({export.path for export in found}) == len({export.facts["sha256"] for export in found}) == 2


def test_the_report_is_one_page_with_everything_on_it(tiny_run, digits, classifier, tmp_path):
    (row,) = sweep(tiny_run, digits, classifier, tmp_path, "nfe=[1]", "latest=true", "protocol=tvm")
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "Protocol tvm: 200 samples (the protocol&#x27;s number is 50,000)" in page
    assert f"<td>{row['frechet_distance']:.3f}</td>" in page
    assert (row["labels"], row["rounding"]) == ("drawn", "down")


def test_every_metric_and_weights_of_unknown_step(tiny_run, digits, classifier, tmp_path):
    net, facts = load_weights(tiny_run / "weights/ba0000008-ema")
    facts = {k: v for k, v in facts.items() if k not in ("model", "format")}
    save_weights(tmp_path / "other/weights/a", net.state_dict(), net.config, {**facts, "step": None})
    names = f"weights=[{tmp_path}/other/weights,{tiny_run}/weights/ba0000008-ema]"
    rows = sweep(
        tiny_run, digits, classifier, tmp_path, names, "nfe=[1]", "metrics=[fd,kid,is,precision_recall]"
    )
    assert [r["step"] for r in rows] == [None, 8]
    for name in ("frechet_distance", "kid", "inception_score", "precision", "recall"):
        assert rows[0][name] == rows[1][name]
    assert 0 <= rows[0]["precision"] <= 1 < rows[0]["inception_score"] <= 10
    header = (tmp_path / "results.md").read_text().splitlines()[0]
    assert "KID x 1000 | Inception score | precision | recall" in header


def test_weights_of_every_objective_are_scored_side_by_side(tiny_run, digits, classifier, tmp_path):
    net, facts = load_weights(tiny_run / "weights/ba0000008-ema")
    facts = {k: v for k, v in facts.items() if k not in ("model", "format")}
    names = [name for name, objective in OBJECTIVES.items() if not objective.finishes]
    for name in names:
        facts["method"] = OBJECTIVES[name]().facts()
        save_weights(tmp_path / f"weights/{name}", net.state_dict(), net.config, facts)
        program = export_program(tmp_path / f"weights/{name}").module()
        assert program(torch.randn(3, 1, 8, 8), torch.arange(3)).shape == (3, 1, 8, 8)
    given = ("latest=false", "samples=50", "nfe=[1,2]", f"weights=[{tmp_path}/weights]")
    rows = sweep(tiny_run, digits, classifier, tmp_path / "sweep", *given)
    assert {(row["objective"], row["nfe"]) for row in rows} == {(name, n) for name in names for n in (1, 2)}
    assert all(np.isfinite(row["frechet_distance"]) for row in rows)
    text = (tmp_path / "sweep/results.md").read_text()
    assert all(f"| {name} |" in text for name in names)


def test_two_ranks_and_batches_of_one_give_the_same_numbers(tiny_run, digits, classifier, tmp_path):
    grid = ["nfe=[2]", "latest=true", "dtype=fp64", "metrics=[fd,kid,is,precision_recall]", "samples=60"]
    (whole,) = sweep(tiny_run, digits, classifier, tmp_path / "50", *grid, "batch_size=50")
    (single,) = sweep(tiny_run, digits, classifier, tmp_path / "1", *grid, "batch_size=1")
    arguments = ["yamls/eval/digits.yaml", f"weights=[{tiny_run}/weights]", f"reference={digits}", *grid]
    arguments += [
        f"folder={tmp_path}/ranks",
        f"extractor_weights={classifier}",
        "floor_splits=2",
        "batch_size=7",
    ]
    run("eval/sweep.py", *arguments, ranks=2)
    (ranks,) = read_lines(tmp_path / "ranks/results.jsonl")
    keys = ("frechet_distance", "kid", "inception_score", "precision", "recall", "floor", "class_agreement")
    for key in keys:
        assert single[key] == pytest.approx(whole[key], rel=1e-9, abs=1e-12)
        assert ranks[key] == pytest.approx(whole[key], rel=1e-9, abs=1e-12)


def test_a_file_of_statistics_is_a_reference(tiny_run, digits, classifier, tmp_path):
    statistics = tmp_path / "statistics.npz"
    options = ["--extractor", "classifier", "--weights", str(classifier), "--out", str(statistics)]
    assert reference_main([str(digits), *options]) == 0
    (by_file,) = sweep(
        tiny_run, digits, classifier, tmp_path / "a", f"reference={statistics}", "nfe=[1]", "latest=true"
    )
    (by_folder,) = sweep(tiny_run, digits, classifier, tmp_path / "b", "nfe=[1]", "latest=true")
    assert by_file["frechet_distance"] == pytest.approx(by_folder["frechet_distance"], rel=1e-9)
    assert by_file["floor"] is None
    assert "/ floor" not in (tmp_path / "a/results.md").read_text()


@pytest.fixture(scope="module")
def split(digits, tmp_path_factory):
    """Folder of the digits with a fifth of them in val/."""
    folder = tmp_path_factory.mktemp("split")
    assert convert(["digits", "--out", str(folder), "--val", "0.2", "--workers", "1"]) == 0
    return folder


def test_a_copying_sampler_is_found_out_and_new_images_are_not(split, classifier):
    extractor = load_extractor("classifier", str(classifier))
    images = labelled(open_images(split / "train"))[0]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    seen, new = images[:400], images[400:]
    reference = SimpleNamespace(extractor=extractor, features=extractor(seen), images=seen)
    held_out = HeldOut(str(split / "val"), reference, 1000, 256, draws=20, seed=0)
    assert (held_out.count, held_out.near.shape) == (200, (359,))
    noise = torch.randint(-2, 3, seen.shape, generator=torch.Generator().manual_seed(0))
    found = held_out.compare(extractor((seen.int() + noise).clamp(0, 255).to(torch.uint8)))
    assert found["nearer_share"] > 0.99
    assert found["distance_to_training"] < 0.7 * found["real_to_training"][0]
    assert found["distance_to_held_out"] == pytest.approx(found["real_to_held_out"][0], rel=0.2)

    # 1038 real digits that the reference does not hold: neither nearer nor farther, but for chance.
    features = extractor(new)
    found = held_out.compare(features)
    near, theirs = (torch.cdist(f, reference.features).min(1).values for f in (features, held_out.features))
    pairs = near[:, None] - theirs
    share = ((pairs < 0).double() + (pairs == 0).double() / 2).mean()
    assert found["nearer_share"] == pytest.approx(float(share), abs=1e-9)
    assert found["nearer_share"] == pytest.approx(0.5, abs=4 * (1398 / (12 * 1038 * 359)) ** 0.5)
    for name in ("to_training", "to_held_out"):
        assert found[f"distance_{name}"] == pytest.approx(found[f"real_{name}"][0], rel=0.35)
    # Ties count half: the held-out images themselves.
    assert held_out.compare(held_out.features)["nearer_share"] == pytest.approx(0.5, abs=1e-12)


def test_a_sweep_with_held_out_images_says_what_is_new(tiny_run, split, classifier, tmp_path):
    names = [f"reference={split}/train", f"held_out={split}/val", "nfe=[1,2]", "latest=true"]
    rows = sweep(tiny_run, None, classifier, tmp_path, *names)
    assert [r["equal_numbers"] for r in rows] == [200, 200]
    assert rows[0]["real_to_held_out"] == rows[1]["real_to_held_out"]
    assert rows[0]["real_to_held_out"][0] < rows[0]["distance_to_held_out"]
    assert rows[0]["nearer_share"] < 0.1  # eight steps make noise, which is near to nothing
    table = (tmp_path / "results.md").read_text()
    assert "to training (real) | to held-out (real) | nearer than held-out |" in table.splitlines()[0]
    both = (rows[0][key] for key in ("distance_to_held_out", "real_to_held_out"))
    assert "{:.3f} ({[0]:.3f})".format(*both) in table
    chance = (560 / (12 * 200 * 359)) ** 0.5
    assert f"0.500 +- {chance:.3f} where nothing is copied" in table
    page = (tmp_path / "report.html").read_text()
    assert "Samples of 1, 2 steps, each above its nearest training image" in page
    drawn = np.array(Image.open(tmp_path / "nearest.png"))[:, :, 0]
    assert drawn.shape == (5 * 34 + 2, 20 * 34 + 2)  # two pairs, a gap; 4 x 4 for each pixel
    train = labelled(open_images(split / "train"))[0][:, 0].numpy()
    sample, real = drawn[2:34:4, 2:34:4], drawn[36:68:4, 2:34:4]
    assert (train == real).all((1, 2)).any() and not (train == sample).all((1, 2)).any()
    again = sweep(tiny_run, None, classifier, tmp_path, *names[:1], *names[2:])
    assert len(again) == 4  # without held-out images these are other cells


@pytest.mark.parametrize("held_out", [False, True])
def test_several_extractors_in_one_pass_equal_a_sweep_with_each(
    tiny_run, split, classifier, tmp_path, held_out
):
    common = (f"reference={split}/train", "nfe=[1]", "latest=true", "floor_splits=3")
    common += (f"held_out={split}/val",) if held_out else ()
    (row,) = sweep(
        tiny_run, None, classifier, tmp_path / "all", *common, "extractor=[classifier,pixels,pixels:4]"
    )
    names = ["frechet_distance", "floor"]
    if held_out:
        names += ["distance_to_training", "distance_to_held_out", "real_to_held_out", "nearer_share"]
    ratios = []
    for name, key in (("classifier", ""), ("pixels", "[pixels]"), ("pixels:4", "[pixels:4]")):
        (alone,) = sweep(tiny_run, None, classifier, tmp_path / name, *common, f"extractor={name}")
        assert alone["extractor"] == name and not any("[" in column for column in alone)
        assert (alone["class_agreement"] == row["class_agreement"]) == (name == "classifier")
        for column in names:
            assert row[column + key] == pytest.approx(alone[column], rel=1e-12), (column, key)
        if held_out:
            ratios.append(alone["distance_to_held_out"] / alone["real_to_held_out"][0])
            assert alone["FDr"] == pytest.approx(ratios[-1], rel=1e-12)
    assert row["frechet_distance[pixels]"] != row["frechet_distance[pixels:4]"]
    head, _, line, *notes = (tmp_path / "all/results.md").read_text().splitlines()
    assert r"| Frechet distance \[pixels\] | / floor \[pixels\] |" in head
    shown = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    title = r"Frechet distance \[pixels:4\]"
    assert shown[title] == f"{row['frechet_distance[pixels:4]']:.3f}"
    assert any("Features: classifier, pixels, pixels:4, the first of held-out acc" in note for note in notes)
    assert ("FDr" in row) == ("FDr |" in head) == held_out
    if held_out:
        assert row["FDr"] == pytest.approx(sum(ratios) / 3, rel=1e-12)
        assert shown["FDr |"] == f"{row['FDr']:.3f} |"
        assert shown[r"/ real \[pixels\]"] == f"{ratios[1]:.3f}"


def test_weights_that_were_finished_on_an_extractor_are_marked_and_others_are_not(
    tiny_run, digits, classifier, tmp_path
):
    digest = hash_weights(load_extractor("classifier", str(classifier)).network)
    other = {"extractor": "dinov2-vitl14", "weights": "0" * 16, "reference": "data/x/train"}
    finished = {
        "never": None,
        "elsewhere": [other],
        "by_hash": [{**other, "weights": digest}, other],
        "pooled": [{**other, "extractor": "pixels:4"}],
    }
    net, facts = load_weights(tiny_run / "weights/ba0000008-ema")
    for name, said in finished.items():
        facts = {k: v for k, v in facts.items() if k not in ("model", "format", "finished")}
        facts |= {"finished": said} if said else {}
        save_weights(tmp_path / f"{name}/weights/ba8-ema", net.state_dict(), net.config, facts)
    weights = f"weights=[{','.join(f'{tmp_path}/{name}/weights' for name in finished)}]"
    folder, options = tmp_path / "sweep", ("nfe=[1,2]", "extractor=[classifier,pixels:4]")
    rows = sweep(tiny_run, digits, classifier, folder, weights, *options)
    trained = {row["weights"].split("/")[-3]: {key for key in row if "trained_on" in key} for row in rows}
    expected = {"never": set(), "elsewhere": set(), "by_hash": {"trained_on"}}
    assert trained == {**expected, "pooled": {"trained_on[pixels:4]"}}
    text = (folder / "results.md").read_text()
    for row in rows:
        (line,) = (
            x for x in text.splitlines() if row["weights"].split("/")[-3] in x and f"| {row['nfe']} |" in x
        )
        for key in ("", "[pixels:4]"):
            mark = " (trained on)" if f"trained_on{key}" in row else ""
            assert f"| {row[f'frechet_distance{key}']:.3f}{mark} |" in line
    assert "(trained on): the weights were finished on this extractor" in text
    page = (folder / "report.html").read_text()
    assert page.count("(trained on)</td>") == 4
    assert sweep(tiny_run, digits, classifier, folder, weights, *options) == rows
    never = f"weights=[{tmp_path}/never/weights]"
    sweep(tiny_run, digits, classifier, folder, never, *options)
    assert "trained on" not in (folder / "results.md").read_text()


def test_weights_that_were_finished_have_a_curve_of_their_own():
    rows = [
        {**ROW, "nfe": n, "frechet_distance": d, **({"trained_on": True} if d < 1 else {})}
        for n, d in ((1, 3.0), (2, 2.0), (1, 0.5))
    ]
    _, panel = plt.subplots()
    plot_distances(panel, rows, "nfe")
    curves = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert curves == {"samples": [[1, 3], [2, 2]], "samples (trained on)": [[1, 0.5]]}
    plt.close()


def test_over_steps_several_extractors_are_drawn_by_what_real_images_score():
    further = {"extractor": "classifier, pixels", "floor": 0.5, "floor[pixels]": None, "trained_on": True}
    rows = [
        {**ROW, **further, "step": s, "frechet_distance": d, "frechet_distance[pixels]": 9.0}
        for s, d in ((20, 1.0), (10, 3.0), (10, 2.0))
    ]
    for row in rows:
        row["ratio_to_held_out[pixels]"] = row["step"] / 10
    _, panel = plt.subplots()
    plot_extractors(panel, rows)
    curves = [(line.get_label(), line.get_xydata().tolist()) for line in panel.lines]
    assert curves[0] == ("classifier (trained on)", [[10, 4], [20, 2]])
    assert curves[1][1] == [[10, 1], [20, 2]]  # dashed: held out
    assert len(curves) == 2
    plt.close()


def test_a_sweep_over_w_draws_a_line_for_each_nfe():
    rows = [
        {"objective": "tvm", "average": "ema", "nfe": n, "w": w, "frechet_distance": d, "floor": 0.5}
        for n, w, d in ((1, 2.0, 3.0), (1, 1.0, 4.0), (2, 1.0, 2.0), (2, 2.0, 1.0), (2, 2.0, 5.0))
    ]
    _, panel = plt.subplots()
    plot_distances(panel, rows, "w")
    curves = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert curves["1 NFE"] == [[1, 4], [2, 3]]
    assert curves["2 NFE"] == [[1, 2], [2, 1]]
    assert panel.get_xlabel() == "guidance weight w"
    plt.close()


def test_wandb_gets_the_rows_when_asked_to(tiny_run, digits, classifier, tmp_path):
    sweep(tiny_run, digits, classifier, tmp_path, "nfe=[1]", "latest=true", "wandb=offline")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weights=[nowhere]"], "nowhere"),
        (["nfe=[0]"], "nfe"),
        (["averages=[raw]"], "averages[0]: 'raw' must be ema, net"),
        (
            ["averages=[posthoc:0.5]"],
            "averages[0]: 'posthoc:0.5' must be ema, net or posthoc:LENGTH with a length in (0, 0.289]",
        ),
        (["averages=[posthoc:0.1]"], "holds no weights with average in ['posthoc:0.1']"),
        (["w=[-1]"], "w[0]: -1 must be more than 0"),
        (["w=[.nan]"], "w[0]: nan must be a finite number"),
        (["samples=5", "metrics=[fd,is]"], "samples: 5 must be at least 10 for metrics fd, is"),
        (["folder=/proc/x"], "/proc/x"),
        (["protocol=fid"], "protocol: 'fid' must be 'matched', 'tvm', 'balanced' or 'adm'"),
        (["metrics=[kid]"], "metrics: ['kid'] must hold fd"),
        (["samples=33", "protocol=balanced"], "samples: 33 is not a multiple of the 10 classes"),
        (["reference=nowhere"], "nowhere: no such folder"),
        (["held_out=nowhere"], "nowhere: no such folder"),
        (["held_out=nowhere", "floor_splits=0"], "held_out: needs floor_splits"),
        (["held_out=x", "reference=none.npz", "samples=50"], "held_out: need a folder of real images"),
        (["reference=none.npz"], "samples: "),
        (["reference=none.npz", "samples=50"], "none.npz"),
        (["extractor_weights=nowhere/x"], "nowhere/x"),
        (
            ["extractor=vgg"],
            "extractor: 'vgg' must be classifier, classifier:SEED (from 1), pixels, pixels:POOL",
        ),
        (["extractor=[classifier,classifier:0]"], "extractor[1]: 'classifier:0' must be classifier"),
        (["extractor=[classifier,pixels:3]"], "pixels: squares of 3 must divide images of 8x8 pixels"),
        (["extractor=[pixels,pixels]"], "extractor: ['pixels', 'pixels'] names one of them twice"),
        (["extractor=[]"], "extractor: [] must"),
        (
            ["extractor=[classifier,pixels]", "reference=none.npz", "samples=50"],
            "extractor: ['classifier', 'pixels'] need a folder of real images as reference",
        ),
        (
            ["reference=none.npz", "samples=50", "metrics=[fd,kid]"],
            "metrics: kid need a folder of real images",
        ),
    ],
)
def test_sweep_settings_are_checked(tiny_run, digits, classifier, tmp_path, overrides, message):
    arguments = [f"weights=[{tiny_run}/weights]", f"reference={digits}", f"folder={tmp_path}"]
    arguments += [f"extractor_weights={classifier}", *overrides]
    said = refusal(SystemExit, sweep_main, ["yamls/eval/digits.yaml", *arguments])
    assert said.startswith("config error: ") and message in said


def test_held_out_images_must_not_be_in_the_reference(tiny_run, digits, split, classifier, tmp_path):
    arguments = [f"weights=[{tiny_run}/weights]", f"reference={digits}", f"folder={tmp_path}"]
    arguments += [f"extractor_weights={classifier}", f"held_out={split}/val"]
    with pytest.raises(SystemExit, match="held_out: 359 of the 359 images are in the reference as well"):
        sweep_main(["yamls/eval/digits.yaml", *arguments])
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    with pytest.raises(SystemExit, match=r"holds images \(3, 8, 8\), the reference \(1, 8, 8\)"):
        sweep_main(["yamls/eval/digits.yaml", *arguments, f"held_out={tmp_path}"])


def test_every_sweep_that_we_ship_is_valid():
    from recipe.config import load_config

    configs = {
        p.name: load_config(sweep_module.SweepConfig, str(p), []) for p in ROOT.glob("yamls/eval/*.yaml")
    }
    assert configs["imagenet256.yaml"].protocol == "tvm"
    assert configs["digits.yaml"].protocol == "matched"
    assert configs["digits_heldout.yaml"].held_out == "data/digits_heldout/val"


def test_the_newest_weights_come_first(tiny_run, tmp_path):
    found = find_weights([f"{tiny_run}/weights"], ["ema", "net"], False, tmp_path)
    assert [export.path.stem[2:] for export in found] == [
        "0000008-net",
        "0000008-ema",
        "0000004-net",
        "0000004-ema",
    ]
    latest = find_weights([f"{tiny_run}/weights"], ["ema"], True, tmp_path)
    assert [export.facts["step"] for export in latest] == [8]


def test_weights_in_a_bucket_are_found_and_copied_once(tiny_run, tmp_path, bucket):  # noqa: F811
    for file in sorted((tiny_run / "weights").iterdir()):
        bucket.upload_file(str(file), "data", f"run/weights/{file.name}")
    found = find_weights(["s3://data/run/weights"], ["ema"], False, tmp_path)
    local = find_weights([f"{tiny_run}/weights"], ["ema"], False, tmp_path)
    assert [export.facts for export in found] == [export.facts for export in local]
    weights = found[0].path.with_suffix(".safetensors")
    assert weights.read_bytes() == local[0].path.with_suffix(".safetensors").read_bytes()
    copied = weights.stat().st_mtime_ns
    find_weights(["s3://data/run/weights"], ["ema"], False, tmp_path)
    assert weights.stat().st_mtime_ns == copied
    (newest,) = find_weights(["s3://data/run/weights"], ["ema"], True, tmp_path / "latest")
    assert newest.facts == found[0].facts
    assert {file.name[:9] for file in newest.path.parent.iterdir()} == {"ba0000008"}


def test_a_curve_takes_the_lowest_distance_and_leaves_out_unknown_steps():
    rows = [{"step": s, "frechet_distance": d} for s, d in ((2, 5.0), (1, 4.0), (2, 3.0), (None, 1.0))]
    assert best_curve(rows, "step") == ([1, 2], [4.0, 3.0])
    assert best_curve(rows[3:], "step") == ([], [])


def test_the_log_keeps_the_last_line_of_a_repeated_step(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 2, "a": 3.0, "b": 4.0}\n{"st')
    log = read_log(path)
    assert log["a"].tolist() == [1.0, 3.0]
    assert np.array_equal(log["b"], [np.nan, 4.0], equal_nan=True)


def test_a_picture_of_samples_names_its_rows_and_shows_every_folder(tmp_path, monkeypatch):
    """The first weights with every NFE, the others with their smallest."""

    def generator(shade):
        def batches(labels, seeds, nfe, w, size, text, interval):
            assert interval == [0.4, 0.65]
            yield torch.full((len(labels), 1, 8, 8), shade + nfe, dtype=torch.uint8), seeds

        config = SimpleNamespace(classes=2, text=None)
        net, names = SimpleNamespace(config=config), ["a $5 hat", "dog"]
        return SimpleNamespace(net=net, class_names=names, batches=batches)

    rows = [
        {"weights": f"runs/{run}/weights/ba7-ema", "nfe": nfe, "w": 1.5, "frechet_distance": 2.0}
        | {"interval": [0.4, 0.65]}
        for run in ("after", "before")
        for nfe in (4, 1)
    ]
    generators = {row["weights"]: generator(shade) for row, shade in zip(rows[::2], (0, 100), strict=True)}
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_samples(rows, None, generators, tmp_path / "samples.png")
    axes = plt.gcf().axes
    assert [axis.get_title() for axis in axes] == ["1 step", "4 steps", "before, 1 step"]
    assert plt.gcf().get_supxlabel().startswith("after/ba7-ema, w = 1.5 for t from 0.4 to 0.65, the same")
    assert [int(axis.images[0].get_array()[5, 5, 0]) for axis in axes] == [1, 4, 101]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a $5 hat", "dog"]
