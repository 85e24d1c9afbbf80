"""Sampling: x <- x - (t - s) u(x, t, s) on a uniform time grid from 1 (noise) to 0 (data)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from recipe.draws import Stream, keys, normal
from recipe.objectives.base import Network, Objective

MAX_STEPS = 10_000


def check_steps(nfe: int, name: str = "nfe") -> None:
    """Raise ValueError unless a number of sampling steps can be; name: of the option, for the message."""
    if not isinstance(nfe, int) or not 1 <= nfe <= MAX_STEPS:
        raise ValueError(f"{name}: {nfe!r} must be a whole number from 1 to {MAX_STEPS}")


def initial_noise(seeds: Tensor, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise (B, C, H, W); row i depends on seeds[i] (int64) alone, not on its neighbours."""
    return normal(keys(0, torch.zeros_like(seeds), seeds, Stream.NOISE), *shape).to(dtype)


def generate(
    net: Network,
    noise: Tensor,
    label: Tensor,
    nfe: int,
    w: float | Tensor,
    objective: Objective,
    null: int,
) -> Tensor:
    """Normalised images (B, C, H, W) from noise of that shape in nfe steps, accumulated in float64.

    label: (B,) int64, `null` meaning no label; w: guidance weight of all or of each (B,), which the objective
    may change for samples without label (`Objective.guide`).
    Raises ValueError for an impossible number of steps.
    """
    check_steps(nfe)
    x = noise.double()
    for i in range(nfe):
        t, s = 1 - i / nfe, 1 - (i + 1) / nfe
        x = x + (s - t) * objective.average_velocity(net, x.to(noise.dtype), t, s, label, w, null)
    return x


sample = torch.no_grad()(generate)


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """uint8 images (N, C, H, W), C 1 or 3 => one white-framed picture (rows, columns, 3), row by row."""
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, columns, gap, pad_value=255).permute(1, 2, 0).numpy()
