"""The normaliser: stored samples to the network's input, and its output back to stored values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recipe.draws import Stream, keys, normal
from recipe.settings import ConfigError
from storage.manifest import Manifest

if TYPE_CHECKING:
    from recipe.data import Statistics


class Normalizer(nn.Module):
    """Stored sample => network input x0 = (value - mean) / std per channel, and back."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, batch: dict[str, Tensor], step: Tensor, seed: int) -> Tensor:
        """Return the network's input (B, C, H, W) for a batch.

        Latents are drawn from their posterior, keyed by (seed, step, sample id).
        """
        if "image" in batch:
            value = batch["image"].to(self.mean.dtype)
        else:
            mean, std = batch["latents"].to(self.mean.dtype).chunk(2, 1)
            noise = normal(keys(seed, step, batch["sample"], Stream.POSTERIOR), *mean.shape[1:])
            value = mean + std * noise.to(mean.dtype)
        return (value - self.mean) / self.std

    def invert(self, x0: Tensor) -> Tensor:
        """Return the stored values of a network's output (B, C, H, W)."""
        return x0 * self.std + self.mean


def make_normalizer(normalize: str | Statistics, manifest: Manifest) -> Normalizer:
    """Make the normaliser of `data.normalize`. Raises ConfigError unless it has numbers for each channel."""
    channels = manifest.channels
    if normalize == "pixels":
        mean, std = [127.5] * channels, [127.5] * channels
    elif normalize == "manifest":
        mean, std = manifest.channel_mean, manifest.channel_std
    else:
        mean, std = normalize["mean"], normalize["std"]
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(f"data.normalize: needs {channels} values of mean and std, one per channel")
    return Normalizer(list(mean), list(std))
