"""Latents to pixels, with a real (small, random) diffusers autoencoder."""

import pytest
import torch

from recipe.dit import DiT, DiTConfig
from recipe.generator import Generator
from recipe.pretrained import hash_weights, load_decoder
from recipe.weights import save_weights
from storage.manifest import DatasetError

FACTS = {
    "method": {"objective": "tvm", "scaled": True, "guidance": [1.0]},
    "average": "ema",
    "step": 1,
    "train_seconds": 0.0,
}


def test_without_diffusers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(DatasetError, match=r"pip install 'terminal-velocity\[vae\]'"):
        load_decoder({"name": "vae", "model": "some/where"}, None, "cpu")


@pytest.mark.parametrize("model", [None, "somewhere", "/data/vae", "a/b/c", "../vae"])
def test_the_network_is_not_asked_for_an_autoencoder_of_a_made_up_name(monkeypatch, model):
    monkeypatch.setattr("recipe.pretrained.load_vae", lambda *_: pytest.fail("asked"))
    encoder = {"name": "precomputed", "hash": None, "model": model, "scaling": 1.0}
    with pytest.raises(
        ValueError, match=f"autoencoder .'{model or 'precomputed'}'. is not known here: give --vae"
    ):
        load_decoder(encoder, None, "cpu")


def test_decoding_is_the_autoencoders_own_in_two_batches(vae_folder):
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    latents = torch.randn(18, 4, 8, 8)  # more than are decoded at a time
    decode = load_decoder({"name": "vae", "hash": hash_weights(network), "scaling": 2.0}, vae_folder, "cpu")
    with torch.no_grad():
        expected = (network.decode(latents / 2).sample + 1) * 127.5
    torch.testing.assert_close(decode(latents), expected, rtol=1e-4, atol=1e-3)


def test_another_autoencoder_than_the_datas_is_refused(vae_folder):
    with pytest.raises(ValueError, match="hash to .* made with 0123"):
        load_decoder({"name": "vae", "hash": "0123", "scaling": 1.0}, vae_folder, "cpu")


def test_weights_for_latents_make_pictures(vae_folder, tmp_path):
    net = DiT(DiTConfig(size=8, channels=4, classes=3, width=16, depth=1, heads=2))
    encoder = {"name": "vae", "hash": None, "model": vae_folder, "scaling": 1.0}
    data = {"column": "latents", "mean": [0.5] * 4, "std": [2.0] * 4, "encoder": encoder}
    save_weights(tmp_path / "w", net.state_dict(), net.config, {**FACTS, "data": data})
    generator = Generator(tmp_path / "w", rounding="down")
    seeds = torch.arange(3)
    images = generator(torch.tensor([0, 1, 3]), seeds, 1, 1.0)
    assert (images.shape, images.dtype) == ((3, 3, 16, 16), torch.uint8)
    # An untrained network returns 0, so the samples are the noise, brought back to the scale of the latents.
    latents = generator.noise(seeds) * 2 + 0.5
    assert torch.equal(images, generator.decode(latents).clamp(0, 255).floor().to(torch.uint8))
