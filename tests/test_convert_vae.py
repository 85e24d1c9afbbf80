"""Latents of autoencoders of diffusers: what is stored, its statistics, batch sizes, resume."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from recipe.pretrained import hash_weights, load_decoder, load_vae
from storage.manifest import DatasetError, read_manifest
from streaming_convert import encoders, sources
from streaming_convert.__main__ import main
from streaming_convert.images import Opener
from tests.test_convert import convert, files, read_all

diffusers = pytest.importorskip("diffusers")


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
    source = sources.image_folder(pictures, Opener(16))
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


def tiny(**options):
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return diffusers.AutoencoderTiny(**blocks, **counts, **options)


def deep(**options):
    two = {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    two |= {f"{part}_block_out_channels": (8, 16) for part in ("encoder", "decoder")}
    two |= {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
    return diffusers.AutoencoderDC(latent_channels=8, attention_head_dim=8, **two, **options)


def flux():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    factors = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks, **factors, **plain)


def representations():
    sizes = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_patch_size": 4}
    sizes |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    sizes |= {"decoder_intermediate_size": 16, "patch_size": 4, "encoder_input_size": 16}
    return diffusers.AutoencoderRAE(encoder_type="mae", **sizes)


@pytest.mark.parametrize(
    ("make", "channels", "side"), [(tiny, 4, 8), (deep, 8, 8), (flux, 16, 8), (representations, 64, 4)]
)
def test_any_autoencoder_of_images_by_its_own_class(pictures, tmp_path, capsys, make, channels, side):
    torch.manual_seed(0)
    network = make().eval()
    network.save_pretrained(tmp_path / "pipeline/vae")
    (tmp_path / "pipeline/model_index.json").write_text("{}")  # the folder of a whole pipeline
    folder = tmp_path / "pipeline"
    assert convert(*command(pictures, str(folder), tmp_path / "out")) == 0
    name = type(network).__name__
    said = (
        rf"pipeline \({name}\): 3x16x16 to {channels}x{side}x{side} and back: mean error [\d.]+ of 255 in 4"
    )
    assert re.search(said, capsys.readouterr().out)
    manifest, stored = read_manifest(f"{tmp_path}/out/train"), latents(tmp_path / "out/train")
    assert stored.shape[1:] == (2 * channels, side, side) and np.isfinite(stored).all()
    source = sources.image_folder(pictures, Opener(16))
    pixels = torch.from_numpy(np.stack([source.load(key) for key in source.keys])).float()
    unit = name == "AutoencoderRAE"
    with torch.no_grad():
        found = network.encode(pixels / 255 if unit else pixels / 127.5 - 1)
        dist = getattr(found, "latent_dist", None)
        exact = dist.mean if dist else found[0]
        np.testing.assert_allclose(stored[:, :channels], exact, rtol=2e-3, atol=2e-3)
        assert dist is not None or not stored[:, channels:].any()
        decoded = load_decoder(manifest.encoder, None, "cpu")(exact)
        again = network.decode(exact).sample
    expected = again * 255 if unit else (again + 1) * 127.5
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-2)


def test_scaling_and_shift_of_latents_that_others_made(vae_folder):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    stored = torch.randn(2, 4, 8, 8)
    encoder = {"name": "precomputed", "hash": None, "model": vae_folder, "scaling": 0.5, "shift": 0.25}
    with torch.no_grad():
        expected = (vae.decode(stored / 0.5 + 0.25).sample + 1) * 127.5
    torch.testing.assert_close(load_decoder(encoder, None, "cpu")(stored), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"_class_name": "UNet2DModel"}', "UNet2DModel is no autoencoder of this diffusers"),
        ('{"_class_name": "os"}', "os is no autoencoder of this diffusers"),
        ("{}", "None is no autoencoder of this diffusers"),
        ('{"_class_name": "AutoencoderKL"}', "cannot load"),
    ],
)
def test_a_folder_that_is_no_autoencoder_is_one_line(pictures, tmp_path, capsys, config, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(config)
    assert convert(*command(pictures, str(tmp_path / "model"), tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1


def test_weights_that_are_a_pickle_are_not_opened(vae_folder, tmp_path):
    diffusers.AutoencoderKL.from_pretrained(vae_folder).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(DatasetError, match="cannot load .*safetensors"):
        load_vae(str(tmp_path))


def test_mirror_images_are_encoded_not_mirrored_latents(pictures, vae_folder, tmp_path):
    assert convert(*command(pictures, vae_folder, tmp_path / "out"), "--flips") == 0
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    source, stored = sources.image_folder(pictures, Opener(16)), latents(tmp_path / "out/train")
    pixels = torch.from_numpy(np.stack([source.load(key) for key in source.keys[:3]])).float() / 127.5 - 1
    with torch.inference_mode():
        mirrored = vae.encode(pixels.flip(3)).latent_dist.mean
    assert len(stored) == 42
    np.testing.assert_allclose(stored[1:6:2, :4], mirrored, rtol=2e-3, atol=2e-3)
    assert np.abs(stored[1, :4] - stored[0, :4][..., ::-1]).max() > 0.01
