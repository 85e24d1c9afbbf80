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
    """Medians of what both measure and of the ratio first / second pair by pair, after one warm-up each."""
    first(), second()
    a, b = zip(*((first(), second()) for _ in range(pairs)), strict=True)
    return (
        statistics.median(a),
        statistics.median(b),
        statistics.median(x / y for x, y in zip(a, b, strict=True)),
    )
