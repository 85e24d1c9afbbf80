"""Datasets of other programs: Streaming's own, webdataset's tars, Parquet and Arrow, made on the spot."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter
from streaming.base.util import merge_index

from recipe.data import TrainingDataset
from storage.manifest import DatasetError, read_manifest
from streaming_convert.__main__ import main
from streaming_convert.images import Opener
from tests.test_convert import convert, files, picture, read_all, to_bytes
from tests.test_dataset import Payload

RNG = np.random.default_rng(0)
PICTURES = [picture(RNG, 20, 28) for _ in range(10)]
PNGS = [to_bytes(one) for one in PICTURES]
NAMES = ["cat", "dog", "bird"]
CAPTIONS = [f"a {NAMES[i % 3]}, number {i}" for i in range(10)]
EXPECTED = [Opener(16).decode(data) for data in PNGS]


def write(folder, columns, samples, **options):
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def check(folder, labels=True, names=("0", "1", "2"), captions=True):
    """The dataset in `folder` holds the ten pictures, as the converter stores them, labels and captions."""
    manifest, samples = read_manifest(f"{folder}/train"), read_all(folder / "train")
    np.testing.assert_array_equal([sample["image"] for sample in samples], EXPECTED)
    assert [int(sample["label"]) for sample in samples] == [i % 3 if labels else 0 for i in range(10)]
    assert manifest.class_names == (list(names) if labels else [])
    assert [sample.get("caption") for sample in samples] == (CAPTIONS if captions else [None] * 10)
    assert main(["verify", str(folder)]) == 0


def as_bytes(i):
    return PNGS[i]


def as_pil(i):
    return PICTURES[i]


def as_array(i):
    return np.asarray(PICTURES[i])


# ---------------------------------------------------------------- Streaming


@pytest.mark.parametrize(
    ("encoding", "make", "label", "mark"),
    [
        ("png", as_pil, "int", int),
        ("bytes", as_bytes, "uint8", np.uint8),
        ("pil", as_pil, "str_int", int),
        ("ndarray", as_array, "int64", np.int64),
        ("ndarray:uint8:20,28,3", as_array, "str", NAMES.__getitem__),
    ],
)
def test_a_streaming_dataset_of_any_encoding(tmp_path, capsys, encoding, make, label, mark):
    rows = [{"x": make(i), "y": mark(i % 3), "c": CAPTIONS[i], "z": 1.5 * i} for i in range(10)]
    columns = {"x": encoding, "c": "str", "y": label, "z": "float64"}
    write(tmp_path / "in", columns, rows, compression="zstd", hashes=["sha1"], size_limit=4000)
    words = ["--image", "x", "--label", "y", "--caption", "c", "--size", 16, "--out", tmp_path / "out"]
    if label == "str":
        (tmp_path / "names.txt").write_text("\n".join(NAMES))
        words += ["--classes", tmp_path / "names.txt"]
    assert convert("mds", tmp_path / "in", *words) == 0
    check(tmp_path / "out", names=NAMES if label == "str" else "012")


def test_columns_are_found_by_their_names_and_said(tmp_path, capsys):
    rows = [{"image": PICTURES[i], "y": i % 3, "width": 28, "caption": CAPTIONS[i]} for i in range(10)]
    write(tmp_path / "in", {"width": "int", "y": "int", "image": "png", "caption": "str"}, rows)
    assert convert("mds", tmp_path / "in", "--size", 16, "--out", tmp_path / "out") == 0
    assert "in: --image image, --label y, --caption caption" in capsys.readouterr().out
    check(tmp_path / "out")
    assert convert("mds", tmp_path / "in", "--image", "image", "--size", 16, "--out", tmp_path / "bare") == 0
    check(tmp_path / "bare", labels=False, captions=False)


def test_an_index_merged_from_parts_and_without_hashes(tmp_path):
    for part in range(2):
        rows = [{"x": PICTURES[i], "y": i % 3} for i in range(5 * part, 5 * part + 5)]
        write(tmp_path / "in" / str(part), {"x": "png", "y": "int"}, rows, hashes=[])
    merge_index([f"{tmp_path}/in/{part}/index.json" for part in range(2)], out=f"{tmp_path}/in")
    words = ("--size", 16, "--label", "y", "--image", "x", "--out", tmp_path / "out")
    assert convert("mds", tmp_path / "in", *words) == 0
    check(tmp_path / "out", captions=False)


def test_training_on_it_names_the_command(tmp_path, capsys):
    rows = [{"x": PICTURES[i], "y": i % 3} for i in range(10)]
    folder = write(tmp_path / "in" / "train", {"x": "png", "y": "int"}, rows)
    command = f"Fix: python -m streaming_convert mds {folder} --image x --label y --size 64 --out FOLDER"
    with pytest.raises(DatasetError, match=r"in/train holds no manifest.json: it is a Streaming") as error:
        TrainingDataset(None, str(folder), batch_size=2)
    assert str(error.value).endswith(command) and "\n" not in str(error.value)
    with pytest.raises(DatasetError, match=r"so name one of them: .*in/train$"):
        read_manifest(str(folder.parent))
    assert main(command.replace("FOLDER", str(tmp_path / "out")).split()[4:]) == 0
    assert TrainingDataset(None, str(tmp_path / "out/train"), batch_size=2).size == 10


def test_latents_of_micro_diffusion_keep_their_scaling(tmp_path):
    latents = RNG.standard_normal((6, 4, 8, 8)).astype(np.float16)
    columns = {"caption": "str", "caption_latents": "bytes", "latents_64": "bytes"}
    rows = [
        {"caption": str(i), "caption_latents": b"xy", "latents_64": x.tobytes()}
        for i, x in enumerate(latents)
    ]
    rows.insert(2, {**rows[0], "latents_64": b""})  # of a picture that was too small
    write(tmp_path / "in", columns, rows)
    with pytest.raises(DatasetError, match="--caption caption --latents latents_64 --out FOLDER"):
        read_manifest(str(tmp_path / "in"))
    words = ["--latents", "latents_64", "--caption", "caption", "--scaling", 0.13025, "--shift", 0.5]
    words += ["--vae", "some/vae", "--max-rejected", 1, "--out", tmp_path / "out"]
    assert convert("mds", tmp_path / "in", *words) == 0
    samples, manifest = read_all(tmp_path / "out/train"), read_manifest(f"{tmp_path}/out/train")
    np.testing.assert_array_equal([sample["latents"][:4] for sample in samples], latents)
    assert not np.any([sample["latents"][4:] for sample in samples]) and manifest.rejected == 1
    assert manifest.encoder == {
        "name": "precomputed", "hash": None, "scaling": 0.13025, "shift": 0.5, "model": "some/vae"
    }  # fmt: skip
    rejected = (tmp_path / "out/train/rejected.jsonl").read_text()
    assert "0 bytes are not float16 of 4 square channels" in rejected


def test_what_a_pickle_holds_is_never_executed(tmp_path, capsys):
    rows = [{"x": PICTURES[i], "y": Payload(tmp_path)} for i in range(3)]
    write(tmp_path / "in", {"x": "png", "y": "pkl"}, rows)
    words = ("mds", tmp_path / "in", "--size", 16, "--out", tmp_path / "out")
    assert convert(*words, "--image", "x", "--label", "y") == 1
    assert "--label: column 'y' is stored as pkl, not as one of int," in capsys.readouterr().err
    assert convert(*words, "--image", "x") == 0
    assert not (tmp_path / "executed").exists()


def change(folder, key, value):
    index = json.loads((folder / "index.json").read_text())
    shard = index["shards"][0]
    for part in key.split(".")[:-1]:
        shard = shard[part]
    shard[key.split(".")[-1]] = value
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("raw_data.basename", "../x.mds", 'names a file outside its folder: "../x.mds"'),
        ("raw_data.basename", "none.mds", "none.mds: the file is missing"),
        ("raw_data.bytes", 70, "shard.00000.mds: the size or the checksum is not that of the index"),
        ("raw_data.hashes", {"md5": "0"}, "shard.00000.mds: the size or the checksum is not that of the"),
        ("samples", 10**9, "samples do not fit its bytes"),
        ("samples", -1, "input should be greater than or equal to 0"),
        ("column_names", ["x"], "its columns are not those of the first shard"),
        ("column_sizes", [None, 10**6], "ends at byte"),
        (
            "column_encodings",
            ["png", "str_int"],
            "0/0: --label: is no str_int: invalid literal for int() with base 10: '" + r"\x00" * 8 + "'\n",
        ),
        ("format", "json", "input should be 'mds'"),
        ("column_encodings", ["png", "float32"], "column 'y' is stored as float32"),
    ],
)
def test_a_wrong_index_is_one_line(tmp_path, capsys, key, value, message):
    rows = [{"x": PICTURES[i], "y": i % 3} for i in range(3)]
    folder = write(tmp_path / "in", {"x": "png", "y": "int"}, rows)
    change(folder, key, value)
    words = ("--image", "x", "--label", "y", "--size", 16, "--out", tmp_path / "out")
    assert convert("mds", folder, *words) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "z"], "--image: in has no column 'z', only f: float64, x: png, y: int"),
        (["--label", "y"], "give --image or --latents, one of its columns (f: float64, x: png, y: int)"),
        (["--image", "x", "--latents", "x"], "give --image or --latents"),
        (["--image", "x", "--label", "f"], "column 'f' is stored as float64, not as one of int"),
        (["--image", "x", "--caption", "y"], "--caption: column 'y' is stored as int, not as one of str"),
        (["--image", "x", "--classes", "names.txt"], "--classes: there are no labels"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    rows = [{"x": PICTURES[i], "y": i % 3, "f": 0.5} for i in range(3)]
    write(tmp_path / "in", {"x": "png", "y": "int", "f": "float64"}, rows)
    assert convert("mds", "in", *words, "--size", 16, "--out", "out") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_columns_of_an_own_dataset_are_refused(tmp_path, capsys):
    convert("digits", "--limit", 20, "--out", tmp_path / "own")
    assert convert("mds", tmp_path / "own/train", "--image", "image", "--out", tmp_path / "out") == 1
    assert "--image: " in (said := capsys.readouterr().err) and "is a dataset of this program" in said


# ---------------------------------------------------------------- webdataset


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in samples.items():
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tar_samples(numbers, **more):
    found = {}
    for i in numbers:
        found |= {f"{i:03}.png": PNGS[i], f"{i:03}.cls": str(i % 3), f"{i:03}.txt": CAPTIONS[i]}
        found[f"{i:03}.json"] = json.dumps({"caption": CAPTIONS[i], "class": NAMES[i % 3]})
    return found | more


def test_shards_of_webdataset(tmp_path, capsys):
    write_tar(tmp_path / "in/00000.tar", tar_samples(range(6)))
    write_tar(tmp_path / "in/00001.tar", tar_samples(range(6, 10), **{"010.txt": "no picture"}))
    out = tmp_path / "out"
    assert convert("webdataset", tmp_path / "in", "--size", 16, "--out", out, "--shard-samples", 4) == 0
    said = capsys.readouterr().out
    assert "--image png, --label cls, --caption txt" in said
    assert "1 samples without .png are left out" in said
    check(out)
    tars = [tmp_path / f"in/0000{i}.tar" for i in range(2)]
    words = ["--image", "png", "--label", "class", "--caption", "caption", "--size", 16]
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    assert (
        convert("webdataset", *tars, *words, "--classes", tmp_path / "names.txt", "--out", tmp_path / "b")
        == 0
    )
    check(tmp_path / "b", names=NAMES)


def test_the_output_of_img2dataset(tmp_path):
    found = {}
    for i in range(10):
        about = {"caption": CAPTIONS[i], "url": "x", "key": f"{i:09}", "status": "success", "sha256": "0"}
        found |= {f"{i:09}.png": PNGS[i], f"{i:09}.txt": CAPTIONS[i], f"{i:09}.json": json.dumps(about)}
    write_tar(tmp_path / "in/00000.tar", found)
    (tmp_path / "in/00000.parquet").write_bytes(b"only what is known of the pictures")
    (tmp_path / "in/00000_stats.json").write_text("{}")
    assert convert("webdataset", tmp_path / "in", "--size", 16, "--out", tmp_path / "out") == 0
    check(tmp_path / "out", labels=False)


def test_processes_and_a_second_run_give_the_same_bytes(tmp_path):
    write_tar(tmp_path / "in/0.tar", tar_samples(range(10)))
    words = ["webdataset", str(tmp_path / "in"), "--size", "16", "--shard-samples", "3"]
    assert main([*words, "--out", str(tmp_path / "one"), "--workers", "1"]) == 0
    assert main([*words, "--out", str(tmp_path / "two"), "--workers", "2", "--shard", "2/2"]) == 0
    assert main([*words, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    ("samples", "words", "message"),
    [
        ({"0.txt": "x"}, [], "give --image, one of txt"),
        ({"0.png": PNGS[0], "1.png": PNGS[1], "0.cls": "1"}, [], "0/1: --label: no .cls, nor a key 'cls'"),
        ({"0.png": PNGS[0], "0.json": "{"}, ["--image", "png", "--label", "y"], "its .json is not JSON"),
        ({"0.png": PNGS[0]}, ["--image", "png", "--caption", "txt"], "0/0: no .txt, nor a key 'txt' in its"),
    ],
)
def test_a_tar_without_what_was_asked_for(tmp_path, capsys, samples, words, message):
    write_tar(tmp_path / "in.tar", samples)
    assert convert("webdataset", tmp_path / "in.tar", *words, "--size", 16, "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err


def test_a_damaged_or_compressed_tar_is_one_line(tmp_path, capsys):
    whole = write_tar(tmp_path / "whole.tar", tar_samples(range(3))).read_bytes()
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.add(tmp_path / "a.tar")
    for name in "ab":
        assert convert("webdataset", tmp_path / f"{name}.tar", "--size", 16, "--out", tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert f"cannot read {tmp_path}/{name}.tar as a tar" in error and error.count("\n") == 1
    (tmp_path / "c.tar").write_bytes(whole[: len(whole) // 2])
    words = ("--image", "png", "--size", 16, "--out", tmp_path / "out")
    assert convert("webdataset", tmp_path / "c.tar", *words) == 1
    assert "c.tar is damaged or was cut short" in capsys.readouterr().err
    (tmp_path / "d.tar").write_bytes(whole.replace(b"001.png", b"001.pnh", 1))  # a header's checksum
    assert convert("webdataset", tmp_path / "d.tar", *words) == 1
    assert "d.tar is damaged or was cut short" in capsys.readouterr().err
    assert convert("webdataset", tmp_path / "none", "--size", 16, "--out", tmp_path / "out") == 1
    assert "none is neither a folder nor a .tar file" in capsys.readouterr().err


# ---------------------------------------------------------------- Parquet and Arrow


@pytest.fixture
def table():
    pa = pytest.importorskip("pyarrow")
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": NAMES},
        "text": {"_type": "Value", "dtype": "string"},
    }
    columns = {
        "image": [{"bytes": data, "path": None} for data in PNGS],
        "label": [i % 3 for i in range(10)],
        "text": CAPTIONS,
    }
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(about)


def test_parquet_as_the_hub_holds_it(tmp_path, table, capsys):
    from pyarrow import parquet as pq

    folder = tmp_path / "in/data"
    folder.mkdir(parents=True)
    pq.write_table(table.slice(0, 6), folder / "train-00000-of-00002.parquet", row_group_size=4)
    pq.write_table(table.slice(6), folder / "train-00001-of-00002.parquet")
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    words = [
        "parquet",
        str(tmp_path / "in"),
        "--size",
        "16",
        "--shard-samples",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 1
    assert "holds test and train: name one with --split" in capsys.readouterr().err
    assert main([*words, "--split", "train", "--workers", "2"]) == 0
    assert "--image image, --label label, --caption text" in capsys.readouterr().out
    check(tmp_path / "out", names=NAMES)
    assert main([*words, "--split", "dev"]) == 1
    assert "--split dev: none of 3 files is called so" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_as_datasets_saves_it(tmp_path, table, kind):
    import pyarrow as pa

    folder = tmp_path / "in/train"
    folder.mkdir(parents=True)
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with make(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    (folder / "cache-1.arrow").write_bytes(b"what datasets keeps of a map")
    (folder / "state.json").write_text("{}")
    assert convert("parquet", tmp_path / "in", "--size", 16, "--out", tmp_path / "out") == 0
    check(tmp_path / "out", names=NAMES)


def test_a_row_of_several_captions_becomes_as_many_samples(tmp_path, table):
    import pyarrow as pa
    from pyarrow import parquet as pq

    several = [[f"{i}", f"{i} again"] if i else [] for i in range(10)]
    rows = pa.table({"jpg": PNGS, "sentences": several})
    pq.write_table(rows, tmp_path / "in.parquet")
    words = ["parquet", tmp_path / "in.parquet", "--size", 16, "--max-rejected", 1, "--out", tmp_path / "out"]
    assert convert(*words) == 0
    samples = read_all(tmp_path / "out/train")
    assert [sample["caption"] for sample in samples] == [one for row in several for one in row]
    np.testing.assert_array_equal(samples[1]["image"], EXPECTED[1])
    np.testing.assert_array_equal(samples[0]["image"], EXPECTED[1])


def test_parquet_that_does_not_fit_is_one_line(tmp_path, table, capsys):
    from pyarrow import parquet as pq

    pq.write_table(table.drop(["image"]), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    pq.write_table(table, tmp_path / "c.parquet")
    cases = {
        "a.parquet": ([], "give --image, one of its columns label, text"),
        "b.parquet": ([], "b.parquet as Parquet or Arrow: "),
        "c.parquet": (["--image", "x"], "has no column 'x', only image, label, text"),
    }
    for name, (words, message) in cases.items():
        assert convert("parquet", tmp_path / name, *words, "--size", 16, "--out", tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_parts_that_do_not_belong_together_are_refused(tmp_path, table, capsys):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/0.parquet")
    about = {"huggingface": table.schema.metadata[b"huggingface"].replace(b'["', b'["other", "', 1)}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "in/1.parquet")
    assert convert("parquet", tmp_path / "in", "--size", 16, "--out", tmp_path / "out") == 1
    assert "1.parquet: the classes of 'label' are not those of" in capsys.readouterr().err
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "cut.arrow").write_bytes(sink.getvalue().to_pybytes()[:-8])  # without the mark of its end
    assert convert("parquet", tmp_path / "cut.arrow", "--size", 16, "--out", tmp_path / "out") == 1
    assert "cut.arrow was cut short" in capsys.readouterr().err


# ---------------------------------------------------------------- captions and formats


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": "a cat"}\n{"file_name": "1.png", "text": "a dog"}\n',
            [],
        ),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": ["a cat"]}\n{"file_name": "1.png", "text": "a dog"}',
            [],
        ),
        ("metadata.csv", "file_name,text,width\n0.png,a cat,3\n1.png,a dog,4\n", []),
        ("captions.csv", "image,caption\n0.png,a cat\n1.png,a dog\n", []),
        ("t.csv", "image,caption,title\n0.png,x,a cat\n1.png,y,a dog\n", ["--caption-key", "title"]),
    ],
)
def test_captions_by_their_usual_names_and_in_the_folder(tmp_path, name, text, words):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(PNGS[i])
    (folder / name).write_text(text)
    words = [*words, "--size", 16, "--captions", name, "--out", tmp_path / "out"]
    assert convert("images", folder, *words) == 0
    assert [sample["caption"] for sample in read_all(tmp_path / "out/train")] == ["a cat", "a dog"]


def test_a_caption_key_needs_a_file_that_has_it(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(PNGS[0])
    (tmp_path / "in/c.csv").write_text("file,caption\n0.png,a cat\n")
    words = ["images", tmp_path / "in", "--size", 16, "--caption-key", "title", "--out", tmp_path / "out"]
    assert convert(*words) == 1
    assert "--caption-key: needs --captions FILE" in capsys.readouterr().err
    assert convert(*words, "--captions", "c.csv") == 1
    assert "CSV whose header names title" in capsys.readouterr().err


def test_further_formats_are_read_where_they_are_asked_for(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    one = Image.new("RGB", (16, 16), (255, 0, 0))
    one.save(folder / "a.bmp")
    one.save(folder / "b.tif")
    one.save(folder / "c.avif", quality=100)
    one.save(folder / "d.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")])
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(folder / "e.tiff")
    Image.fromarray(np.full((16, 16), 70000, np.int32)).save(folder / "f.tiff")
    one.save(folder / "g.png")
    words = ["images", folder, "--size", 16, "--unlabelled", "--max-rejected", 2]
    words += ["--formats", "gif", "bmp", "tiff", "avif", "--out", tmp_path / "out"]
    assert convert(*words) == 0
    samples = read_all(tmp_path / "out/train")
    assert len(samples) == 5
    for sample in samples:
        assert np.abs(sample["image"].astype(int) - np.array([255, 0, 0])[:, None, None]).max() <= 3
    rejected = (tmp_path / "out/train/rejected.jsonl").read_text()
    assert "no common scale" in rejected and "beyond 16 bits" in rejected
    assert "d.gif" in (tmp_path / "out/train/notes.jsonl").read_text()
