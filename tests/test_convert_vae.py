"""Latents of a diffusers AutoencoderKL: what is stored, its statistics, batch sizes, resume."""

import numpy as np
import pytest
import torch
from PIL import Image

from recipe.pretrained import hash_weights
from storage.manifest import DatasetError, read_manifest
from streaming_convert import encoders, sources
from streaming_convert.__main__ import main
from tests.test_convert import convert, files, read_all

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random AutoencoderKL that halves the side of its images, saved to disk."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(21):
        (folder / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            folder / str(i % 3) / f"{i}.png"
        )
    return str(folder)


def command(pictures: str, vae_folder: str, out: object, **options: object) -> list[object]:
    words = ["images", pictures, "--size", 16, "--encoder", "vae", "--vae", vae_folder, "--shard-samples", 8]
    options = {"device": "cpu", **options}
    return [*words, "--out", out, *(part for key, value in options.items() for part in (f"--{key}", value))]


def latents(folder: object) -> np.ndarray:
    return np.stack([sample["latents"] for sample in read_all(folder)])


def test_stored_latents_are_the_posterior_in_half_precision(pictures, vae_folder, tmp_path):
    assert convert(*command(pictures, vae_folder, tmp_path)) == 0
    source = sources.image_folder(pictures, 16)
    images = torch.from_numpy(np.stack([source.load(key) for key in source.keys])).float() / 127.5 - 1
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    with torch.inference_mode():
        # The same batches: shards of 8, batches of up to 32.
        posteriors = [vae.encode(batch).latent_dist for batch in images.split(8)]
        expected = torch.cat([torch.cat([p.mean, p.std], 1) for p in posteriors]).numpy()
        stored = latents(tmp_path / "train")
        np.testing.assert_array_equal(stored, expected.astype(np.float16))
        means = torch.from_numpy(stored[:, :4].astype(np.float32))
        decoded, truth = vae.decode(means).sample, vae.decode(torch.from_numpy(expected[:, :4])).sample
    assert (decoded - truth).abs().max() < 2e-3 * truth.abs().max()
    assert [int(sample["label"]) for sample in read_all(tmp_path / "train")] == source.labels.tolist()

    manifest = read_manifest(str(tmp_path / "train"))
    assert (
        manifest.shape == [8, 8, 8]
        and manifest.encoder["name"] == "vae"
        and manifest.encoder["scaling"] == 1.0
    )
    assert manifest.encoder["hash"] == hash_weights(vae)
    assert main(["verify", str(tmp_path)]) == 0
    assert main(["show", str(tmp_path), "--vae", vae_folder, "--out", str(tmp_path / "grid.png")]) == 0
    assert Image.open(tmp_path / "grid.png").size == (160, 160)


def test_batch_size_shows_in_rounding_only(pictures, vae_folder, tmp_path):
    for size in (1, 8):
        convert(*command(pictures, vae_folder, tmp_path / str(size), **{"batch-size": size}))
    one, eight = (latents(tmp_path / str(size) / "train").astype(np.float32) for size in (1, 8))
    # One unit in the last place of float16, where the two float32 results round to different sides; of values
    # near zero, what float32 leaves of sums of order 1.
    unit = np.spacing(np.maximum(np.abs(one), 2**-14).astype(np.float16)).astype(np.float32)
    assert (np.abs(one - eight) <= np.maximum(unit, 1e-6)).all()
    assert (one == eight).mean() > 0.99


def test_resumed_encoding_equals_uninterrupted(pictures, vae_folder, tmp_path):
    convert(*command(pictures, vae_folder, tmp_path / "whole"))
    convert(*command(pictures, vae_folder, tmp_path / "parts", shard="2/3"))
    words = command(pictures, vae_folder + "/", tmp_path / "parts")  # the same weights
    assert main([*map(str, words), "--workers", "3"]) == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_finished_pixels_can_be_encoded_later(pictures, vae_folder, tmp_path):
    convert(*command(pictures, vae_folder, tmp_path / "direct"))
    convert("images", pictures, "--size", 16, "--out", tmp_path / "pixels")
    words = ["--encoder", "vae", "--vae", vae_folder, "--shard-samples", 8, "--device", "cpu"]
    assert convert("mds", tmp_path / "pixels", *words, "--out", tmp_path / "later") == 0
    direct, later = (files(tmp_path / name) for name in ("direct", "later"))
    assert [direct[f"train/shard.{i:05}.mds"] for i in range(3)] == [
        later[f"train/shard.{i:05}.mds"] for i in range(3)
    ]


def test_latents_and_embeddings_of_captions_together(pictures, vae_folder, tmp_path):
    pytest.importorskip("transformers")
    from tests.test_text_encoder import save_t5

    rows = [f"{i % 3}/{i}.png,{'red ' * i}" for i in range(21)]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    options = {
        "captions": tmp_path / "captions.csv",
        "text-encoder": save_t5(tmp_path / "t5"),
        "text-tokens": 4,
    }
    assert convert(*command(pictures, vae_folder, tmp_path / "out", **options), "--max-rejected", 0) == 0
    samples = read_all(tmp_path / "out" / "train")
    assert [sample["text_length"] for sample in samples[:4]] == [1, 4, 4, 4] and len(samples) == 21
    assert samples[0]["latents"].shape == (8, 8, 8) and samples[0]["text"].shape == (4, 16)
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["show", str(tmp_path / "out"), "--out", str(tmp_path / "grid.png")]) == 0


def test_half_precision_encoder_stays_close(pictures, vae_folder, tmp_path):
    convert(*command(pictures, vae_folder, tmp_path / "fp32"))
    convert(*command(pictures, vae_folder, tmp_path / "bf16", dtype="bf16"))
    exact, rough = (latents(tmp_path / name / "train").astype(np.float32) for name in ("fp32", "bf16"))
    assert 0 < np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()


def test_impossible_requests_are_refused_before_any_work(pictures, vae_folder, tmp_path, capsys):
    digits = sources.digits()
    with pytest.raises(DatasetError, match="needs 3 channels and sides divisible by 2, the images are 1x8x8"):
        encoders.VAE(digits, vae_folder, "fp32", 8, "cpu")
    words = command(pictures, vae_folder, tmp_path / "out")
    words[words.index("--size") + 1] = 15
    assert convert(*words) == 1
    assert "sides divisible by 2, the images are 3x15x15" in capsys.readouterr().err
    convert(*command(pictures, vae_folder, tmp_path / "latents"))
    assert (
        convert(
            "mds", tmp_path / "latents", "--encoder", "vae", "--vae", vae_folder, "--out", tmp_path / "out"
        )
        == 1
    )
    assert "holds latents already" in capsys.readouterr().err
    for model, device in ((str(tmp_path), "cpu"), (vae_folder, "cuda:99"), (vae_folder, "foo")):
        assert convert(*command(pictures, model, tmp_path / "out", device=device)) == 1
        error = capsys.readouterr().err
        assert f"error: --vae: cannot load {model} on {device}: " in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
