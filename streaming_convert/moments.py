"""Per-channel mean and standard deviation of what training sees before it normalises."""

import numpy as np


class Moments:
    """Sums over pixels, or over mean + std * noise for latents; those of several parts can be added up.

    Everything is float64. Sums over pixels are exact integers up to 2^53, which is more than ImageNet at 256.
    """

    def __init__(self, column: str) -> None:
        self.latents = column == "latents"
        self.sums: dict = {"n": 0, "x": 0.0, "xx": 0.0, "var": 0.0}

    def add(self, samples: np.ndarray) -> None:
        """Adds stored samples (N, C, H, W); the first half of latents' C are means, the second deviations."""
        values = np.empty(samples.shape[1:])  # once: new memory costs more than the sums
        for sample in samples:
            values[:] = sample
            means, stds = np.split(values, 2) if self.latents else (values, values[:, :0])
            self.merge(
                {
                    "n": means[0].size,
                    "x": means.sum((1, 2)).tolist(),
                    # row by row: for long ones BLAS would wake its threads, which takes 0.4 ms
                    "xx": np.vecdot(means, means).sum(1).tolist(),
                    "var": np.vecdot(stds, stds).sum(1).tolist(),
                }
            )

    def merge(self, sums: dict) -> None:
        """Adds the sums of other samples."""
        self.sums = {key: (np.array(value) + sums[key]).tolist() for key, value in self.sums.items()}

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Per-channel mean, and sqrt(var(mean) + E[std^2])."""
        n, x, xx, var = (np.array(self.sums[key], np.float64) for key in ("n", "x", "xx", "var"))
        mean = x / n
        return mean.tolist(), np.sqrt(np.maximum(xx / n - mean**2, 0) + var / n).tolist()
