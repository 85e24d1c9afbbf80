"""Latents => pixels: the decoder of the autoencoder that a dataset's latents were made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streaming_convert.encoders import hash_weights, load_vae

Decoder = Callable[[Tensor], Tensor]


def load_decoder(
    encoder: dict[str, Any], vae: str | None, device: str | torch.device, batch_size: int = 16
) -> Decoder:
    """A function from latents (N, c, h, w), as stored, to pixels (N, 3, H, W) in 0..255 units, not rounded.

    It works in fp16 on a GPU, as the published evaluations do, and in fp32 on a CPU, `batch_size` at a time.

    Args:
        encoder: what the weights say about the autoencoder (`encoder` of the dataset's manifest).
        vae: folder of a diffusers AutoencoderKL; None for the one that `encoder` names.

    Raises:
        ValueError: diffusers is missing, there is no such autoencoder, or its weights are others than those
            that the latents were made with.
    """
    model = vae or encoder.get("model") or encoder["name"]
    network = load_vae(model, "fp32", str(device)).requires_grad_(False)
    made_with = encoder.get("hash")
    if made_with is not None and hash_weights(network) != made_with:
        raise ValueError(
            f"vae: the weights of {model} hash to {hash_weights(network)}, "
            f"the latents were made with {made_with}"
        )
    network = network.half() if torch.device(device).type == "cuda" else network
    scaling = encoder.get("scaling", 1.0)

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        parts = (latents / scaling).to(network.dtype).split(batch_size)
        return torch.cat([(network.decode(part).sample.float() + 1) * 127.5 for part in parts])

    return decode
