"""Training and sampling of one-step image generators; `load` is the way to images in Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipe.generator import Generator


def load(
    weights: str | Path,
    device: str | None = None,
    dtype: str = "fp32",
    vae: str | None = None,
    text_encoder: str | None = None,
) -> Generator:
    """Return a model whose `sample` draws images; see `recipe.generator.Generator` for both.

    weights: NAME, NAME.json or NAME.safetensors, or a folder of a run's exports, whose newest are taken.
    device: None is a GPU if there is one.
    """
    import torch  # here, so that `python -m recipe.X` does not find X imported already

    from recipe.generator import Generator

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Generator(weights, device, dtype, vae=vae, text_encoder=text_encoder)
