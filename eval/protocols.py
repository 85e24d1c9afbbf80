"""Protocols: what must be said beside a distance before it can be compared with another paper's.

Every sample has a seed of its own, from which alone its noise comes (recipe/sampler.py), and its drawn label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recipe.data import to_uint8
from recipe.draws import Stream, keys, uniform


@dataclass(frozen=True)
class Protocol:
    """samples: how many, 0 for as many as there are real images; labels: a key of `LABELS`; rounding: of
    pixels to uint8, `nearest` or `down`; reference: what the distance is measured to, for the reader.
    """

    samples: int
    labels: str
    rounding: str
    reference: str


PROTOCOLS = {
    "matched": Protocol(0, "matched", "nearest", "all real images"),
    "tvm": Protocol(50_000, "drawn", "down", "the full training set"),
    "balanced": Protocol(50_000, "balanced", "nearest", "the full training set"),
    "adm": Protocol(50_000, "uniform", "down", "ADM's published statistics"),
}


def describe(name: str, samples: int) -> str:
    """One line for people, printed with every number."""
    protocol = PROTOCOLS[name]
    labels = {
        "matched": "labels in the proportions of the training data",
        "drawn": "labels drawn from the training distribution",
        "balanced": "equally many samples of every class",
        "uniform": "labels drawn uniformly",
    }[protocol.labels]
    usual = f" (the protocol's number is {protocol.samples:,})" if samples != protocol.samples > 0 else ""
    return (
        f"Protocol `{name}`: {samples:,} samples{usual}, {labels}, pixels rounded {protocol.rounding}, "
        f"against {protocol.reference}."
    )


def spread_labels(class_counts: list[int], seeds: Tensor) -> Tensor:
    """Labels in the proportions of class_counts, in order; exactly the counts where n is their sum."""
    positions = torch.arange(len(seeds), dtype=torch.float64) + 0.5
    return _at_quantiles(class_counts, positions / len(seeds))


def draw_labels(class_counts: list[int], seeds: Tensor) -> Tensor:
    """Independent labels with probabilities proportional to class_counts, each from its sample's seed."""
    key = keys(0, torch.zeros_like(seeds), seeds, Stream.LABEL_DROP)
    return _at_quantiles(class_counts, uniform(key, 1)[:, 0])


def _at_quantiles(class_counts: list[int], quantiles: Tensor) -> Tensor:
    shares = torch.tensor(class_counts, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(shares, quantiles * shares[-1], right=True)


def balance_labels(class_counts: list[int], seeds: Tensor) -> Tensor:
    """0, 1, ..., K-1, 0, 1, ...: equally many of each. Raises ValueError where K does not divide n."""
    if len(seeds) % len(class_counts):
        raise ValueError(
            f"samples: {len(seeds)} is not a multiple of the {len(class_counts)} classes, as `balanced` needs"
        )
    return torch.arange(len(seeds)) % len(class_counts)


LABELS: dict[str, Callable[[list[int], Tensor], Tensor]] = {
    "matched": spread_labels,
    "drawn": draw_labels,
    "balanced": balance_labels,
    "uniform": lambda class_counts, seeds: draw_labels([1] * len(class_counts), seeds),
}


def choose_labels(name: str, classes: int, class_counts: list[int], seeds: Tensor) -> Tensor:
    """int64 labels (n,) of the protocol for samples with these seeds; 0 for a network without classes.

    class_counts: training samples of each class. Raises ValueError where the protocol needs them and they are
    not known (an empty list).
    """
    kind = PROTOCOLS[name].labels
    if classes == 0:
        return torch.zeros_like(seeds)
    if kind in ("matched", "drawn") and len(class_counts) != classes:
        raise ValueError(
            f"protocol {name} needs the number of training samples of each of the {classes} classes, "
            f"{len(class_counts)} are known"
        )
    return LABELS[kind](class_counts or [1] * classes, seeds)


def quantize(values: Tensor, rounding: str) -> Tensor:
    """Pixel values in 0..255 units => uint8, to the `nearest` integer or `down`."""
    return to_uint8(values if rounding == "nearest" else values.floor())
