"""Benchmarks of attention, a training step and the loader; `benchmarks.gpu` runs all that need a GPU."""

import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from recipe.weights import commit


def environment() -> dict[str, Any]:
    """Return what a measurement depends on: device, date, versions and commit. Triton is not imported."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
    }


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def paired(first: Callable[[], float], second: Callable[[], float], pairs: int) -> tuple[float, float, float]:
    """Return the medians of what both measure and of first / second, after one warm-up of each.

    Both run back to back and the ratio is taken pair by pair, so a drift of the machine's speed cancels.
    """
    first(), second()
    measured = [(first(), second()) for _ in range(pairs)]
    return tuple(map(statistics.median, zip(*((a, b, a / b) for a, b in measured), strict=True)))
