"""What attention, a step and the loader cost; `benchmarks.gpu` is all that a GPU can tell."""

import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from recipe.weights import commit


def environment() -> dict[str, Any]:
    """What a measurement depends on beside the code that makes it. Does not import Triton."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
    }


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def paired(first: Callable[[], float], second: Callable[[], float], pairs: int) -> tuple[float, float, float]:
    """Medians of what both measure and of first / second, after one warm-up each.

    Both run back to back and the ratio is taken pair by pair: a machine whose speed drifts does not matter.
    """
    first(), second()
    measured = [(first(), second()) for _ in range(pairs)]
    return tuple(map(statistics.median, zip(*((a, b, a / b) for a, b in measured), strict=True)))
