"""What a loss spike is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mesh_megatron.config.training import TrainingConfig


def is_spike(loss: float, recent: Sequence[float], training: TrainingConfig) -> bool:
    """Whether a finite loss is above ``--loss-spike-factor`` times the median of a full window of recent ones."""
    factor, window = training.loss_spike_factor, training.loss_spike_window
    if factor is None or not math.isfinite(loss) or len(recent) < window:
        return False
    return loss > factor * statistics.median(recent[-window:])
