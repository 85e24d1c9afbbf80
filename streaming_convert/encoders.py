"""Encoders of what is stored: unchanged uint8 pixels, an autoencoder's latents, captions' embeddings."""

import base64
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from storage.manifest import DatasetError
from streaming_convert.images import Rejected
from streaming_convert.sources import Source

if TYPE_CHECKING:
    from torch.nn import Module

    from recipe.pretrained import TextEncoder

DTYPES = ("fp32", "fp16", "bf16")
TRIED = 4  # pictures that are encoded and decoded to see what the autoencoder does


class Stored:
    """The encoder `none`, which stores the samples of the source unchanged: pixels, or existing latents.

    Like `VAE` it is a function of a batch of loaded samples, and says which column they become, of which
    shape, what the manifest tells of it (`info`), and whether it needs one process (a GPU, threads of its
    own) fed by loader threads, or every worker process can encode its own parts.
    """

    batch_size = 16
    in_process = False

    def __init__(self, source: Source) -> None:
        self.column, self.shape = source.column, source.shape
        self.info = source.encoder or {"name": "none", "hash": None, "scaling": 1.0}

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        return samples


class VAE:
    """Any autoencoder of diffusers: uint8 (N,3,H,W) => float16 (N,2c,h,w), the means, then the deviations.

    Latents are stored as the autoencoder gives and takes them, not multiplied by its scaling factor, so
    `scaling` is 1.0 in the manifest. Deviations are those of its posterior, 0 where it has none.
    """

    column = "latents"
    in_process = True

    def __init__(self, source: Source, model: str, dtype: str, batch_size: int, device: str | None) -> None:
        """Load `model`, a folder or hub name, in the precision `dtype`, one of DTYPES, and try it.

        A device of None is the GPU if there is one. Raises DatasetError if the images do not fit the model.
        """
        from recipe.pretrained import hash_weights, load_vae

        if source.column != "image":
            raise DatasetError(f"--encoder vae: the source {source.name} holds latents already")
        self.vae = load_vae(model, dtype, device)
        _check_size(self.vae, model, source.shape)
        self.batch_size = batch_size
        self.shape = self._round_trip(source, model)
        hashed = {"name": "vae", "hash": hash_weights(self.vae), "scaling": 1.0}
        self.info = {**hashed, "model": model, "dtype": dtype, "batch_size": batch_size}

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        import torch

        from recipe.pretrained import encode_pixels

        with torch.inference_mode():
            return encode_pixels(self.vae, torch.from_numpy(samples)).half().cpu().numpy()

    def _round_trip(self, source: Source, model: str) -> tuple[int, ...]:
        """Encode and decode the first pictures, say how far they come back, and return the latents' shape.

        Raises DatasetError where the autoencoder does not give pictures of the same size back.
        """
        import torch

        from recipe.pictures import decode

        pixels = np.stack(first_pictures(source, TRIED) or [np.zeros(source.shape, np.uint8)])
        kind, sides = type(self.vae).__name__, "x".join(map(str, source.shape))
        try:
            latents = self(pixels)
            means = torch.from_numpy(latents[:, : latents.shape[1] // 2].astype(np.float32))
            with torch.inference_mode():
                back = decode(self.vae, means).cpu().numpy()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # of a network made for others
            reason = " ".join(str(error).split())[:200]
            said = f"--vae: {model} ({kind}) does not take pictures of {sides}: {reason}"
            raise DatasetError(said) from error
        if back.shape != pixels.shape or not np.isfinite(back).all():
            found = "x".join(map(str, back.shape[1:])) if back.shape != pixels.shape else "no numbers"
            raise DatasetError(f"--vae: {model} ({kind}) turns pictures of {sides} into {found}")
        error = np.abs(back.clip(0, 255) - pixels).mean()
        size = "x".join(map(str, (latents.shape[1] // 2, *latents.shape[2:])))
        tried = f"mean error {error:.1f} of 255 in {len(pixels)} pictures"
        print(f"{model} ({kind}): {sides} to {size} and back: {tried}")
        return latents.shape[1:]


Encoder = Stored | VAE


def _check_size(vae: "Module", model: str, shape: tuple[int, ...]) -> None:
    """Raise DatasetError for pictures (C,H,W) whose channels or sides the autoencoder cannot take."""
    config = vae.config
    blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels") or [1]
    factor, channels = 2 ** (len(blocks) - 1), config.get("in_channels", 3)
    if shape[0] != channels or shape[1] % factor or shape[2] % factor:
        raise DatasetError(
            f"--vae: {model} needs {channels} channels and sides divisible by {factor}, "
            f"the images are {'x'.join(map(str, shape))}"
        )


def first_pictures(source: Source, count: int) -> list[np.ndarray]:
    """Return the first good pictures of a source, at most `count`, of the first ten times as many."""

    def good() -> Iterator[np.ndarray]:
        for key in source.keys[: 10 * count]:
            with suppress(Rejected):
                if (one := source.load(key)).shape == source.shape:
                    yield one

    return list(islice(good(), count))


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
