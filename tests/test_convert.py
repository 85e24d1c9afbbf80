"""Conversion in one process: sources, bad input, labels, options, round trips, verify and show."""

import dataclasses
import json
import os
import re
import shutil
import struct
import sys
import tracemalloc
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from sklearn.datasets import load_digits
from streaming import StreamingDataset

from recipe.config import TrainConfig, load_config
from storage import Folder
from storage.manifest import DatasetError, Manifest, open_dataset, read_manifest
from streaming_convert import images, labels, sources
from streaming_convert.__main__ import main, split_keys, training_yaml
from streaming_convert.images import Opener, Rejected
from streaming_convert.mds import read_shard

SYNSETS = ["n01440764", "n02123045", "n03445777"]  # tench, tabby cat, golf ball: 0, 281 and 574 in ImageNet


def convert(*words: object) -> int:
    return main([str(word) for word in words] + ["--workers", "1"])


def read_all(folder: Path) -> list[dict]:
    store = Folder(str(folder))
    return [sample for entry in open_dataset(store.uri)[1] for sample in read_shard(store, entry)]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".yaml"  # which names the folder
    }


def picture(rng: np.random.Generator, height: int = 40, width: int = 56) -> Image.Image:
    """A smooth colour picture, so that JPEG and resampling stay close to it."""
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def to_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three synset folders of 4 pictures each, in the three file formats."""
    rng = np.random.default_rng(0)
    for synset in SYNSETS:
        for i, (suffix, kind) in enumerate(
            [("JPEG", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")]
        ):
            path = tmp_path / "in" / synset / f"{synset}_{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(to_bytes(picture(rng), kind))
    return tmp_path / "in"


# Round trips


def test_digits_are_read_back_exactly_and_in_order(tmp_path):
    assert convert("digits", "--out", tmp_path) == 0
    data = load_digits()
    dataset = StreamingDataset(
        local=str(tmp_path / "train"), batch_size=1, shuffle=False, validate_hash="xxh64"
    )
    assert len(dataset) == 1797
    for i in range(0, 1797, 13):
        assert dataset[i]["image"].dtype == np.uint8 and dataset[i]["label"].dtype == np.int64
        np.testing.assert_array_equal(dataset[i]["image"], np.rint(data.images[i] * 255 / 16)[None])
        assert dataset[i]["label"] == data.target[i]

    manifest = read_manifest(str(tmp_path / "train"))
    pixels = np.rint(data.images * 255 / 16)
    assert manifest.shape == [1, 8, 8] and manifest.class_names == [str(i) for i in range(10)]
    assert manifest.class_counts == np.bincount(data.target).tolist()
    assert manifest.channel_mean == pytest.approx([pixels.mean()], rel=1e-12)
    assert manifest.channel_std == pytest.approx([pixels.std()], rel=1e-12)
    assert not (tmp_path / "train" / ".parts").exists()


def test_finished_identical_dataset_is_reused_and_a_different_one_refused(tmp_path, capsys):
    convert("digits", "--out", tmp_path)
    before = files(tmp_path)
    assert convert("digits", "--out", tmp_path) == 0
    assert "already complete" in capsys.readouterr().out
    assert convert("digits", "--out", tmp_path, "--shard-samples", 500) == 1
    error = capsys.readouterr().err
    assert "different dataset: `shard_samples` is 1000 there and 500 here" in error and error.count("\n") == 1
    assert files(tmp_path) == before


def test_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("mine")
    assert convert("digits", "--out", tmp_path) == 1
    assert "is not empty" in capsys.readouterr().err
    assert files(tmp_path) == {"train/notes.txt": b"mine"}


def test_validation_split_shares_out_every_sample_once(tmp_path):
    convert("digits", "--out", tmp_path, "--val", 0.1, "--compression", "zstd:3", "--shard-samples", 100)
    train, val = read_all(tmp_path / "train"), read_all(tmp_path / "val")
    assert (len(train), len(val)) == (1617, 180)
    both = sorted(sample["image"].tobytes() + bytes([sample["label"]]) for sample in train + val)
    data = load_digits()
    pixels = np.rint(data.images * 255 / 16).astype(np.uint8)
    assert both == sorted(p.tobytes() + bytes([t]) for p, t in zip(pixels, data.target, strict=True))
    assert read_manifest(str(tmp_path / "train")).shards["shard.00000.mds.zstd"]["samples"] == 100
    assert main(["verify", str(tmp_path)]) == 0


def test_splits_differ_with_the_seed_and_are_never_empty():
    assert not np.array_equal(split_keys(range(100), 0.2, 0)["val"], split_keys(range(100), 0.2, 1)["val"])
    with pytest.raises(DatasetError, match="none are left for val"):
        split_keys(range(10), 0.01, 0)


def test_flips_follow_their_originals(tmp_path):
    convert("digits", "--out", tmp_path, "--limit", 30, "--flips", "--shard-samples", 16)
    samples = read_all(tmp_path / "train")
    assert len(samples) == 60
    for original, mirrored in zip(samples[::2], samples[1::2], strict=True):
        np.testing.assert_array_equal(original["image"][..., ::-1], mirrored["image"])
        assert original["label"] == mirrored["label"]


def test_mirror_images_are_never_made_twice_nor_parted_from_their_originals(tmp_path, capsys):
    convert("digits", "--out", tmp_path / "in", "--limit", 30, "--flips")
    for option in (["--flips"], ["--val", 0.1]):
        assert convert("mds", tmp_path / "in", "--out", tmp_path / "out", *option) == 1
        assert f"{option[0]}: the source holds mirror images" in capsys.readouterr().err
    assert convert("mds", tmp_path / "in", "--out", tmp_path / "out", "--shard-samples", 16) == 0
    manifest = read_manifest(str(tmp_path / "out" / "train"))
    assert manifest.flips and manifest.num_samples == 60 and len(manifest.shards) == 4


def test_shard_size_bounds_the_samples_of_a_shard(tmp_path):
    convert("digits", "--out", tmp_path, "--shard-size", "8kb")
    shards = read_manifest(str(tmp_path / "train")).shards.values()
    assert {shard["samples"] for shard in shards} == {94, 11}
    assert max(shard["bytes"] for shard in shards) <= 8192


def test_number_of_workers_and_machines_does_not_show_in_the_result(tmp_path, capsys):
    options = ["digits", "--shard-samples", "100", "--val", "0.2"]
    assert convert(*options, "--out", tmp_path / "one") == 0
    assert main([*options, "--out", str(tmp_path / "two"), "--workers", "3"]) == 0
    for machine in ("2/3", "1/3"):
        assert convert(*options, "--out", tmp_path / "many", "--shard", machine) == 0
    assert main(["merge", str(tmp_path / "many")]) == 1
    assert "parts are missing" in capsys.readouterr().err
    assert convert(*options, "--out", tmp_path / "many", "--shard", "3/3") == 0
    assert not (tmp_path / "many" / "train" / "manifest.json").exists()
    shutil.copytree(tmp_path / "many" / "train", tmp_path / "half" / "train")
    assert main(["merge", str(tmp_path / "half")]) == 1
    assert "half/val holds no conversion" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "many")]) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "many")


def test_merge_refuses_parts_of_another_dataset(tmp_path, capsys):
    for seed, shard in ((1, "1/2"), (2, "2/2")):
        options = ["--limit", 100, "--shard-samples", 50, "--seed", seed, "--shard", shard]
        assert convert("digits", *options, "--out", tmp_path / str(seed)) == 0
    shutil.copytree(tmp_path / "1", tmp_path / "2", dirs_exist_ok=True)
    assert main(["merge", str(tmp_path / "2")]) == 1
    assert ".parts/00001.json is a part of another dataset" in capsys.readouterr().err


# Images


def test_crop_is_the_adm_convention():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (301, 467, 3), dtype=np.uint8))
    halved = image.resize((233, 150), Image.Resampling.BOX).resize((116, 75), Image.Resampling.BOX)
    scaled = np.asarray(halved.resize((round(116 * 64 / 75), 64), Image.Resampling.BICUBIC))
    left = (scaled.shape[1] - 64) // 2
    np.testing.assert_array_equal(
        Opener(64).decode(to_bytes(image)), scaled[:, left : left + 64].transpose(2, 0, 1)
    )


def test_unusual_but_sound_images_become_the_same_picture():
    rng = np.random.default_rng(1)
    image = picture(rng)
    palette = image.quantize(256)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = image.transpose(Image.Transpose.ROTATE_90)
    cases = {
        "CMYK": (to_bytes(image.convert("CMYK"), "JPEG", quality=98), image, 3),
        "EXIF": (to_bytes(turned, "JPEG", exif=exif, quality=98), image, 3),
        "palette": (to_bytes(palette), palette.convert("RGB"), 0),
        "grey": (to_bytes(image.convert("L")), image.convert("L").convert("RGB"), 0),
        "WebP": (to_bytes(image, "WEBP", lossless=True), image, 0),
    }
    for name, (data, truth, tolerance) in cases.items():
        difference = np.abs(Opener(32).decode(data).astype(int) - Opener(32).decode(to_bytes(truth)))
        assert difference.shape == (3, 32, 32) and difference.mean() <= tolerance, name


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    found = Opener(32).decode(to_bytes(Image.fromarray(levels)))
    np.testing.assert_array_equal(found, np.broadcast_to(np.rint(levels / 257), (3, 32, 32)))


def test_sixteen_bit_colour_and_transparency():
    rows = np.full((8, 8, 3), [65535, 32896, 0], ">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    assert Opener(8).decode(png)[:, 0, 0].tolist() == [255, 128, 0]
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert Opener(8).decode(to_bytes(half))[:, 0, 0].tolist() == [255, 127, 127]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255])
    assert Opener(8).decode(to_bytes(palette, transparency=0))[:, 0, 0].tolist() == [255, 255, 255]


def test_transparent_level_of_sixteen_bit_grey_is_white():
    levels = np.full((8, 8), 1000, np.uint16)
    levels[0] = 1001  # the same level of 8 bits
    found = Opener(8).decode(to_bytes(Image.fromarray(levels), transparency=1000))
    assert found[0, :, 0].tolist() == [4] + [255] * 7


DISPLAY_P3 = [[0.51512, 0.2412, -0.00105], [0.29198, 0.69225, 0.04189], [0.1571, 0.06657, 0.78407]]
SRGB = [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]]


def icc_profile(primaries: list[list[float]] | None, gamma: float) -> bytes:
    """An ICC profile of version 2 with these primaries (XYZ at D50), or of grey, and a pure power law."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(gamma * 256))
    white = 0.9642, 1.0, 0.8249
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*white)}
    if primaries is None:
        tags[b"kTRC"] = curve
    for name, primary in zip(b"rgb", primaries or [], strict=False):
        tags[bytes([name]) + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*primary)
        tags[bytes([name]) + b"TRC"] = curve
    offset, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, offset + len(body), len(value))
        body += value
    kind = b"RGB " if primaries else b"GRAY"
    head = struct.pack(">I4xI4s4s4s", offset + len(body), 0x02400000, b"mntr", kind, b"XYZ ")
    head += struct.pack(">6H4s28x", 2020, 1, 1, 0, 0, 0, b"acsp") + fixed(*white)
    return head.ljust(128, b"\0") + table + body


