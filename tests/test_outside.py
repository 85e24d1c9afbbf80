"""Files that others wrote: JSON within bounds, index and manifest compared; a fuzz of these and weights."""

import copy
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipe.dit import DiT, DiTConfig
from recipe.weights import load_weights, read_facts, save_weights
from storage import Folder, StorageError
from storage.manifest import DatasetError, open_dataset
from storage.outside import OutsideError, parse_json, read_bytes, read_json
from streaming_convert.__main__ import main
from tests.conftest import edit, refusal, store

SECRET = "not-for-a-file-to-read"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "x.json is not JSON: recursion limit exceeded"),
        (b'{"a":' * 100_000, "x.json is not JSON: recursion limit exceeded"),
        (b'{"a": 1' + b"0" * 400 + b"}", "x.json holds an integer of 401 digits"),
        (b'{"a": [9223372036854775808]}', "x.json holds an integer of 19 digits"),
        (b"1" * 10_000, "x.json is not JSON: number out of range"),
        (b"[1e999]", "x.json holds a number beyond the range of a float"),
        (b"[NaN]", "x.json is not JSON: expected value"),
        (b"\xff", "x.json is not JSON: expected value"),
        (b"", "x.json is not JSON: EOF"),
    ],
)
def test_json_from_outside_has_bounds(text, message):
    said = refusal(OutsideError, parse_json, text, "x.json")
    assert said.startswith(message) and "\n" not in said


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"name": "\udcff \\ud800 \ud83d é 😀", "number": [2**63 - 1, -(2**63), 1e308, True, None]}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value
    assert parse_json("[NaN, Infinity]", "a log", nan=True)[1] == float("inf")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "big").write_bytes(bytes(101))
    for name, message in (
        ("manifest.json", "not a regular"),
        ("endless", "not a regular"),
        ("big", "than 100"),
    ):
        with pytest.raises(OutsideError, match=message):
            read_bytes(tmp_path / name, 100)
        with pytest.raises(StorageError, match=message):
            Folder(str(tmp_path)).read(name, 100)


def test_a_small_file_is_read_into_little_memory(tmp_path):
    (tmp_path / "x").write_bytes(b"123")
    tracemalloc.start()
    try:
        assert Folder(str(tmp_path)).read("x") == b"123"
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    with pytest.raises(OutsideError, match="x has more than 2 bytes"):
        read_bytes(tmp_path / "x", 2)


