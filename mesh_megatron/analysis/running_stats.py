"""Mean and standard deviation of a stream of arrays, in the memory of three arrays."""

from __future__ import annotations

from typing import Any

import numpy as np


class RunningStats:
    """Welford's algorithm; ``std`` is the population standard deviation of the samples (divided by n)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: np.ndarray = np.zeros(())
        self._squares: np.ndarray = np.zeros(())

    def add(self, sample: Any) -> None:
        """Add a sample; all samples have the same shape."""
        value = np.asarray(sample, dtype=np.float64)
        assert self.count == 0 or value.shape == self.mean.shape, (value.shape, self.mean.shape)
        self.count += 1
        difference = value - self.mean
        self.mean = self.mean + difference / self.count
        self._squares = self._squares + difference * (value - self.mean)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self._squares / max(self.count, 1))

    def to_dict(self) -> dict[str, Any]:
        """Return ``mean`` and ``std`` as nested lists."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}