def in_srgb(colour: list[int], primaries: list[list[float]], gamma: float) -> list[int]:
    """The colour of such a profile in sRGB, by the definitions of both."""
    linear = np.linalg.inv(np.transpose(SRGB)) @ np.transpose(primaries) @ (np.array(colour) / 255) ** gamma
    linear = linear.clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * curved).astype(int).tolist()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("colour", [[200, 70, 60], [90, 180, 100], [254, 0, 0]])
def test_an_embedded_profile_is_converted_to_srgb(kind, colour):
    image = Image.new("RGB", (8, 8), tuple(colour))
    expected = in_srgb(colour, DISPLAY_P3, 2.2)
    assert max(abs(a - b) for a, b in zip(colour, expected, strict=True)) > (10 if colour[1] else 0)
    options = {"icc_profile": icc_profile(DISPLAY_P3, 2.2), "lossless": True}
    assert Opener(8).decode(to_bytes(image, kind, **options))[:, 0, 0].tolist() == pytest.approx(
        expected, abs=1
    )
    image.putalpha(0)
    assert Opener(8).decode(to_bytes(image, kind, **options))[:, 0, 0].tolist() == [255, 255, 255]


def test_grey_profiles_are_converted_and_srgb_is_left_as_it_is():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    linear = np.arange(256) / 255
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    for image in (levels, levels.convert("LA")):
        found = Opener(keep_grey=True).decode(to_bytes(image, icc_profile=icc_profile(None, 1.0)))
        assert np.abs(found.ravel() - expected).max() <= 0.51
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = picture(np.random.default_rng(0))
    np.testing.assert_array_equal(
        Opener().decode(to_bytes(image, icc_profile=srgb)), Opener().decode(to_bytes(image))
    )


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (b"no profile", "its ICC profile is damaged: the colours were taken for sRGB"),
        (icc_profile(DISPLAY_P3, 2.2)[:200], "its ICC profile is damaged: the colours were taken for sRGB"),
        (icc_profile(None, 2.2), "its ICC profile is for L and the pixels are RGB: they were taken for sRGB"),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_note(profile, said):
    image, notes = picture(np.random.default_rng(0)), []
    found = Opener().decode(to_bytes(image, icc_profile=profile), note=notes.append)
    np.testing.assert_array_equal(found, Opener().decode(to_bytes(image)))
    assert notes == [said]