def test_keys_that_lead_out_of_the_folder_are_not_listed(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    keys = ["a/../../b", "..", "/etc/b", "a/b", "a..b", "..a"]
    monkeypatch.setattr(folder._client, "list", lambda prefix: keys)
    assert folder.names() == ["a/b", "a..b", "..a"]


def test_a_place_that_takes_no_file_is_named(tmp_path):
    (tmp_path / "here").write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    for target, answer in (("here/below", "File exists"), ("folder", "Is a directory")):
        with pytest.raises(StorageError, match=f"cannot write {tmp_path / target}: {answer}"):
            Folder(str(tmp_path)).get("here", tmp_path / target)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Twelve pictures in three shards, captioned, to be copied and damaged."""
    labels = np.arange(12) % 3
    pixels = np.zeros((12, 1, 4, 4), np.uint8)
    return store(tmp_path_factory.mktemp("small") / "set", pixels, labels, "abc", shard_samples=4)


def shard(key, value):
    """A change of a key of the first shard in the index."""
    *path, last = key.split(".")

    def change(index):
        holder = index["shards"][0]
        for name in path:
            holder = holder[name]
        holder[last] = value

    return change


def both(samples):
    """A number of samples in index and manifest alike."""

    def change(content):
        shards = content["shards"]
        entry = shards[0] if isinstance(shards, list) else shards["shard.00000.mds"]
        entry["samples"] = samples
        if "num_samples" in content:
            content.update(num_samples=8 + samples, class_counts=[4 + samples, 4, 0])

    return change


EDITS = {  # file => change, what is said
    "index.json": [
        (shard("samples", 10**9), "shard.00000.mds: samples: 1000000000, manifest.json says 4"),
        (shard("samples", 0), "shards.0.samples: 0: input should be greater than or equal to 1"),
        (shard("samples", "4"), 'shards.0.samples: "4": input should be a valid integer'),
        (shard("raw_data", None), "shards.0.raw_data: null: input should be an object"),
        (shard("raw_data.bytes", 3), "bytes: 3, manifest.json says"),
        (shard("raw_data.bytes", 2**32), "shards.0.raw_data.bytes: 4294967296: input should be less than"),
        (shard("raw_data.basename", "index.json"), 'not a shard of its folder: "index.json"'),
        (shard("raw_data.basename", "/etc/passwd"), 'not a shard of its folder: "/etc/passwd"'),
        (shard("raw_data.basename", "shard.00009.mds"), "shard.00009.mds: manifest.json does not list it"),
        (shard("raw_data.hashes", {}), "shards.0.raw_data.hashes.xxh64: field required"),
        (shard("raw_data.hashes", {"xxh64": "0" * 16}), 'xxh64: "0000000000000000", manifest.json says'),
        (shard("column_encodings", ["ndarray:uint8:1,4,4", "pkl"]), '"label": "pkl"}, manifest.json says'),
        (shard("column_encodings", ["ndarray:uint8:4,4,1", "int64"]), "uint8:4,4,1"),
        (shard("column_encodings", ["int64"]), 'encodings: ["int64"], manifest.json says'),
        (shard("column_names", ["image", "image"]), 'columns: ["image", "image"], manifest.json says'),
        (shard("column_sizes", [2**40, 8]), 'sizes: {"image": 1099511627776, "label": 8}, manifest.json'),
        (shard("column_sizes", [None, None]), 'sizes: {"image": null, "label": null}, manifest.json'),
        (shard("compression", "zstd"), 'compression: "zstd", manifest.json says null'),
        (shard("format", "json"), "shards.0.format: \"json\": input should be 'mds'"),
        (shard("version", 3), "shards.0.version: 3: input should be 2"),
        (lambda index: index["shards"].pop(), "lists 2 shards, manifest.json 3"),
        (lambda index: index["shards"].append(index["shards"][0]), "lists 4 shards, manifest.json 3"),
        (lambda index: index.update(shards={}), "shards: {}: input should be a valid array"),
        (lambda index: index.update(more=1), "more: extra inputs are not permitted"),
        (lambda index: index.pop("version"), "version: field required"),
    ],
    "manifest.json": [
        (lambda m: m.update(num_samples=10**9), "shards: adds up to 12 samples, num_samples is 1000000000"),
        (lambda m: m.update(num_samples=-1), "num_samples: -1: input should be greater than or equal to 0"),
        (lambda m: m.update(num_samples=True), "num_samples: true: input should be a valid integer"),
        (lambda m: m.update(shape=[1, 4]), "shape: [1, 4]: list should have at least 3 items"),
        (lambda m: m.update(shape=[1, 4, 0]), "shape.2: 0: input should be greater than or equal to 1"),
        (lambda m: m.update(shape=[1, 4, 10**9]), "shape.2: 1000000000: input should be less than or"),
        (lambda m: m.update(column="pkl"), "column: \"pkl\": input should be 'image' or 'latents'"),
        (lambda m: m.update(class_names=["a", "a", "b"]), "class_names: one of them occurs twice"),
        (lambda m: m.update(class_names=["a", 1, "b"]), "class_names.1: 1: input should be a valid string"),
        (lambda m: m.update(class_counts=[5, 4, 4]), "class_counts: adds up to 13 samples"),
        (lambda m: m.update(class_counts=[12]), "class_counts: has 1 values, not 3"),
        (lambda m: m.update(channel_mean=[]), "channel_mean: has 0 values, not 1"),
        (lambda m: m.update(channel_std=[-1.0]), "channel_std.0: -1.0: input should be greater"),
        (lambda m: m.update(caption_bytes={"x": 12}), "caption_bytes.x.[key]: \"x\": string should match"),
        (lambda m: m.update(input=[]), "input: []: input should be an object"),
        (lambda m: m["input"].pop("flips"), "input.flips: field required"),
        (lambda m: m.update(encoder={"name": ["x"]}), "encoder.name.str: [\"x\"]: input should be"),
        (lambda m: m.update(text={}), "text.encoder: field required"),
        (lambda m: m.update(shards={"../x.mds": m["shards"]["shard.00000.mds"]}), '"../x.mds"'),
        (lambda m: m["shards"].popitem(), "shards: adds up to 8 samples, num_samples is 12"),
        (lambda m: m["shards"]["shard.00000.mds"].update(bytes=1), "bytes: "),
        (lambda m: m.update(schema_version=[1]), "schema_version is [1], expected 1"),
        (lambda m: m.pop("crop"), "crop: field required"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [(name, *case) for name, cases in EDITS.items() for case in cases]
    + [(("index.json", "manifest.json"), both(10**9), "raw_data.bytes: ")],
)
def test_an_edit_of_index_or_manifest_is_one_line(small, tmp_path, capsys, name, change, message):
    folder = shutil.copytree(small, tmp_path / "set")
    for file in (name,) if isinstance(name, str) else name:
        edit(folder / file, change)
    said = refusal(DatasetError, open_dataset, str(folder))
    assert message in said and said.startswith(str(folder)), said
    assert "\n" not in said and len(said) < 600
    assert main(["verify", str(folder)]) == 1
    assert said in capsys.readouterr().out


# Fuzz: whatever the files hold, there is one line or a sound dataset

STRINGS = [
    "",
    "pkl",
    "json",
    "../../e",
    "/dev/zero",
    "\ud800",
    "a\nb",
    "${oc.env:TV_SECRET}",
    "${oc.env:NONE}",
]
LEAVES = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**400, -0.5, 1e308, [], {}, [[]], {"a": 1}, *STRINGS]
)


def places(value, path=()):
    """The paths of all values in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(document, data):
    """The document with one to three of its values replaced, removed or doubled."""
    document = [copy.deepcopy(document)]
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from([p for p in places(document) if p]))
        holder = document
        for key in path:
            holder = holder[key]
        what = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "remove" and path:
            del holder[last]
        elif what == "add" and isinstance(holder[last], dict | list):
            new = copy.deepcopy(data.draw(LEAVES))
            add = holder[last].append if isinstance(holder[last], list) else holder[last].setdefault
            add(new) if isinstance(holder[last], list) else add(data.draw(st.sampled_from(STRINGS)), new)
        else:
            holder[last] = copy.deepcopy(data.draw(LEAVES))
    return json.dumps(document[0]).encode()


