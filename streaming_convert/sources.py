"""Where samples come from: each function lists one kind of input and says how to load one of its samples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Source:
    """A listed input: `load(keys[i])` returns a `shape` array with label `labels[i]`.

    column: "image" (uint8, C,H,W) or "latents" (float16, 2c,h,w) as `load` returns it.
    crop: how an image was brought to `shape`, in words; "none" where it already had it.
    encoder: who made the latents, for a source that holds them.
    """

    name: str
    keys: list[str]
    labels: np.ndarray
    class_names: list[str]
    shape: tuple[int, int, int]
    load: Callable[[str], np.ndarray]
    column: str = "image"
    crop: str = "none"
    encoder: dict | None = None


def digits() -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8, their values 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    return Source(
        name="digits",
        keys=[str(i) for i in range(len(pixels))],
        labels=data.target.astype(np.int64),
        class_names=[str(name) for name in data.target_names],
        shape=pixels.shape[1:],
        load=lambda key: pixels[int(key)],
    )