def _exif(*entries: tuple) -> bytes:
    """A block of (tag, type, count, value), as damaged as they are."""
    tags = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + tags + bytes(4)


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (_exif((0x0112, 3, 1, b"\6\0\0\0"), (0x010F, 3, 1, b"\1\0\0\0")), True),  # the maker is a number
        (b"garbage!", False),
    ],
)
def test_damaged_exif_does_not_condemn_the_image(block, turned):
    image = picture(np.random.default_rng(0))
    data = Opener().decode(to_bytes(image, "JPEG", exif=b"Exif\0\0" + block))
    plain = Opener().decode(to_bytes(image, "JPEG"))
    np.testing.assert_array_equal(data, np.rot90(plain, -1, (1, 2)) if turned else plain)


def bomb() -> bytes:
    """A PNG of 20000 x 20000 pixels in a few hundred kilobytes."""
    return to_bytes(Image.new("1", (20000, 20000)))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("zero-byte", lambda: b"", "empty file"),
        ("not an image", lambda: b"hello " * 100, "not a JPEG, PNG or WebP image"),
        (
            "another format",
            lambda: to_bytes(Image.new("RGB", (9, 9)), "GIF"),
            "not a JPEG, PNG or WebP image",
        ),
        ("truncated JPEG", lambda: to_bytes(picture(np.random.default_rng(0)), "JPEG")[:-200], "truncated"),
        ("truncated PNG", lambda: to_bytes(picture(np.random.default_rng(0)))[:-400], "truncated"),
        (
            "truncated WebP",
            lambda: to_bytes(picture(np.random.default_rng(0)), "WEBP")[:-99],
            "truncated|not a JPEG",
        ),
        ("bomb", bomb, "decompression bomb"),
    ],
)
def test_bad_images_are_rejected_with_the_reason(name, data, reason):
    with pytest.raises(Rejected, match=reason):
        Opener(16).decode(data())


def test_slightly_too_large_image_is_a_bomb_too(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(Rejected, match="10x10 pixels"):
        Opener(8).decode(to_bytes(Image.new("RGB", (10, 10))))
    with pytest.raises(Rejected, match="720x8 pixels"):
        Opener(8).decode(to_bytes(Image.new("RGB", (90, 1))))


def test_too_many_rejected_fail_at_the_end_with_the_list(folder, tmp_path, capsys):
    (folder / SYNSETS[0] / "empty.png").write_bytes(b"")
    whole = folder / SYNSETS[1] / f"{SYNSETS[1]}_0.JPEG"
    whole.write_bytes(whole.read_bytes()[:-100])
    command = ["images", folder, "--size", 16, "--out", tmp_path / "out", "--shard-samples", 3]
    assert convert(*command, "--max-rejected", 1) == 1
    error = capsys.readouterr().err
    assert (
        "2 samples were rejected, --max-rejected allows 1" in error
        and f"{SYNSETS[0]}/empty.png: empty file" in error
    )
    with pytest.raises(DatasetError, match="did not finish"):
        read_manifest(str(tmp_path / "out" / "train"))

    assert convert(*command, "--max-rejected", 2) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/train/rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"{SYNSETS[0]}/empty.png", f"{SYNSETS[1]}/{SYNSETS[1]}_0.JPEG"]
    manifest = read_manifest(str(tmp_path / "out" / "train"))
    assert (manifest.num_samples, manifest.rejected, manifest.class_counts) == (11, 2, [4, 3, 4])
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_rejected_samples_count_over_all_splits_which_are_all_converted_first(folder, tmp_path, capsys):
    keys = sources.image_folder(str(folder), Opener(16)).keys
    for items in split_keys(keys, 0.5, 0).values():
        (folder / keys[items[0]]).write_bytes(b"")
    command = ["images", folder, "--size", 16, "--out", tmp_path / "out", "--val", 0.5]
    for allowed in (1, 2, 1):
        assert convert(*command, "--max-rejected", allowed) == (allowed < 2)
        error = capsys.readouterr().err
        assert ("2 samples were rejected, --max-rejected allows 1" in error) == (allowed < 2)
        assert (tmp_path / "out" / "val" / "rejected.jsonl").read_text().count("\n") == 1
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_part_without_a_single_good_image_has_no_shard(folder, tmp_path):
    for path in (folder / SYNSETS[0]).iterdir():
        path.write_bytes(b"")
    options = ["--size", 16, "--shard-samples", 4, "--max-rejected", 4]
    assert convert("images", folder, *options, "--out", tmp_path / "out") == 0
    manifest = read_manifest(str(tmp_path / "out" / "train"))
    assert list(manifest.shards) == ["shard.00001.mds", "shard.00002.mds"]
    assert manifest.class_counts == [0, 4, 4] and main(["verify", str(tmp_path / "out")]) == 0
    assert len(StreamingDataset(local=str(tmp_path / "out" / "train"), batch_size=1)) == 8

    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    assert convert("images", folder, *options, "--max-rejected", 99, "--out", tmp_path / "none") == 1
    with pytest.raises(DatasetError, match="did not finish"):
        read_manifest(str(tmp_path / "none" / "train"))


