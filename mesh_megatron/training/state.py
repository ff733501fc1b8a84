"""What must survive a restart, besides weights and optimizer state."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class TrainState:
    """Where training stands. Data order and learning rate follow from ``consumed_samples``."""

    iteration: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Training sequences read."""
    consumed_tokens: int = 0
    """Training tokens read."""
    skipped_steps: int = 0
    """Steps without an update: overflow of the loss scale, NaN or infinity."""
    nan_steps: int = 0
    """Of those, steps whose loss or gradient was not finite."""

    def to_dict(self) -> dict[str, int]:
        return asdict(self)
