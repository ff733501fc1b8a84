"""Mean and standard deviation of a stream of arrays, in the memory of three of them."""

from __future__ import annotations

from typing import Any

import numpy as np


class RunningStats:
    """Welford's algorithm; the standard deviation is that of the samples seen (divided by n)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: np.ndarray = np.zeros(())
        self._squares: np.ndarray = np.zeros(())

    def add(self, sample: Any) -> None:
        """One more sample, of the shape of those before."""
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
        """``mean`` and ``std`` as nested lists."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}