# Labels


def test_class_folders_are_numbered_as_imagenet_numbers_its_synsets(folder):
    source = sources.image_folder(str(folder), Opener(16))
    assert source.class_names == SYNSETS
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.keys == sorted(source.keys)


def test_class_file_fixes_the_order(folder, tmp_path):
    mapping = tmp_path / "LOC_synset_mapping.txt"
    mapping.write_text("n03445777 golf ball\nn01440764 tench, Tinca tinca\nn02123045 tabby, tabby cat\n")
    source = sources.image_folder(str(folder), Opener(16), classes=str(mapping))
    assert source.class_names == ["n03445777", "n01440764", "n02123045"]
    assert source.labels.tolist() == [1] * 4 + [2] * 4 + [0] * 4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "b.png,cat\na.png,dog\n"),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\nb,cat 1 2 3 4 cat 5 6 7 8 \na,dog 85 1 499 272\n",
        ),
        ("spaces.csv", "\ufeffb.png, cat\n a.png ,dog \n"),
        ("dataset.json", '{"labels": [["b.png", 0], ["a.png", 1]]}'),
    ],
)
def test_flat_folder_with_a_label_file(tmp_path, name, text):
    for key in "ab":
        (tmp_path / f"{key}.png").write_bytes(to_bytes(Image.new("RGB", (8, 8))))
    (tmp_path / name).write_text(text)
    source = sources.image_folder(str(tmp_path), Opener(8), str(tmp_path / name))
    assert dict(zip(source.keys, source.labels.tolist(), strict=True)) == {"a.png": 1, "b.png": 0}


def test_values_are_told_from_classes():
    refused = {
        "scores": [f"{i / 7:.3f}" for i in range(400)],
        "too many": [i % 10_001 for i in range(30_000)],
        "years": [1990 + i % 30 for i in range(10_000)],
        "ids": list(range(101)),
    }
    for values in refused.values():
        with pytest.raises(DatasetError, match="values such as .* would become .* classes. Fix: "):
            labels.refuse_values(values)
    for values in (list(range(100)), [i % 1000 for i in range(2000)], [f"n{i % 200}" for i in range(400)]):
        labels.refuse_values(values)


def test_a_file_of_classes_makes_names_of_numbers(folder, tmp_path):
    _mixed(folder)
    (tmp_path / "classes.txt").write_text("7\ncat\n")
    source = sources.image_folder(str(folder), Opener(16), classes=str(tmp_path / "classes.txt"))
    assert source.class_names == ["7", "cat"] and source.labels.tolist() == [1, 0] * 6


def test_linked_class_folders_are_followed_and_links_upwards_are_not(folder):
    (folder / SYNSETS[2]).rename(folder.parent / "elsewhere")
    (folder / SYNSETS[2]).symlink_to(folder.parent / "elsewhere")
    (folder / SYNSETS[0] / "up").symlink_to(folder)
    assert sources.image_folder(str(folder), Opener(16)).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_dangling_link_is_rejected_like_any_bad_image(folder, tmp_path, capsys):
    (folder / SYNSETS[0] / "gone.png").symlink_to("nowhere")
    assert convert("images", folder, "--size", 16, "--out", tmp_path / "out") == 1
    assert f"{SYNSETS[0]}/gone.png: cannot be read: No such file" in capsys.readouterr().err


def test_names_that_are_not_text_are_kept(tmp_path):
    name = os.fsdecode(b"\xff\xfe")
    (tmp_path / "in" / name).mkdir(parents=True)
    (tmp_path / "in" / name / f"{name}.png").write_bytes(to_bytes(Image.new("RGB", (8, 8))))
    (tmp_path / "in" / name / f"{name}2.png").write_bytes(b"")
    options = ["--size", 8, "--max-rejected", 1]
    assert convert("images", tmp_path / "in", *options, "--out", tmp_path / "out") == 0
    assert read_manifest(str(tmp_path / "out" / "train")).class_names == [name]
    assert main(["verify", str(tmp_path / "out")]) == 0


def _loose(folder: Path) -> list:
    shutil.copy(folder / SYNSETS[0] / f"{SYNSETS[0]}_1.png", folder / "loose.png")
    return []


def _unclosed_quote(folder: Path) -> list:
    (folder / "labels.csv").write_text('a.png,"cat\n')
    return []


def _huge_label(folder: Path) -> list:
    rows = [[f"{synset}/{path.name}", 10**18] for synset in SYNSETS for path in (folder / synset).iterdir()]
    (folder / "labels.json").write_text(json.dumps({"labels": rows}))
    return []


def _labelled(folder: Path, values: list) -> list:
    names = [f"{synset}/{path.name}" for synset in SYNSETS for path in sorted((folder / synset).iterdir())]
    rows = [f"{name},{values[i % len(values)]}\n" for i, name in enumerate(names)]
    (folder / "labels.csv").write_text("".join(rows))
    return []


def _years(folder: Path) -> list:
    return _labelled(folder, [1990, 2007, 2024])


def _mixed(folder: Path) -> list:
    return _labelled(folder, ["cat", 7])


def _empty_class(folder: Path) -> list:
    (folder / "n09999999").mkdir()
    (folder / "__MACOSX").mkdir()
    return []


def _unlabelled_file(folder: Path) -> list:
    (folder / "labels.csv").write_text(f"{SYNSETS[0]}/{SYNSETS[0]}_0.JPEG,fish\n")
    return []


def _unknown_class(folder: Path) -> list:
    (folder / "classes.txt").write_text("\n".join(SYNSETS[:2]))
    return ["--classes", folder / "classes.txt"]


