"""From pixels to what is stored: uint8 pixels as they are, or the latents of a variational autoencoder."""

from typing import Protocol

import numpy as np

from streaming_convert.sources import Source


class Encoder(Protocol):
    """Maps a batch of loaded samples to what is stored. `info` goes into the manifest.

    in_process: True for an encoder that wants one process (a GPU, threads of its own) fed by loader threads;
    False where every worker process can encode its own parts.
    """

    column: str
    shape: tuple[int, ...]
    info: dict
    batch_size: int
    in_process: bool

    def __call__(self, samples: np.ndarray) -> np.ndarray: ...


class Stored:
    """The encoder `none`: stores what the source gives (pixels, or latents that were made elsewhere)."""

    batch_size = 64
    in_process = False

    def __init__(self, source: Source) -> None:
        self.column, self.shape = source.column, source.shape
        self.info = source.encoder or {"name": "none", "hash": None, "scaling": 1.0}

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        return samples
