"""Benchmarks of attention, a training step and the loader; `benchmarks.gpu` runs all that need a GPU."""

import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any, NamedTuple

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


class Figure(NamedTuple):
    """A result and its bar, the most that it may be; None if there is no bar."""

    name: str
    value: float
    bar: float | None

    @property
    def missed(self) -> bool:
        """True if the value is above its bar."""
        return self.bar is not None and self.value > self.bar

    def __str__(self) -> str:
        bar = "" if self.bar is None else f"  at most {self.bar:g}  {'MISSED' if self.missed else 'ok'}"
        return f"{self.name:70} {self.value:6.3f}{bar}"


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