def _no_images(folder: Path) -> list:
    for path in [*folder.rglob("*.*")]:
        path.unlink()
    return []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_loose, "says what loose.png is"),
        (_empty_class, "class folder 'n09999999' holds no images"),
        (_unlabelled_file, "labels.csv has no label for n01440764/n01440764_1.png (11 files in all)"),
        (_unknown_class, "unknown class 'n03445777'; there are 2: n01440764, n02123045"),
        (_unclosed_quote, "labels.csv is not a CSV file: unexpected end of data"),
        (_huge_label, f"labels: 1 values such as {10**18} in 12 samples would become {10**18 + 1:,} classes"),
        (_years, "labels: 3 values such as 1990, 2007, 2024 in 12 samples would become 2,025 classes. Fix: "),
        (_mixed, "labels must be all whole numbers or all names, found 'cat' and 7. Fix: list all classes"),
        (_no_images, "holds no .jpg, .jpeg, .png, .webp files"),
        (lambda folder: ["--out", folder / "out"], "lies inside the source"),
        (lambda folder: ["--only", "dog"], "--only: unknown class 'dog'"),
        (lambda folder: ["--only", *SYNSETS, SYNSETS[1]], "--only names a class twice"),
    ],
)
def test_bad_input_is_one_clear_error_and_writes_nothing(folder, tmp_path, capsys, damage, message):
    extra = damage(folder)
    assert convert("images", folder, "--size", 16, "--out", tmp_path / "out", *extra) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("train", "test"), ("Validation",), ("train", "val")])
def test_parts_of_a_dataset_are_not_taken_for_classes(folder, tmp_path, capsys, names):
    for name in names:
        shutil.copytree(folder, tmp_path / "parts" / name)
    command = ["images", tmp_path / "parts", "--size", 16, "--out", tmp_path / "out"]
    assert convert(*command) == 1
    error = capsys.readouterr().err
    assert f"{' and '.join(sorted(names))} look like parts of a dataset, not like classes. Fix: conv" in error
    assert f"convert {tmp_path}/parts/{names[0]} alone" in error
    assert not (tmp_path / "out").exists()
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert convert(*command, "--classes", tmp_path / "names.txt") == 0


def test_files_that_are_left_out_are_named_before_the_conversion(folder, tmp_path, capsys):
    for name in ("a.gif", "b.GIF", "c.tiff", "d.exe", "e"):
        (folder / SYNSETS[0] / name).write_bytes(b"")
    assert convert("images", folder, "--size", 16, "--out", tmp_path / "out") == 0
    since = "are left out, since only .jpg, .jpeg, .png, .webp files are read."
    fix = "Convert with --formats gif tiff if they belong to the data."
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"warning: {folder}: 2 .gif and 1 .tiff files {since} {fix}",
        f"{folder}: 1 .exe and 1 unnamed files {since}",
    ]


def test_an_empty_class_folder_may_keep_its_number(folder, tmp_path):
    (folder / "n01500000").mkdir()
    words = ("images", folder, "--size", 16, "--out", tmp_path / "out")
    assert convert(*words) == 1
    assert convert(*words, "--allow-empty") == 0
    manifest = read_manifest(str(tmp_path / "out/train"))
    assert manifest.class_names == sorted([*SYNSETS, "n01500000"])
    assert manifest.class_counts[1] == 0 and sum(manifest.class_counts) == 12


@pytest.mark.parametrize(
    "words",
    [
        ["--val", "1"],
        ["--shard", "0/4"],
        ["--shard", "5/4"],
        ["--shard-size", "many"],
        ["--compression", "rar"],
        ["--compression", "gz:3"],
        ["--out", ""],
        ["--shard-samples", "0"],
        ["--encoder", "jpeg"],
        ["--seed", "-1"],
    ],
)
def test_bad_options_are_usage_errors(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as exit_status:
        main(["digits", "--out", str(tmp_path / "out"), *words])
    assert exit_status.value.code == 2 and f"argument {words[0]}: " in capsys.readouterr().err


def test_vae_without_diffusers_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert convert("digits", "--encoder", "vae", "--out", tmp_path / "out") == 1
    assert "pip install 'terminal-velocity[vae]'" in capsys.readouterr().err


def test_unlabelled_images_have_label_zero_and_no_classes(folder, tmp_path):
    convert("images", folder, "--size", 16, "--out", tmp_path / "out", "--unlabelled")
    manifest = read_manifest(str(tmp_path / "out" / "train"))
    assert (manifest.class_names, manifest.class_counts, manifest.num_samples) == ([], [], 12)
    assert {int(sample["label"]) for sample in read_all(tmp_path / "out" / "train")} == {0}
    assert main(["verify", str(tmp_path / "out")]) == 0


# The released code's archives


def write_archive(path: Path, members: dict[str, bytes], labels: object) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(name, data)
        file.writestr("dataset.json", json.dumps({"labels": labels}))


def npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_released_pixel_archive(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    names = [f"00000/img{i:08d}.png" for i in range(7)]
    members = {name: to_bytes(Image.fromarray(p)) for name, p in zip(names, pixels, strict=True)}
    write_archive(tmp_path / "a.zip", members, [[name, (3 * i) % 5] for i, name in enumerate(names)][::-1])
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as file:
        file.writestr(f"__MACOSX/00000/._{Path(names[0]).name}", b"what macOS adds")
    assert convert("zip", tmp_path / "a.zip", "--out", tmp_path / "out") == 0
    samples = read_all(tmp_path / "out" / "train")
    np.testing.assert_array_equal(np.stack([s["image"] for s in samples]), pixels.transpose(0, 3, 1, 2))
    assert [int(s["label"]) for s in samples] == [(3 * i) % 5 for i in range(7)]

    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        file.extractall(tmp_path / "a")
    convert("zip", tmp_path / "a", "--out", tmp_path / "from_folder")
    assert (
        files(tmp_path / "from_folder")["train/shard.00000.mds"]
        == files(tmp_path / "out")["train/shard.00000.mds"]
    )


def test_released_latent_archive_becomes_latents_rounded_to_half(tmp_path, capsys):
    rng = np.random.default_rng(0)
    latents = np.concatenate([rng.normal(1, 5, (6, 4, 4, 4)), rng.uniform(0, 2, (6, 4, 4, 4))], 1).astype(
        np.float32
    )
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(6)]
    write_archive(
        tmp_path / "vae.zip",
        {name: npy(value) for name, value in zip(names, latents, strict=True)},
        [[name, i % 3] for i, name in enumerate(names)],
    )
    assert convert("zip", tmp_path / "vae.zip", "--out", tmp_path / "out") == 0
    samples = read_all(tmp_path / "out" / "train")
    np.testing.assert_array_equal(np.stack([s["latents"] for s in samples]), latents.astype(np.float16))
    manifest = read_manifest(str(tmp_path / "out" / "train"))
    assert manifest.column == "latents" and manifest.shape == [8, 4, 4]

    stored = latents.astype(np.float16).astype(np.float64)
    mean, std = stored[:, :4], stored[:, 4:]
    expected = np.sqrt(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3)))
    np.testing.assert_allclose(manifest.channel_mean, mean.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.channel_std, expected, rtol=1e-12)
    draws = mean + std * rng.standard_normal((2000, *mean.shape))
    np.testing.assert_allclose(manifest.channel_std, draws.std((0, 1, 3, 4)), rtol=5e-3)
    assert convert("zip", tmp_path / "vae.zip", "--flips", "--out", tmp_path / "flipped") == 1
    assert "--flips: mirrored latents are not those" in capsys.readouterr().err


