"""The definition of a loss spike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mesh_megatron.config.training import TrainingConfig


def is_spike(loss: float, recent: Sequence[float], training: TrainingConfig) -> bool:
    """Return whether a finite ``loss`` exceeds ``--loss-spike-factor`` times the median of the ``recent`` losses.

    The last ``--loss-spike-window`` losses count; with fewer no loss is a spike.
    """
    factor, window = training.loss_spike_factor, training.loss_spike_window
    if factor is None or not math.isfinite(loss) or len(recent) < window:
        return False
    return loss > factor * statistics.median(recent[-window:])