def damaged(content, data):
    """The bytes of a file, changed as JSON, cut, or with bytes replaced."""
    how = data.draw(st.sampled_from(["json", "json", "json", "cut", "bytes"]))
    if how == "json":
        return changed(json.loads(content), data)
    at = data.draw(st.integers(0, len(content)))
    return content[:at] + (data.draw(st.binary(max_size=8)) + content[at + 4 :] if how == "bytes" else b"")


def one_line(error):
    """What a user may see of a file's fault."""
    assert "\n" not in str(error) and SECRET not in str(error) and len(str(error)) < 2000, error
    str(error).encode()  # it can be printed


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights of a tiny network."""
    config = DiTConfig(size=4, channels=1, classes=2, patch=2, width=16, depth=1, heads=2)
    method = {"objective": "tvm", "scaled": True, "guidance": 1.0}
    data = {"column": "image", "mean": [127.5], "std": [127.5], "class_names": ["a", "b"]}
    facts = {"method": method, "data": data, "step": 1, "average": "ema"}
    torch.manual_seed(0)
    return save_weights(tmp_path_factory.mktemp("weights") / "w", DiT(config).state_dict(), config, facts)


FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_no_content_of_index_or_manifest_is_a_traceback(small, data):
    file = small / data.draw(st.sampled_from(["index.json", "manifest.json"]))
    sound = file.read_bytes()
    file.write_bytes(damaged(sound, data))
    try:
        manifest, shards = open_dataset(str(small))
        columns = [dict(zip(s["column_names"], s["column_encodings"], strict=True)) for s in shards]
        assert columns == [manifest.columns] * 3
        assert manifest.columns == {"image": "ndarray:uint8:1,4,4", "label": "int64"}
    except DatasetError as error:
        one_line(error)
    finally:
        file.write_bytes(sound)


@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_no_content_of_a_weights_description_is_a_traceback(weights, data):
    file = Path(weights)
    sound = file.read_bytes()
    file.write_bytes(damaged(sound, data))
    os.environ["TV_SECRET"] = SECRET
    try:
        assert SECRET not in repr(read_facts(file))
        load_weights(file)
    except (ValueError, FileNotFoundError) as error:
        one_line(error)
    finally:
        del os.environ["TV_SECRET"]
        file.write_bytes(sound)