def test_other_content_of_the_same_size_is_another_dataset(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for value in (0, 1):
        (tmp_path / "in" / "0.npy").write_bytes(npy(np.full((1, 8, 8), value, np.uint8)))
        code = convert("zip", tmp_path / "in", "--unlabelled", "--out", tmp_path / "out")
        assert code == value
    assert "holds a different dataset: `input` is" in capsys.readouterr().err


def _npy_header(shape: tuple) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_npy_header((3, 2**21, 2**21)), "not an NPY file of images"),
        (npy(np.zeros((3, 0), np.uint8)), "not an NPY file of images"),
        (npy(np.zeros(5, np.uint8)), "uint8 (1, 5) is neither"),
        (npy(np.zeros((5, 8, 8), np.uint8)), "uint8 (5, 8, 8) is neither"),
    ],
)
def test_npy_file_without_an_image_is_rejected(tmp_path, capsys, data, reason):
    """Also as the first file: the shape is that of the first good one."""
    members = {"0.npy": data, "1.npy": npy(np.zeros((3, 8, 8), np.uint8))}
    write_archive(tmp_path / "a.zip", members, None)
    assert convert("zip", tmp_path / "a.zip", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "1 samples were rejected" in error and f"0.npy: {reason}" in error


@pytest.mark.parametrize("field", ["compression", "flags"])
def test_unreadable_member_of_a_zip_is_rejected(tmp_path, capsys, field):
    members = {f"{i}.png": to_bytes(picture(np.random.default_rng(i))) for i in range(2)}
    write_archive(tmp_path / "a.zip", members, None)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    entry, header = data.index(b"PK\1\2"), 0
    offset, value = {"compression": (10, 8), "flags": (8, 1)}[field]  # deflate, which it is not; encrypted
    data[entry + offset] = data[header + offset - 2] = value
    (tmp_path / "a.zip").write_bytes(data)
    assert convert("zip", tmp_path / "a.zip", "--out", tmp_path / "out") == 1
    assert "1 samples were rejected" in (error := capsys.readouterr().err) and "0.png: cannot be" in error


def test_only_regular_files_of_a_bounded_size_are_read(folder, tmp_path, capsys):
    first = folder / SYNSETS[0]
    os.mkfifo(first / "pipe.png")
    (first / "zero.png").symlink_to("/dev/zero")
    with (first / "vast.png").open("wb") as file:
        file.truncate(2**28 + 1)
    captions = folder / SYNSETS[1]
    os.mkfifo(captions / f"{SYNSETS[1]}_1.txt")
    assert convert("images", folder, "--size", 16, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    for name, reason in (("pipe", "not a regular file"), ("zero", "not a regular file")):
        assert f"{SYNSETS[0]}/{name}.png: {reason}" in error
    assert f"{SYNSETS[0]}/vast.png: holds 268,435,457 bytes, at most 268,435,456 are read" in error
    assert "3 samples were rejected" in error
    assert convert("images", folder, "--size", 16, "--captions", "beside", "--out", tmp_path / "text") == 1
    assert f"{SYNSETS[1]}_1.png: {SYNSETS[1]}/{SYNSETS[1]}_1.txt: not a regular" in capsys.readouterr().err
    assert convert("zip", first / "pipe.png", "--out", tmp_path / "zip") == 1
    assert "pipe.png as a folder or a ZIP file: not a regular file" in capsys.readouterr().err
    files = sources.Archive(str(folder))
    assert files.version(f"{SYNSETS[0]}/zero.png") == "not a regular file"


@pytest.mark.parametrize(
    ("method", "stated", "reason"),
    [
        (zipfile.ZIP_DEFLATED, 300_000_000, "holds 300,000,000 bytes, at most 268,435,456 are read"),
        (zipfile.ZIP_DEFLATED, 1000, "cannot be read: Bad CRC-32"),
        (zipfile.ZIP_STORED, 1000, "cannot be read: "),
        (zipfile.ZIP_BZIP2, 1000, "is compressed by another method than Deflate"),
        (zipfile.ZIP_LZMA, 1000, "is compressed by another method than Deflate"),
    ],
)
def test_a_member_of_a_zip_unpacks_to_no_more_than_it_states(tmp_path, method, stated, reason):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as file:
        file.writestr("0.png", bytes(10_000_000))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    struct.pack_into("<I", data, data.rindex(b"PK\1\2") + 24, stated)
    (tmp_path / "a.zip").write_bytes(data)
    files = sources.Archive(str(tmp_path / "a.zip"))
    tracemalloc.start()
    try:
        with pytest.raises(Rejected, match=re.escape(reason)):
            files.read("0.png")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_colour_in_a_grey_archive_is_rejected(tmp_path, capsys):
    images = [Image.new("L", (8, 8), 9), Image.new("I;16", (8, 8)), Image.new("RGB", (8, 8), "red")]
    members = {f"{i}.png": to_bytes(image) for i, image in enumerate(images)}
    write_archive(tmp_path / "a.zip", members, None)
    assert convert("zip", tmp_path / "a.zip", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "1 samples were rejected" in error and "2.png: uint8 (3, 8, 8), expected uint8 (1, 8, 8)" in error


def test_many_bad_files_at_the_beginning_of_an_archive_are_left_out(tmp_path):
    good = to_bytes(Image.new("RGB", (8, 8)))
    write_archive(tmp_path / "a.zip", {f"{i:03}.png": b"x" if i < 110 else good for i in range(120)}, None)
    words = ("zip", tmp_path / "a.zip", "--out", tmp_path / "out")
    assert convert(*words, "--max-rejected", 110) == 0
    assert read_manifest(f"{tmp_path}/out/train").num_samples == 10


def test_archive_with_null_labels_is_unlabelled_and_one_with_missing_labels_refused(tmp_path, capsys):
    members = {f"{i}.png": to_bytes(Image.new("RGB", (8, 8))) for i in range(2)}
    write_archive(tmp_path / "null.zip", members, None)
    assert sources.archive(str(tmp_path / "null.zip")).class_names == []
    write_archive(tmp_path / "short.zip", members, [["0.png", 0]])
    assert convert("zip", tmp_path / "short.zip", "--out", tmp_path / "out") == 1
    assert "dataset.json has no label for 1.png" in capsys.readouterr().err
    write_archive(tmp_path / "negative.zip", members, [["0.png", 0], ["1.png", -1]])
    with pytest.raises(DatasetError, match="label -1 is not in 0..0"):
        sources.archive(str(tmp_path / "negative.zip"))
    assert convert("zip", tmp_path / "nowhere.zip", "--out", tmp_path / "out") == 1
    assert "as a folder or a ZIP file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.full((8, 4, 4), np.nan, np.float32), "not finite in float16"),
        (np.full((8, 4, 4), 1e6, np.float32), "not finite in float16"),
        (np.zeros((3, 4, 4), np.float32), "neither uint8 pixels (1 or 3 channels) nor float latents"),
        (np.zeros((8, 4, 5), np.float32), "(8, 4, 5), expected float16 (8, 4, 4)"),
        (-np.ones((8, 4, 4), np.float32), "the last 4 of 8 channels, the deviations, hold negative values"),
    ],
)
def test_bad_latents_are_rejected(tmp_path, capsys, value, reason):
    members = {"0.npy": npy(np.ones((8, 4, 4), np.float32)), "1.npy": npy(value)}
    write_archive(tmp_path / "a.zip", members, [["0.npy", 0], ["1.npy", 0]])
    assert convert("zip", tmp_path / "a.zip", "--out", tmp_path / "out") == 1
    assert reason in capsys.readouterr().err


def test_latents_that_are_means_alone_are_refused_before_the_conversion(tmp_path, capsys):
    means = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)
    write_archive(tmp_path / "a.zip", {"0.npy": npy(means)}, None)
    assert convert("zip", tmp_path / "a.zip", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "the last 2 of 4 channels, the deviations, hold negative values" in error
    assert "Fix: append zeros to latents that are means alone" in error
    assert not (tmp_path / "out").exists()
    write_archive(tmp_path / "b.zip", {"0.npy": npy(np.concatenate([means, 0 * means]))}, None)
    assert convert("zip", tmp_path / "b.zip", "--out", tmp_path / "out") == 0


# mds, emoji, verify, show


def test_subset_of_a_finished_dataset_is_relabelled(tmp_path):
    convert("digits", "--out", tmp_path / "all", "--compression", "zstd")
    assert convert("mds", tmp_path / "all", "--only", 7, 3, "--out", tmp_path / "some") == 0
    data = load_digits()
    kept = np.isin(data.target, [3, 7])
    samples = read_all(tmp_path / "some" / "train")
    np.testing.assert_array_equal(
        np.stack([s["image"][0] for s in samples]), np.rint(data.images[kept] * 255 / 16).astype(np.uint8)
    )
    assert [int(s["label"]) for s in samples] == [{7: 0, 3: 1}[t] for t in data.target[kept]]
    assert read_manifest(str(tmp_path / "some" / "train")).class_names == ["7", "3"]


def test_emoji_of_both_kinds_are_drawn(tmp_path):
    if not (Path(sources.EMOJI_FONT).is_file() and Path(sources.EMOJI_LIST).is_file()):
        pytest.skip("needs the Debian packages fonts-noto-color-emoji and unicode-data")
    source = sources.emoji(32)
    assert "Food & Drink" in source.class_names and len(source.keys) > 1000
    apple = source.load("1F34E")
    centre = apple[:, 12:20, 12:20].reshape(3, -1).mean(1)
    assert apple.shape == (3, 32, 32) and (apple[:, 0, 0] == 255).all() and centre[0] > 2 * centre[1]
    assert source.class_names[source.labels[source.keys.index("1F34E")]] == "Food & Drink"


def test_emoji_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "EMOJI_FONT", str(tmp_path / "none.ttf"))
    with pytest.raises(DatasetError, match="apt-get install fonts-noto-color-emoji unicode-data"):
        sources.emoji(32)


