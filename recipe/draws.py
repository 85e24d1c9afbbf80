"""Random draws keyed by (seed, step, sample id): a counter-based generator in a few tensor operations.

The same sample at the same step gets the same noise, times, label drop and guidance weight, whatever the
rank, the microbatch, the device or a resume; no generator state exists that could be lost. The mixing
function is the 64-bit finaliser of SplitMix64 (Steele et al. 2014), in wrapping int64 arithmetic.
"""

from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """One independent sequence for each purpose."""

    TIMES = 0
    NOISE = 1
    POSTERIOR = 2
    LABEL_DROP = 3
    GUIDANCE = 4
    INTERVAL = 5


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift_right(z: Tensor, n: int) -> Tensor:
    """Shift int64 to the right, filling in zeros."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shift_right(z, 31)


def keys(seed: int, step: Tensor, sample: Tensor, stream: Stream) -> Tensor:
    """Return one 64-bit key per sample; step and sample are int64 of shape (B,)."""
    key = torch.full_like(sample, seed)
    for part in (torch.full_like(sample, int(stream)), step, sample):
        key = _mix(key * _GAMMA + part + _GAMMA)
    return key


def uniform(key: Tensor, *shape: int) -> Tensor:
    """Return uniform numbers in the open interval (0, 1), float64 of shape (B, *shape)."""
    count = torch.Size(shape).numel()
    counter = torch.arange(1, count + 1, device=key.device) * _GAMMA
    bits = _shift_right(_mix(key[:, None] + counter), 11)
    return ((bits.double() + 0.5) * 2.0**-53).reshape(-1, *shape)


def normal(key: Tensor, *shape: int) -> Tensor:
    """Return standard normal numbers, float64 of shape (B, *shape), by inverting their distribution."""
    return torch.special.ndtri(uniform(key, *shape))
