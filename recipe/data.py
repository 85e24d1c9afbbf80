"""Training data: MDS shards => dict batches of {image | latents, label, sample} => normalised network input.

Columns are those that `streaming_convert` writes: `image` uint8 (C, H, W), or `latents` float16 (2C, H, W)
holding a VAE posterior's mean and standard deviation; `label` int64; and, of captioned pictures, `caption`
(str) and perhaps its embedding `text` float16 (L, width), of which the first `text_length` count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from streaming import StreamingDataLoader
from streaming.base.util import bytes_to_int
from torch import Tensor, nn

from recipe.dataset import TrainingDataset
from recipe.draws import Stream, keys, normal
from recipe.rules import Number, Rule, check, each, local, place, positive, rule, whole
from recipe.text import TextConfig, byte_tokens
from storage.manifest import Manifest, read_manifest

SHUFFLE_WINDOW = 1 << 18  # samples of each canonical node among which the order is drawn; Streaming's default


def is_normalization(value: str | dict[str, list[float]]) -> bool:
    """Of the three kinds that `DataConfig` names, the third in finite numbers, deviations positive."""
    if isinstance(value, str):
        return value in ("pixels", "manifest")
    return (
        sorted(value) == ["mean", "std"]
        and all(map(math.isfinite, value["mean"]))
        and each(positive).holds(value["std"])
    )


@dataclass
class DataConfig:
    """Where the samples are and how they become network input.

    remote: folder or s3://, gs://, oci:// of the dataset, None when `local` holds it already; local: cache
    folder; batch_size: global, over all ranks; normalize: `pixels` (x / 127.5 - 1), `manifest` (the dataset's
    own per-channel mean and deviation), or {mean: [...], std: [...]}; canonical_nodes fixes the sample order
    for any number of nodes; cache_limit: e.g. 100gb.
    """

    local: str = rule("data/digits/train", local)
    remote: str | None = rule(None, place)
    batch_size: int = rule(256, positive)
    workers: int = rule(1, whole(0, 1024))
    normalize: str | dict[str, list[Number]] = rule(
        "pixels", Rule(is_normalization, "is not pixels, manifest or {mean: [...], std: [...]}")
    )
    shuffle: bool = True
    canonical_nodes: int = rule(64, whole(1, 65536))
    cache_limit: str | None = rule(None, Rule(lambda x: bytes_to_int(x) > 0, "is not a size such as 100gb"))

    def __post_init__(self) -> None:
        check(self, "data")
        if self.cache_limit and not self.remote:
            raise ValueError(
                f"data.cache_limit: {self.cache_limit} limits the copy of data.remote, which is not set"
            )

    @property
    def cache_bytes(self) -> int | None:
        """cache_limit in bytes."""
        return bytes_to_int(self.cache_limit) if self.cache_limit else None

    def per_rank(self, ranks: int) -> int:
        """Samples of a global batch on each rank. Raises ValueError."""
        if self.batch_size % ranks:
            raise ValueError(f"data.batch_size: {self.batch_size} is not a multiple of the {ranks} ranks")
        return self.batch_size // ranks

    @property
    def source(self) -> str:
        """Where the manifest is."""
        return self.remote or self.local


def collate(samples: list[dict[str, Any]], text: TextConfig | None = None) -> dict[str, Tensor]:
    """Dicts of arrays and integers to a dict of tensors, captions to what `text` asks for (None: nothing).

    np.stack copies Streaming's read-only arrays.
    """
    left_out = {"caption"} if text and text.encoder == "dataset" else {"caption", "text", "text_length"}
    names = samples[0].keys() - left_out
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in names}
    if text and text.encoder == "bytes":
        prompts, _ = byte_tokens([s["caption"] for s in samples], text.tokens)
        batch |= {"text": prompts.tokens, "text_length": prompts.length}
    return batch


def train_loader(config: DataConfig, seed: int, text: TextConfig | None = None) -> StreamingDataLoader:
    """This rank's share of the global batch, in an order that depends on the seed and the epoch alone."""
    per_rank = config.per_rank(dist.get_world_size())
    dataset = TrainingDataset(
        remote=config.remote,
        local=config.local,
        batch_size=per_rank,
        shuffle=config.shuffle,
        shuffle_seed=seed,
        num_canonical_nodes=config.canonical_nodes,
        shuffle_block_size=SHUFFLE_WINDOW,
        predownload=max(8192, 8 * per_rank),  # the default, 8 batches, makes one worker wait on 7 ms ticks
        cache_limit=config.cache_limit,
    )
    return StreamingDataLoader(
        dataset,
        batch_size=per_rank,
        collate_fn=partial(collate, text=text),
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


class Normalizer(nn.Module):
    """Stored sample => network input x0 = (value - mean) / std per channel, and back to uint8 pixels."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, batch: dict[str, Tensor], step: Tensor, seed: int) -> Tensor:
        """(B, C, H, W). Latents are drawn from the posterior, keyed by (seed, step, sample id)."""
        if "image" in batch:
            value = batch["image"].to(self.mean.dtype)
        else:
            mean, std = batch["latents"].to(self.mean.dtype).chunk(2, 1)
            noise = normal(keys(seed, step, batch["sample"], Stream.POSTERIOR), *mean.shape[1:])
            value = mean + std * noise.to(mean.dtype)
        return (value - self.mean) / self.std

    def invert(self, x0: Tensor) -> Tensor:
        """Network output (B, C, H, W) => stored values."""
        return x0 * self.std + self.mean


def to_uint8(values: Tensor) -> Tensor:
    """Pixel values in 0..255 units => uint8, rounded to nearest."""
    return values.round().clamp(0, 255).to(torch.uint8)


def normalizer(config: DataConfig, manifest: Manifest) -> Normalizer:
    """The normaliser that `data.normalize` asks for."""
    channels = manifest.shape[0] if manifest.column == "image" else manifest.shape[0] // 2
    if config.normalize == "pixels":
        mean, std = [127.5] * channels, [127.5] * channels
    elif config.normalize == "manifest":
        mean, std = manifest.channel_mean, manifest.channel_std
    else:
        mean, std = config.normalize["mean"], config.normalize["std"]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"data.normalize: needs {channels} values of mean and std, one per channel")
    return Normalizer(list(mean), list(std))


__all__ = ["DataConfig", "Normalizer", "normalizer", "read_manifest", "to_uint8", "train_loader"]