def _flip_byte(folder: Path) -> str:
    path = folder / "shard.00001.mds"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    return "shard.00001.mds: the size or the checksum is not that of the index"


def _lose_shard(folder: Path) -> str:
    (folder / "shard.00000.mds").unlink()
    return "shard.00000.mds: the file is missing"


def _wrong_size(folder: Path) -> str:
    size = (folder / "shard.00000.mds").stat().st_size
    for path in (folder / "index.json", folder / "manifest.json"):
        path.write_text(path.read_text().replace(f'"bytes": {size}', f'"bytes": {size + 1}'))
    return "shard.00000.mds: the size or the checksum is not that of the index"


def _break_index(folder: Path) -> str:
    (folder / "index.json").write_text('{"shards": [3]}')
    return "train/index.json: shards.0: 3: input should be an object"


def _change_manifest(key: str, value: object, message: str):
    def change(folder: Path) -> str:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return message

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _flip_byte,
        _lose_shard,
        _wrong_size,
        _break_index,
        _change_manifest(
            "shape", "wide", 'train/manifest.json: shape: "wide": input should be a valid array'
        ),
        _change_manifest(
            "class_names", None, "manifest.json: class_names: null: input should be a valid array"
        ),
        _change_manifest("shards", [1], "manifest.json: shards: [1]: input should be an object"),
        _change_manifest("class_names", ["0", "1"], "manifest.json: class_counts: has 10 values, not 2"),
        _change_manifest(
            "class_counts", [179] * 10, "class_counts: adds up to 1790 samples, num_samples is 1797"
        ),
        _change_manifest("class_counts", [178] * 9 + [195], "class_counts: the manifest says [178, 178"),
        _change_manifest("num_samples", 1796, "shards: adds up to 1797 samples, num_samples is 1796"),
        _change_manifest("rejected", 3, "rejected: the manifest says 3, there are 0"),
        _change_manifest("channel_mean", [77.0], "channel_mean: the manifest says [77.0]"),
        _change_manifest("shape", [1, 4, 16], 'ndarray:uint8:1,8,8", "label": "int64"}, manifest.json says'),
        _change_manifest("column", "latents", "shape: [1, 8, 8] of latents, whose means"),
        _change_manifest("shards", {}, "manifest.json: shards: adds up to 0 samples, num_samples is 1797"),
    ],
)
def test_verify_names_the_damage(tmp_path, capsys, damage):
    convert("digits", "--out", tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    message = damage(tmp_path / "train")
    assert main(["verify", str(tmp_path / "train")]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "shape", "classes", "model"),
    [
        ("image", [1, 8, 8], 10, {"size": 8, "channels": 1, "classes": 10, "patch": 2, "width": 128}),
        ("image", [3, 30, 30], 0, {"size": 30, "channels": 3, "classes": 0, "patch": 5, "width": 128}),
        ("image", [3, 96, 96], 3, {"size": 96, "channels": 3, "classes": 3, "patch": 6, "width": 384}),
        ("latents", [8, 32, 32], 3, {"size": 32, "channels": 4, "classes": 3, "patch": 2, "width": 384}),
    ],
)
def test_the_yaml_fits_the_data(tmp_path, column, shape, classes, model):
    plan = Manifest("x", {}, "", column, shape, ["a"] * classes, {"model": "vae"}, "", False, None, 1)
    path = tmp_path / "train.yaml"
    path.write_text(training_yaml("s3://bucket/my photos", dataclasses.replace(plan, num_samples=20)))
    config = load_config(TrainConfig, str(path), [])
    assert {key: getattr(config.model, key) for key in model} == model
    assert (config.run_name, config.data.remote) == ("my_photos", "s3://bucket/my photos/train")
    assert (config.data.batch_size, config.data.canonical_nodes) == (20, 2)
    assert config.data.normalize == ("manifest" if column == "latents" else "pixels")
    assert config.ema.ramp and config.objective.guidance == (1.25 if classes else 1.0)
    other = load_config(TrainConfig, str(path), ["run_name=other"])
    assert (config.folder, other.folder) == ("runs/my_photos", "runs/other")
    assert other.save_folder == "runs/other/checkpoints"


