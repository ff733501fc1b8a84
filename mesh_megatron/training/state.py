"""What must survive a restart, besides weights and optimizer state."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Where training stands. Learning rate and next sample follow from what has been counted here."""

    iteration: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Training sequences read."""
    consumed_tokens: int = 0
    """Training tokens read."""
    turns: list[list[int]] = field(default_factory=list)
    """[iteration, consumed samples, consumed tokens] wherever the batch or its sequences' length changed."""
    skipped_steps: int = 0
    """Steps without an update: overflow of the loss scale, NaN or infinity, a spike."""
    nan_steps: int = 0
    """Of those, steps whose loss or gradient was not finite."""
    spike_steps: int = 0
    """Steps whose loss was a spike, updated or not."""
    passed_over_steps: int = 0
    """Steps that ``--iterations-to-skip`` named."""
    bad_steps_in_a_row: int = 0
    """Steps since the last update that was denied none; see ``StepResult.bad``."""
    evaluation_due: bool = False
    """The evaluation that belongs to this iteration was not finished: it comes first after a restart."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last updates, oldest first: what a spike is measured by."""

    def count_step(self, batch_size: int, seq_length: int) -> None:
        """A step of ``batch_size`` sequences of ``seq_length`` tokens."""
        began, samples, tokens = self.turns[-1] if self.turns else (0, 0, 0)
        steps = self.iteration - began
        alike = steps * batch_size, steps * batch_size * seq_length
        if (self.consumed_samples - samples, self.consumed_tokens - tokens) != alike:
            self.turns.append([self.iteration, self.consumed_samples, self.consumed_tokens])
        self.iteration += 1
        self.consumed_samples += batch_size
        self.consumed_tokens += batch_size * seq_length

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
