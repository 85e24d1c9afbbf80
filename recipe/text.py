"""Prompts: what a network with `model.text` sees of them, and guidance by the empty prompt.

A prompt is up to L tokens, of which the first `length` (1 at least) count: UTF-8 bytes after a mark of where
it begins, or embeddings that `streaming_convert --text-encoder` has stored. It has no tangent. Objectives
know nothing of it: the label that means none stands for the empty prompt too.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from recipe.draws import Stream, keys, normal
from recipe.dual import Dual
from recipe.settings import ConfigError, Settings

BEGIN = 256  # the token before the bytes; alone it is the empty prompt
SUMMARY, BUCKETS = 256, 1024  # numbers of a summary, and hashes of the bytes in it


@dataclass
class TextConfig(Settings):
    """What prompts are made of, for a network that takes them."""

    encoder: Literal["bytes", "dataset"] = Field(
        "bytes",
        description="Where embeddings come from: UTF-8 bytes, an embedding and two transformer layers that "
        "are trained with the network (bytes), or those stored in the dataset (dataset).",
    )
    tokens: int = Field(64, ge=1, le=4096, description="Longest prompt in tokens; what is longer is cut.")
    width: int = Field(128, ge=1, le=65536, description="Width of a token's embedding.")

    @model_validator(mode="after")
    def combinations(self) -> TextConfig:
        """Raise ConfigError for a width that the encoder of bytes cannot divide into heads."""
        if self.encoder == "bytes" and self.width % 32:
            raise ConfigError(f"width: {self.width} must be a multiple of 32")
        return self


class Text(NamedTuple):
    """Prompts of a batch: tokens, int64 (B, L) bytes or float (B, L, width) embeddings, and length, int64
    (B,).
    """

    tokens: Tensor
    length: Tensor

    def to(self, device: torch.device) -> Text:
        """Return tokens and lengths on a device."""
        return Text(self.tokens.to(device), self.length.to(device))


def byte_tokens(prompts: list[str], tokens: int) -> tuple[Text, int]:
    """Return the UTF-8 of prompts, and how many of them were cut."""
    coded = [prompt.encode() for prompt in prompts]
    table = np.full((len(prompts), tokens), BEGIN)
    for row, code in zip(table, coded, strict=True):
        kept = np.frombuffer(code[: tokens - 1], np.uint8)
        row[1 : 1 + len(kept)] = kept
    length = torch.tensor([min(1 + len(code), tokens) for code in coded])
    return Text(torch.from_numpy(table), length), sum(len(code) >= tokens for code in coded)


def summary(text: Text) -> Tensor:
    """Return what prompts say, in float64 (B, 256), without any network: the sum over each three bytes in a
    row, or the mean over embeddings, by a random projection that is always the same.
    """
    tokens, length = text.tokens, text.length[:, None]
    embedded = tokens.is_floating_point()
    row = torch.arange(tokens.shape[2] if embedded else BUCKETS, device=tokens.device)
    table = normal(keys(0, torch.zeros_like(row), row, Stream.NOISE), SUMMARY)
    inside = (torch.arange(tokens.shape[1], device=tokens.device) < length - int(not embedded)).double()
    if embedded:
        return (tokens.double() * inside[..., None]).sum(1) / length @ table
    padded = F.pad(tokens, (0, 2), value=BEGIN)  # the last three end with a mark
    three = (padded[:, :-2] * 257 + padded[:, 1:-1]) * 257 + padded[:, 2:]
    bucket = keys(0, torch.zeros_like(three), three, Stream.NOISE) % BUCKETS
    return F.embedding_bag(bucket, table, mode="sum", per_sample_weights=inside)


def empty_prompt(config: TextConfig, stored: dict[str, Any] | None) -> Text:
    """Return the empty prompt, as one row; stored: what the manifest says of a dataset's text encoder."""
    if config.encoder == "bytes":
        return byte_tokens([""], config.tokens)[0]
    values = np.frombuffer(base64.b64decode(stored["empty"]), "<f2").reshape(-1, config.width)
    tokens = torch.zeros(1, config.tokens, config.width)
    tokens[0, : len(values)] = torch.from_numpy(values.astype(np.float32))
    return Text(tokens, torch.tensor([len(values)]))


class Prompts(nn.Module):
    """The prompts of a batch for a network, and the empty one in their place where the label means none.

    stored: what the manifest says of the encoder of a dataset's embeddings; null: the label that means none.
    """

    def __init__(self, config: TextConfig, stored: dict[str, Any] | None, null: int) -> None:
        super().__init__()
        self.null = null
        tokens, length = empty_prompt(config, stored)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("length", length, persistent=False)

    def empty(self, count: int) -> Text:
        """Return a batch of `count` empty prompts."""
        ones = [1] * (self.tokens.dim() - 1)
        return Text(self.tokens.repeat(count, *ones), self.length.repeat(count))

    def unlabelled(self, label: Tensor, text: Text) -> Tensor:
        """Return the labels (B,) of prompts for a network without classes: `null` where a prompt is empty.

        Sampling asks so, as training has seen the empty prompt where it dropped a prompt (label `null`).
        """
        same = (text.tokens == self.tokens).flatten(1).all(1)
        return torch.where(same & (text.length == self.length), self.null, label)

    def forward(self, net: Callable[..., Dual], text: Text) -> Callable[..., Dual]:
        """Return `net` as objectives call it, (x, t, d, label, ...), also for n batches at once."""

        def evaluate(x: Dual, t: Dual, d: Dual, label: Tensor, *rest: Any, **options: Any) -> Dual:
            # len() would fix the batch in an exported program
            n, free = label.shape[0] // text.length.shape[0], label == self.null
            length = torch.where(free, self.length, text.length.repeat(n))
            ones = [1] * (text.tokens.dim() - 1)
            tokens = torch.where(free.view(-1, *ones), self.tokens, text.tokens.repeat(n, *ones))
            return net(x, t, d, label, *rest, text=Text(tokens, length), **options)

        return evaluate
