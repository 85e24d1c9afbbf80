"""What attention, a step and the loader cost; `benchmarks.gpu` is all that a GPU can tell."""

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
