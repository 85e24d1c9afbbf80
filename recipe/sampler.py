"""Sampling: x <- x - (t - s) u(x, t, s) on a uniform time grid from 1 (noise) to 0 (data)."""

import torch
from torch import Tensor

from recipe.draws import Stream, keys, normal
from recipe.objectives.base import Condition, Network, Objective

MAX_STEPS = 10_000


def check_steps(nfe: int, name: str = "nfe") -> None:
    """Raise ValueError unless a number of sampling steps can be; name: of the option, for the message."""
    if not isinstance(nfe, int) or not 1 <= nfe <= MAX_STEPS:
        raise ValueError(f"{name}: {nfe!r} must be a whole number from 1 to {MAX_STEPS}")


def initial_noise(seeds: Tensor, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal noise (B, C, H, W), in which image i depends on seeds[i] (int64) alone."""
    return normal(keys(0, torch.zeros_like(seeds), seeds, Stream.NOISE), *shape).to(dtype)


def generate(net: Network, noise: Tensor, asked: Condition, nfe: int, objective: Objective) -> Tensor:
    """Return normalised images (B, C, H, W) made from standard normal noise in nfe steps, summed in float64.

    The objective may change the guidance weight of samples without label (`Objective.guide`). Raises
    ValueError for an impossible number of steps.
    """
    check_steps(nfe)
    x = objective.noise_scale * noise.double()
    for i in range(nfe):
        t, s = 1 - i / nfe, 1 - (i + 1) / nfe
        x = x + (s - t) * objective.average_velocity(net, x.to(noise.dtype), t, s, asked)
    return x


sample = torch.no_grad()(generate)
