"""Captions and their embeddings: where they come from, what is stored, kills, machines, verify and show."""

import base64
import json
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
import yaml
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from recipe.pictures import captioned, lettering
from storage.manifest import DatasetError, read_manifest
from streaming_convert import sources
from streaming_convert.__main__ import main
from streaming_convert.images import Opener
from tests.test_convert import convert, files, picture, read_all, to_bytes
from tests.test_convert_resume import Run, finished_parts, wait_for

ROWS = [  # several of a file, in another order than the files, empty, with commas, quotes and other scripts
    ("b.png", "a red cat"),
    ("a.png", ""),
    ("b.png", 'the "blue", wide sea'),
    ("sub/c.png", "ein Käse, 漢字 🙂"),
    ("./a.png", "  dog\n"),
]
STORED = ["", "dog", "a red cat", 'the "blue", wide sea', "ein Käse, 漢字 🙂"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, two of them loose."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "sub/c.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_bytes(picture(rng)))
    return tmp_path / "in"


def write_csv(path: Path, rows: list = ROWS, between: str = ",") -> Path:
    quoted = [[name, "1", '"' + caption.replace('"', '""') + '"'] for name, caption in rows]
    path.write_text("\n".join(map(between.join, [["file", "score", "caption"], *quoted])))
    return path


def write_lines(path: Path, rows: list = ROWS) -> Path:
    lines = [json.dumps({"caption": caption, "file": name, "id": 3}) for name, caption in rows]
    path.write_text("\n\n".join(lines) + "\n")
    return path


def convert_folder(folder: Path, out: Path, *words: object) -> int:
    return convert("images", folder, "--size", 16, "--unlabelled", "--out", out, *words)


def texts(folder: Path) -> list[str]:
    return [sample["caption"] for sample in read_all(folder)]


# Where captions come from


@pytest.mark.parametrize(
    "write",
    [write_csv, lambda path: write_csv(path, between="\t"), write_lines],
    ids=["commas", "tabs", "lines"],
)
def test_each_caption_of_each_file_is_a_sample(folder, tmp_path, write):
    path = write(folder / "captions.txt")
    assert convert_folder(folder, tmp_path / "out", "--captions", path) == 0
    assert texts(tmp_path / "out/train") == STORED
    pixels = [
        sources.image_folder(str(folder), Opener(16), unlabelled=True).load(key) for key in ("a.png", "b.png")
    ]
    for sample, i in zip(read_all(tmp_path / "out/train"), (0, 0, 1, 1), strict=False):
        np.testing.assert_array_equal(sample["image"], pixels[i])
        assert sample["label"] == 0 and set(sample) == {"image", "label", "caption"}
    manifest = read_manifest(str(tmp_path / "out/train"))
    assert manifest.caption_bytes == {"0": 1, "3": 1, "9": 1, "20": 1, "22": 1} and manifest.text is None
    assert main(["verify", str(tmp_path / "out")]) == 0
    config = yaml.safe_load((tmp_path / "out/train.yaml").read_text())
    assert config["model"]["text"] == {"encoder": "bytes", "tokens": 24}  # 1 + 22
    assert config["objective"]["guidance"] == 1.25


def test_captions_beside_the_pictures(folder, tmp_path, capsys):
    (folder / "a.txt").write_text("\ufeff a red cat\r\n")
    (folder / "sub" / "c.txt").write_bytes(b"\xff\xfe")
    command = [folder, tmp_path / "out", "--captions", "beside", "--shard-samples", 2, "--max-rejected"]
    assert convert_folder(*command, 1) == 1
    error = capsys.readouterr().err
    assert "2 samples were rejected" in error and "\n  b.png: no caption\n" in error
    assert "\n  sub/c.png: sub/c.txt: 'utf-8' codec can't decode byte 0xff" in error
    assert convert_folder(*command, 2) == 0
    assert texts(tmp_path / "out/train") == ["a red cat"]
    assert main(["verify", str(tmp_path / "out")]) == 0

    (folder / "b.txt").write_text("")
    assert convert_folder(*command, 2) == 1
    assert "holds a different dataset: `input` is" in capsys.readouterr().err
    assert convert_folder(folder, tmp_path / "new", *command[2:], 1) == 0
    assert texts(tmp_path / "new/train") == ["a red cat", ""]