def test_a_yaml_that_the_user_changed_stays(tmp_path, capsys):
    words = ("digits", "--limit", 20, "--out", tmp_path / "out")
    convert(*words)
    (tmp_path / "out/train.yaml").write_text("mine")
    assert convert(*words) == 0
    assert (tmp_path / "out/train.yaml").read_text() == "mine"
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"next: \S*composer recipe/train.py {tmp_path}/out/train.yaml", said)


def test_sides_that_are_only_declared_take_no_memory(tmp_path, capsys):
    convert("digits", "--limit", 1, "--out", tmp_path)
    folder, side = tmp_path / "train", 2**16 - 6
    for name in ("index.json", "manifest.json"):
        text = (folder / name).read_text().replace("1,8,8", f"1,{side},{side}")
        text = re.sub(r'("bytes": )\d+', rf"\g<1>{side**2 + 100}", text)
        text = re.sub(r'("column_sizes": \[)64', rf"\g<1>{side**2}", text)
        (folder / name).write_text(text)
    _change_manifest("shape", [1, side, side], "")(folder)
    tracemalloc.start()
    try:
        assert main(["verify", str(folder)]) == 1
        assert tracemalloc.get_traced_memory()[1] < 10**8
    finally:
        tracemalloc.stop()
    assert "shard.00000.mds: the size or the checksum is not that of the index" in capsys.readouterr().out


def test_no_shard_may_lie_outside_the_folder(tmp_path, capsys):
    convert("digits", "--out", tmp_path)
    shutil.move(tmp_path / "train/shard.00000.mds", tmp_path / "outside.mds")
    index = tmp_path / "train/index.json"
    index.write_text(index.read_text().replace("shard.00000.mds", "../outside.mds"))
    message = 'index.json names a file that is not a shard of its folder: "../outside.mds"'
    for words in (["verify", str(tmp_path)], ["mds", f"{tmp_path}/train", "--out", f"{tmp_path}/copy"]):
        assert main(words) == 1
        assert message in "".join(capsys.readouterr())
    stated = {"bytes": 1, "xxh64": 16 * "0", "samples": 1797}
    _change_manifest("shards", {"/outside.mds": stated}, "")(tmp_path / "train")
    with pytest.raises(DatasetError, match="manifest.json names a file that is not a shard .*/outside.mds"):
        read_manifest(str(tmp_path / "train"))


def test_the_folder_above_a_dataset_is_told_from_none(tmp_path):
    convert("digits", "--out", tmp_path / "out")
    with pytest.raises(DatasetError, match="so name one of them: .*out/train$"):
        read_manifest(str(tmp_path / "out"))
    with pytest.raises(DatasetError, match="did not finish"):
        read_manifest(str(tmp_path))


def test_show_draws_the_stored_samples(tmp_path):
    convert("digits", "--out", tmp_path)
    assert (
        main(["show", str(tmp_path), "--out", str(tmp_path / "grid.png"), "--rows", "2", "--columns", "3"])
        == 0
    )
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    samples = read_all(tmp_path / "train")
    assert grid.shape == (16, 24)
    np.testing.assert_array_equal(grid[:8, :8], samples[0]["image"][0])
    np.testing.assert_array_equal(grid[8:, 16:], samples[-1]["image"][0])


def test_manifest_of_a_newer_schema_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="schema_version is 2, expected 1"):
        Manifest.from_json(b'{"schema_version": 2}', "manifest.json")
    with pytest.raises(DatasetError, match="manifest.json: source: field required"):
        Manifest.from_json(b'{"schema_version": 1, "colour": 3}', "manifest.json")
