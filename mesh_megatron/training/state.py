"""The progress of training that a checkpoint must restore, in addition to weights and optimizer state."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """The progress of training; learning rate and next sample are computed from these counts."""

    iteration: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Training sequences read."""
    consumed_tokens: int = 0
    """Training tokens read."""
    turns: list[list[int]] = field(default_factory=list)
    """[iteration, consumed samples, consumed tokens] at every change of the batch size or the sequence length."""
    skipped_steps: int = 0
    """Steps without an update because of an overflow of the loss scale, NaN or infinity, or a spike."""
    nan_steps: int = 0
    """Skipped steps whose loss or gradient was not finite."""
    spike_steps: int = 0
    """Steps whose loss was a spike, updated or not."""
    passed_over_steps: int = 0
    """Steps that ``--iterations-to-skip`` named."""
    bad_steps_in_a_row: int = 0
    """Consecutive bad steps since the last successful update; see ``StepResult.bad``."""
    evaluation_due: bool = False
    """True if the evaluation of this iteration was interrupted; a restart begins with it."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last updates, oldest first, with which a spike is compared."""
    recent_by_loops: dict[int, list[float]] = field(default_factory=dict)
    """The same by number of loops, where it is drawn: fewer loops have a higher loss."""

    def count_step(self, batch_size: int, seq_length: int) -> None:
        """Count one step of ``batch_size`` sequences of ``seq_length`` tokens."""
        began, samples, tokens = self.turns[-1] if self.turns else (0, 0, 0)
        steps = self.iteration - began
        alike = steps * batch_size, steps * batch_size * seq_length
        if (self.consumed_samples - samples, self.consumed_tokens - tokens) != alike:
            self.turns.append([self.iteration, self.consumed_samples, self.consumed_tokens])
        self.iteration += 1
        self.consumed_samples += batch_size
        self.consumed_tokens += batch_size * seq_length

    def recent(self, loops: int | None) -> list[float]:
        """Return the losses that one of a step of ``loops`` loops is compared with; None if their number is fixed."""
        return self.recent_losses if loops is None else self.recent_by_loops.setdefault(loops, [])

    def remember(self, loss: float, loops: int | None, window: int) -> None:
        """Add the loss of an update to the last ``window`` losses of such steps."""
        recent = self.recent(loops)
        recent.append(loss)
        del recent[:-window]

    def to_dict(self) -> dict[str, Any]:
        """Return a copy for a checkpoint."""
        return asdict(self)