def test_files_without_a_row_are_rejected(folder, tmp_path, capsys):
    path = write_csv(tmp_path / "some.csv", ROWS[:3])
    assert convert_folder(folder, tmp_path / "out", "--captions", path) == 1
    assert "1 samples were rejected" in (error := capsys.readouterr().err) and "sub/c.png: no cap" in error
    assert convert_folder(folder, tmp_path / "out", "--captions", path, "--max-rejected", 1) == 0
    assert texts(tmp_path / "out/train") == STORED[:1] + STORED[2:4]


@pytest.mark.parametrize("beside", [False, True])
def test_captions_of_a_zip(folder, tmp_path, beside):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        for path in folder.rglob("*.png"):
            name = path.relative_to(folder)
            file.write(path, name)
            file.writestr(str(name.with_suffix(".txt")), f"this is {name}")
    rows = [(name, f"this is {name}") for name in ("sub/c.png", "a.png", "b.png")]
    words = ["--captions", "beside" if beside else write_lines(tmp_path / "captions.jsonl", rows)]
    assert convert("zip", tmp_path / "in.zip", "--unlabelled", "--out", tmp_path / "out", *words) == 0
    assert texts(tmp_path / "out/train") == ["this is a.png", "this is b.png", "this is sub/c.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,caption\nx.png,a\na.png,b\ny.png,c\n", "2 rows name images that do not exist, first x.png"),
        ("file,caption\na.png,red, wide\n", "line 2: not one file and one caption: {'file': 'a.png', "),
        ("file,caption\na.png,b\na.png\n", "line 3: not one file and one caption: {'file': 'a.png', "),
        ("a.png,a red cat\n", "CSV whose header names file, file_name, filename or image"),
        ("", "is neither JSON lines nor CSV whose header names file, file_name, filename or image"),
        ("image,words\na.png,a cat\n", "is neither JSON lines nor CSV whose header names caption or text"),
        ('file,caption\na.png,"red\n', "is not a CSV file: unexpected end of data"),
        ('{"file": "a.png", "caption": "b"}\n{"file": "a.png"\n', "line 2 is not JSON: EOF while parsing"),
        ('{"file": "a.png", "caption": "b"}\n3\n', "line 2: not a JSON object"),
        ('{"file": "a.png", "caption": ["b", 3]}', "line 1: not one file and one caption"),
        ('{"file": "a.png", "caption": "\\ud83d"}', "line 1: not one file and one caption"),
        (None, "cannot read"),
    ],
)
def test_a_bad_caption_file_is_one_clear_error(folder, tmp_path, capsys, text, message):
    path = tmp_path / "captions"
    if text is not None:
        path.write_text(text)
    assert convert_folder(folder, tmp_path / "out", "--captions", path) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(path) in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def fonts(tmp_path, monkeypatch):
    """A system whose only font draws two letters, each its own way; its path."""
    file = str(tmp_path / "cjk.ttf")
    font, glyphs = FontBuilder(1000, isTTF=True), {}
    for name, width in ((".notdef", 100), ("cat", 400), ("dog", 900)):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for corner in ((0, 700), (width, 700), (width, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap({ord("猫"): "cat", ord("犬"): "dog"})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Two", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(file)
    monkeypatch.setattr(
        "matplotlib.font_manager.findSystemFonts", lambda: [str(tmp_path / "absent.ttf"), file]
    )
    return file


def test_letters_are_drawn_by_a_font_that_has_them_or_escaped(fonts):
    assert lettering("a cat\n") == ("a cat\n", None)
    assert lettering("Käse Ω")[0] == "Käse Ω" and lettering("Käse Ω")[1].endswith("DejaVuSans.ttf")
    assert lettering("猫犬") == ("猫犬", fonts)
    text, file = lettering("猫 鳥 Ω")  # no font has them all
    assert text == r"\u732b \u9ce5 Ω" and file.endswith("DejaVuSans.ttf")
    blank = np.zeros((1, 16, 16), np.uint8)
    drawn = {text: captioned(blank, text) for text in ("猫", "犬", r"\u9ce5", "鳥")}
    below = {text: (pixels[0, 128:] < 128).sum() for text, pixels in drawn.items()}
    assert 0 < 1.5 * below["猫"] < below["犬"]
    assert below["鳥"] > 0


def test_labels_of_captioned_pictures(folder, tmp_path, capsys):
    path = write_csv(tmp_path / "captions.csv")
    words = ["images", folder, "--size", 16, "--captions", path, "--max-rejected", 9, "--out"]
    assert convert(*words, tmp_path / "mixed") == 1  # in part in class folders: as without captions
    assert "says what a.png is" in capsys.readouterr().err
    for name in ("a.png", "b.png"):
        (folder / "other").mkdir(exist_ok=True)
        (folder / name).rename(folder / "other" / name)
    write_csv(path, [("other/a.png", "x"), ("sub/c.png", "z"), ("other/b.png", "y")])
    assert convert(*words, tmp_path / "classes") == 0
    found = [(str(s["caption"]), int(s["label"])) for s in read_all(tmp_path / "classes/train")]
    assert found == [("x", 0), ("y", 0), ("z", 1)]
    assert read_manifest(str(tmp_path / "classes/train")).class_names == ["other", "sub"]

    (folder / "sub/c.png").rename(folder / "c.png")
    shutil.rmtree(folder / "other")
    write_csv(path, [("c.png", "z"), ("c.png", "w")])
    assert convert(*words, tmp_path / "flat") == 0
    manifest = read_manifest(str(tmp_path / "flat/train"))
    assert (manifest.class_names, manifest.class_counts, manifest.num_samples) == ([], [], 2)


def test_captions_of_one_picture_stay_on_one_side(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i}.png").write_bytes(to_bytes(Image.new("RGB", (8, 8), (i, i, i))))
    rows = write_lines(tmp_path / "rows", [(f"{i}.png", f"{i} {j}") for j in range(3) for i in range(20)])
    words = ["--size", 8, "--captions", rows, "--val", 0.25, "--out", tmp_path / "out"]
    assert convert("images", tmp_path / "in", *words) == 0
    train, val = ({text.split()[0] for text in texts(tmp_path / "out" / split)} for split in ("train", "val"))
    assert (len(train), len(val)) == (15, 5) and not train & val
    assert len(texts(tmp_path / "out/val")) == 15


def test_captions_follow_flips_subsets_and_other_shards(folder, tmp_path):
    path = write_csv(tmp_path / "captions.csv")
    convert_folder(folder, tmp_path / "flips", "--captions", path, "--flips", "--shard-samples", 4)
    assert texts(tmp_path / "flips/train") == [text for text in STORED for _ in range(2)]
    convert("mds", tmp_path / "flips", "--limit", 7, "--shard-samples", 2, "--out", tmp_path / "some")
    kept = texts(tmp_path / "some/train")
    assert len(kept) == 7 and kept == [text for text in STORED for _ in range(kept.count(text))]
    sizes = [str(len(text.encode())) for text in kept]
    counts = {size: sizes.count(size) for size in sorted(set(sizes), key=int)}
    assert read_manifest(str(tmp_path / "some/train")).caption_bytes == counts


def test_shard_size_bounds_shards_with_captions(folder, tmp_path):
    path = write_csv(tmp_path / "captions.csv", [("a.png", "x" * 500 + "é"), *ROWS] * 10)
    convert_folder(folder, tmp_path / "out", "--captions", path, "--shard-size", "8kb")
    manifest = read_manifest(str(tmp_path / "out/train"))
    assert len(manifest.shards) == 12 and max(s["bytes"] for s in manifest.shards.values()) <= 8192
    config = yaml.safe_load((tmp_path / "out/train.yaml").read_text())
    assert config["model"]["text"] == {"encoder": "bytes", "tokens": 256}


def test_without_captions_the_bytes_are_those_of_earlier_versions(tmp_path):
    assert convert("digits", "--limit", 20, "--flips", "--shard-samples", 16, "--out", tmp_path) == 0
    digest = xxhash.xxh64()
    for path in sorted((tmp_path / "train").iterdir()):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == "e321a8136a9f2834"  # of the commit before captions


def test_emoji_keep_their_names(tmp_path):
    (tmp_path / "list.txt").write_text(
        "# group: Flags\n# subgroup: country-flag\n"
        "1F1EF 1F1F5                    ; fully-qualified     # 🇯🇵 E0.6 flag: Japan\n"
        "263A                           ; unqualified         # ☺ E0.6 smiling face\n"
        "1F60A                          ; fully-qualified     # 😊 E0.6 smiling face with smiling eyes\n"
    )
    assert list(sources._listed_emoji(str(tmp_path / "list.txt"))) == [
        ("1F1EF 1F1F5", "Flags", "flag: Japan"),
        ("1F60A", "Flags", "smiling face with smiling eyes"),
    ]
    if not (Path(sources.EMOJI_FONT).is_file() and Path(sources.EMOJI_LIST).is_file()):
        pytest.skip("needs the Debian packages fonts-noto-color-emoji and unicode-data")
    assert convert("emoji", "--size", 8, "--limit", 9, "--out", tmp_path / "out") == 0
    source = sources.emoji(8)
    names = dict(zip(source.keys, source.captions, strict=True))
    assert names["1F600"] == "grinning face" and names["1F1EF 1F1F5"] == "flag: Japan"
    assert set(texts(tmp_path / "out/train")) <= set(names.values())


def test_show_prints_captions_that_no_font_has(folder, tmp_path):
    path = write_csv(
        tmp_path / "captions.csv", [*ROWS, ("a.png", "long " * 99 + "\x07"), ("a.png", "字" * 99)]
    )
    convert_folder(folder, tmp_path / "out", "--captions", path)
    words = ["--rows", "2", "--columns", "4", "--out", str(tmp_path / "grid.png")]
    assert main(["show", str(tmp_path / "out"), *words]) == 0
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * (128 + 36), 4 * 128, 3)
    samples = read_all(tmp_path / "out/train")
    np.testing.assert_array_equal(grid[:128:8, :128:8].transpose(2, 0, 1), samples[0]["image"])
    printed = [(grid[128:164, i * 128 : (i + 1) * 128] < 128).sum() for i in range(4)]
    assert printed[0] == 0 and 0 < printed[1] < printed[2]  # "", "dog", "long long long ..."


# Embeddings

transformers = pytest.importorskip("transformers")
from recipe.pretrained import TextEncoder
from tests.test_text_encoder import save_clip, save_t5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {"t5": save_t5(root / "t5"), "clip": save_clip(root / "clip", whole=True)}


def encode(model: str, tokens: int = 8) -> list[object]:
    return ["--text-encoder", model, "--text-tokens", tokens, "--device", "cpu"]


@pytest.mark.parametrize(("name", "lengths"), [("t5", [1, 2, 8, 4, 7, 6, 8]), ("clip", None)])
def test_embeddings_are_those_of_the_encoder(folder, tmp_path, capsys, models, name, lengths):
    rows = [*ROWS, ("sub/c.png", "a " * 40), ("a.png", "the sea of the sea of the sea of the sea")]
    path = write_csv(tmp_path / "captions.csv", rows)
    words = ["--captions", path, *encode(models[name]), "--shard-samples", 3]
    assert convert_folder(folder, tmp_path / "out", *words) == 0
    samples = read_all(tmp_path / "out/train")
    encoder = TextEncoder(models[name], 8, "cpu")
    manifest = read_manifest(str(tmp_path / "out/train"))
    assert set(samples[0]) == {"image", "label", "caption", "text", "text_length"}
    for start in range(0, 7, 3):
        text, length = encoder.encode([sample["caption"] for sample in samples[start : start + 3]])
        for sample, *expected in zip(samples[start:], text, length, strict=False):
            assert sample["text"].dtype == np.float16
            np.testing.assert_array_equal(sample["text"], expected[0])
            assert sample["text_length"] == expected[1]
    assert not lengths or [sample["text_length"] for sample in samples] == lengths

    assert manifest.text["encoder"] == models[name] and manifest.text["sha256"] == encoder.sha256
    assert (manifest.text["tokens"], manifest.text["width"]) == (8, encoder.width)
    empty = np.frombuffer(base64.b64decode(manifest.text["empty"]), "<f2").reshape(-1, encoder.width)
    text, length = encoder.encode([""])
    np.testing.assert_array_equal(empty, text[0, : length[0]])
    assert manifest.text["cut"] == encoder.cut >= 2
    assert f"warning: {tmp_path}/out/train: {encoder.cut} captions longer than 8 tokens were cut" in (
        capsys.readouterr().out
    )
    config = yaml.safe_load((tmp_path / "out/train.yaml").read_text())
    assert config["model"]["text"] == {"encoder": "dataset", "tokens": 8, "width": encoder.width}
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["show", str(tmp_path / "out"), "--out", str(tmp_path / "grid.png")]) == 0


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A command without its target: 60 captions of 30 pictures, two of which cannot be read."""
    root = tmp_path_factory.mktemp("many")
    rng, words = np.random.default_rng(0), ["a", "red", "cat", "of", "the", "sea", "Käse"]
    rows = []
    for i in range(30):
        pixels = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
        (root / f"{i:02}.png").write_bytes(to_bytes(Image.fromarray(pixels)) if i % 15 else b"")
        rows += [(f"{i:02}.png", " ".join(rng.choice(words, rng.integers(0, 12)))) for _ in range(2)]
    path = write_lines(root / "captions.jsonl", rows)
    return ["images", root, "--size", 48, "--captions", path, "--shard-samples", 3, "--max-rejected", 4]


def test_killed_with_text_ends_byte_for_byte_the_same(many, models, tmp_path):
    command = [*many, *encode(models["t5"]), "--out"]
    assert convert(*command, tmp_path / "whole") == 0
    out = tmp_path / "out"
    for kill in range(2):
        run = Run([*map(str, [*command, out]), "--workers", "2"], tmp_path / "log")
        seen = len(finished_parts(out / "train"))
        wait_for(lambda seen=seen: len(finished_parts(out / "train")) >= seen + 3)
        time.sleep(0.003 * kill)
        os.killpg(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        with pytest.raises(DatasetError, match="did not finish"):
            read_manifest(str(out / "train"))
    assert main([*map(str, [*command, out]), "--workers", "3"]) == 0
    assert files(out) == files(tmp_path / "whole")
    manifest = read_manifest(str(out / "train"))
    assert (manifest.num_samples, manifest.rejected) == (56, 4)
    assert sum(manifest.caption_bytes.values()) == 56 and manifest.text["cut"] > 0


def test_machines_share_one_encoder(many, models, tmp_path, capsys):
    convert(*many, *encode(models["t5"]), "--out", tmp_path / "whole")
    for machine in ("2/2", "1/2"):
        command = [*many, *encode(models["t5"]), "--out", tmp_path / "out", "--shard", machine]
        assert convert(*command) == 0
    assert main(["merge", str(tmp_path / "out"), "--max-rejected", "4"]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")

    moved = shutil.copytree(models["t5"], tmp_path / "moved")
    assert convert(*many, *encode(moved), "--out", tmp_path / "out") == 0  # the same weights
    capsys.readouterr()
    for other in (save_t5(tmp_path / "other", seed=1), models["clip"]):
        assert convert(*many, *encode(other), "--out", tmp_path / "out") == 1
        assert "different dataset: `text` is" in capsys.readouterr().err
        one, two = tmp_path / f"{Path(other).name}1", tmp_path / f"{Path(other).name}2"
        for model, out, machine in ((models["t5"], one, "1/2"), (other, two, "2/2")):
            assert convert(*many, *encode(model), "--out", out, "--shard", machine) == 0
        shutil.copytree(two, one, dirs_exist_ok=True, ignore=shutil.ignore_patterns("plan.json"))
        assert main(["merge", str(one)]) == 1
        assert "00001.json is a part of another dataset than .parts/plan.json" in capsys.readouterr().err


def test_impossible_encoders_are_refused_before_any_work(folder, tmp_path, capsys, models):
    with_captions = ["--captions", write_csv(tmp_path / "captions.csv")]
    (tmp_path / "nothing").mkdir()
    for words, message in (
        (encode(models["t5"]), "the source images has no captions; --captions names them"),
        ([*with_captions, *encode(models["clip"], 13)], f"{models['clip']} takes 3 to 12 tokens, not 13"),
        ([*with_captions, *encode(tmp_path / "nothing")], f"cannot load {tmp_path}/nothing on cpu: "),
    ):
        assert convert_folder(folder, tmp_path / "out", *words) == 1
        error = capsys.readouterr().err
        assert "error: --text-encoder: " + message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def _edit(key: str, value: object):
    def change(manifest: dict) -> None:
        holder = manifest["text"] if key in manifest["text"] else manifest
        holder[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edit("tokens", 4), 'encodings: {"caption": "str", "image": "ndarray:uint8:'),
        (_edit("empty", "AAA"), "manifest.json: text.empty: Incorrect padding"),
        (_edit("empty", "AAAA"), "manifest.json: text.empty: has 3 bytes"),
        (_edit("caption_bytes", {"0": 5}), "caption_bytes: the manifest says {'0': 5}, there are {'0': 1, "),
        (_edit("caption_bytes", {"0": 4}), "caption_bytes: adds up to 4 samples, num_samples is 5"),
        (
            _edit("caption_bytes", None),
            'columns: ["caption", "image", "label", "text", "text_length"], manifest',
        ),
        (_edit("text", None), 'columns: ["caption", "image", "label", "text", "text_length"], manifest.json'),
    ],
)
def test_verify_names_the_damage_to_text(folder, tmp_path, capsys, models, change, message):
    path = write_csv(tmp_path / "captions.csv")
    convert_folder(folder, tmp_path / "out", "--captions", path, *encode(models["t5"]))
    file = tmp_path / "out/train/manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().out


def test_finished_captions_can_be_encoded_later(folder, tmp_path, capsys, models):
    path = write_csv(tmp_path / "captions.csv")
    convert_folder(folder, tmp_path / "plain", "--captions", path)
    convert_folder(folder, tmp_path / "direct", "--captions", path, *encode(models["clip"]))
    assert convert("mds", tmp_path / "plain", *encode(models["clip"]), "--out", tmp_path / "later") == 0
    later, direct = (files(tmp_path / name)["train/shard.00000.mds"] for name in ("later", "direct"))
    assert later == direct
    assert convert("mds", tmp_path / "later", "--out", tmp_path / "copy") == 0
    assert "embeddings of captions are not copied; --text-encoder makes" in capsys.readouterr().out
    assert (
        files(tmp_path / "copy")["train/shard.00000.mds"]
        == (files(tmp_path / "plain")["train/shard.00000.mds"])
    )


def test_an_encoder_that_gives_nan_stops_with_the_caption(folder, tmp_path, capsys, models):
    huge = Path(shutil.copytree(models["t5"], tmp_path / "huge"))
    model = transformers.T5ForConditionalGeneration.from_pretrained(huge)
    model.shared.weight.data[2 + 1 :, 0] = float("nan")  # every word; the tokens before them are special
    model.save_pretrained(huge)
    path = write_csv(tmp_path / "captions.csv")
    assert convert_folder(folder, tmp_path / "out", "--captions", path, *encode(huge)) == 1
    assert "huge gives NaN for 'dog'. Finished parts are kept" in capsys.readouterr().err
