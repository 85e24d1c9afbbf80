"""Post-hoc EMA (EDM2, Karras et al. 2024, section 3 and appendix C): average lengths chosen after training.

A power-function average at step t weights the past by its profile p_(gamma,t)(tau) = (gamma + 1) tau^gamma /
t^(gamma + 1), 0 <= tau <= t, whose width relative to t, the length of the average, does not depend on t. Two
such averages are kept during training; from their snapshots any other is synthesised by least squares.
"""

from __future__ import annotations

import numpy as np

MAX_LENGTH = 12**-0.5  # gamma = 0, the plain mean of the run
Profile = tuple[float, int]  # (gamma, step t)


def exponent(length: float) -> float:
    """gamma of the profile whose standard deviation is `length` * t, by solving

        length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises ValueError unless 0 < length <= 12^-1/2 (gamma >= 0).
    """
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"posthoc length {length} must lie in (0, {MAX_LENGTH:.3f}]")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(gamma: float, step: int) -> float:
    """Decay of the update after step number `step`, from 1: (1 - 1/step)^(gamma + 1)."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles over 0 <= tau <= min(t_a, t_b)."""
    (early_gamma, early), (late_gamma, late) = sorted((a, b), key=lambda profile: profile[1])
    scale = (early_gamma + 1) * (late_gamma + 1) / ((early_gamma + late_gamma + 1) * late)
    return scale * (early / late) ** late_gamma


def combination(snapshots: list[Profile], target: Profile) -> np.ndarray:
    """Factors of the snapshots whose sum has the profile closest to the target's, in the mean square."""
    gram = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    return np.linalg.solve(gram, [inner_product(a, target) for a in snapshots])


def child_name(length: float) -> str:
    """Name of the module that keeps the average of this length: 0.05 => posthoc_050."""
    return f"posthoc_{round(length * 1000):03d}"


def average_of_child(name: str) -> str:
    """Name of the average in a JSON and in a sweep: posthoc_050 => posthoc:0.05, ema => ema."""
    kind, _, thousandths = name.partition("_")
    return f"{kind}:{int(thousandths) / 1000:g}" if thousandths else kind


def length_of(average: str) -> float:
    """posthoc:0.05 => 0.05. Raises ValueError for anything else, and for an impossible length."""
    kind, _, number = average.partition(":")
    if kind != "posthoc":
        raise ValueError(f"average {average!r} is not posthoc:LENGTH")
    length = float(number)
    exponent(length)
    return length
