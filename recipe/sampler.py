"""Sampling: x <- x + f(x, t, s) on a uniform time grid from 1 (noise) to 0 (data)."""

from __future__ import annotations

import torch
from torch import Tensor

from recipe.draws import Stream, keys, normal
from recipe.tvm import Network


def initial_noise(seeds: Tensor, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise (B, C, H, W); row i depends on seeds[i] (int64) alone, not on its neighbours."""
    return normal(keys(0, torch.zeros_like(seeds), seeds, Stream.NOISE), *shape).to(dtype)


@torch.no_grad()
def sample(
    net: Network, noise: Tensor, label: Tensor, nfe: int, w: float, method: dict, null: int | None = None
) -> Tensor:
    """Normalised images (B, C, H, W) from noise of that shape, accumulated in float64.

    label: (B,) int64, `null` meaning no label; w: guidance weight, one that training saw; method: `objective`
    and `scaled` as stored with the weights. TVM takes nfe displacement steps x += (s - t) k F(x, t, t - s).
    Flow matching takes nfe Euler steps of the velocity F(x, t, 0); for w != 1 it needs `null`, and
    classifier-free guidance evaluates the network twice a step.
    """
    x, ones = noise.double(), noise.new_ones(noise.shape[0])  # len() would fix the batch under torch.export
    for i in range(nfe):
        t, s = 1 - i / nfe, 1 - (i + 1) / nfe
        z = x.to(noise.dtype)
        if method["objective"] == "tvm":
            velocity = net(z, t * ones, (t - s) * ones, label, ones / w).value.double()
            velocity = velocity * w if method["scaled"] else velocity
        else:
            velocity = net(z, t * ones, 0 * ones, label, ones).value.double()
            if w != 1:
                free = net(z, t * ones, 0 * ones, torch.full_like(label, null), ones).value.double()
                velocity = free + w * (velocity - free)
        x = x + (s - t) * velocity
    return x
