"""Encoders of what is stored: unchanged uint8 pixels, an autoencoder's latents, captions' embeddings."""

import base64
from typing import TYPE_CHECKING, Protocol

import numpy as np

from storage.manifest import DatasetError
from streaming_convert.sources import Source

if TYPE_CHECKING:
    from recipe.pretrained import TextEncoder

DTYPES = ("fp32", "fp16", "bf16")


class Encoder(Protocol):
    """A function from a batch of loaded samples to what is stored. `info` goes into the manifest.

    in_process: True for an encoder that needs one process (a GPU, threads of its own) fed by loader threads;
    False if every worker process can encode its own parts.
    """

    column: str
    shape: tuple[int, ...]
    info: dict
    batch_size: int
    in_process: bool

    def __call__(self, samples: np.ndarray) -> np.ndarray: ...


class Stored:
    """The encoder `none`, which stores the samples of the source unchanged: pixels, or existing latents."""

    batch_size = 16
    in_process = False

    def __init__(self, source: Source) -> None:
        self.column, self.shape = source.column, source.shape
        self.info = source.encoder or {"name": "none", "hash": None, "scaling": 1.0}

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        return samples


class VAE:
    """A diffusers AutoencoderKL: uint8 (N,3,H,W) => float16 (N,2c,h,w), the posterior's mean, then its std.

    Latents are not multiplied by the model's scaling factor, so `scaling` is 1.0 in the manifest.
    """

    column = "latents"
    in_process = True

    def __init__(self, source: Source, model: str, dtype: str, batch_size: int, device: str | None) -> None:
        """Load `model`, a folder or hub name, in the precision `dtype`, one of DTYPES.

        A device of None is the GPU if there is one. Raises DatasetError if the images do not fit the model.
        """
        from recipe.pretrained import hash_weights, load_vae

        if source.column != "image":
            raise DatasetError(f"--encoder vae: the source {source.name} holds latents already")
        self.vae = load_vae(model, dtype, device)
        config = self.vae.config
        channels, height, width = source.shape
        factor = 2 ** (len(config.block_out_channels) - 1)
        if channels != config.in_channels or height % factor or width % factor:
            raise DatasetError(
                f"--vae: {model} needs {config.in_channels} channels and sides divisible by {factor}, "
                f"the images are {channels}x{height}x{width}"
            )
        self.shape = (2 * config.latent_channels, height // factor, width // factor)
        self.batch_size = batch_size
        hashed = {"name": "vae", "hash": hash_weights(self.vae), "scaling": 1.0}
        self.info = {**hashed, "model": model, "dtype": dtype, "batch_size": batch_size}

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            images = torch.from_numpy(samples).to(self.vae.device, self.vae.dtype) / 127.5 - 1
            posterior = self.vae.encode(images).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1).half().cpu().numpy()


def load_text_encoder(
    source: Source, model: str, tokens: int, device: str | None
) -> tuple["TextEncoder", dict]:
    """Load the text encoder `model`, a folder or hub name; return it and its facts for the manifest."""
    from recipe.pretrained import TextEncoder

    if not source.captions:
        raise DatasetError(f"--text-encoder: the source {source.name} has no captions; --captions names them")
    try:
        encoder = TextEncoder(model, tokens, device)
        text, (length,) = encoder.encode([""])
    except ValueError as error:
        raise DatasetError(f"--text-encoder: {error}") from error
    empty = base64.b64encode(text[0, :length].astype("<f2").tobytes()).decode()
    size = {"tokens": tokens, "width": encoder.width}
    return encoder, {"encoder": model, "sha256": encoder.sha256, **size, "empty": empty}
