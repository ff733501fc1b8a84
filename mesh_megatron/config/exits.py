"""Settings of losses after every loop: weighted by numbers, or by a learned exit gate (Ouro, arXiv 2510.25741)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mesh_megatron.config.bounds import Bounds, flag

EXIT_GATE = "recurrence.exit_gate."
"""Beginning of the names of the gate's parameters in a checkpoint."""
_OF_GATE = ("exit_entropy_coeff", "exit_gate_only", "exit_improvement_slope", "exit_improvement_threshold")


@dataclass(frozen=True, kw_only=True)
class ExitsConfig:
    """The exit gate and the losses after every loop; ``ModelConfig`` inherits them."""

    exit_gate: bool = False
    """Learn an exit gate: a linear layer that computes, from the state after each loop, the probability that a token
    leaves the core. Training minimises the loss that is expected under these exits."""
    exit_entropy_coeff: Annotated[float, Bounds(least=0, zero="no entropy term")] = 0.1
    """With --exit-gate, coefficient of the entropy of exits, which is subtracted from the expected loss."""
    exit_gate_only: bool = False
    """Train the exit gate alone, to leave once another loop no longer improves a token's loss; all other weights stay
    as they are. Start from a checkpoint, with --finetune if that has no gate."""
    exit_improvement_slope: Annotated[float, Bounds(above=0)] = 50.0
    """With --exit-gate-only, slope k of the gate's target, sigmoid(k (improvement - gamma)) to go on."""
    exit_improvement_threshold: Annotated[float, Bounds()] = 0.005
    """With --exit-gate-only, threshold gamma of the improvement, in nats."""
    loop_loss_weights: tuple[Annotated[float, Bounds(least=0, zero="no loss after this loop")], ...] = ()
    """Weights of the losses after loops 1 to K, divided by their sum; default the loss after the last loop alone."""

    @property
    def losses_after_loops(self) -> bool:
        """True if training computes the loss after every loop."""
        return self.exit_gate or bool(self.loop_loss_weights)

    @property
    def losses_flag(self) -> str:
        """Return the flag, with its values, that asks for losses after every loop."""
        if self.loop_loss_weights:
            return f"--loop-loss-weights {' '.join(f'{weight:g}' for weight in self.loop_loss_weights)}"
        return "--exit-gate-only" if self.exit_gate_only else "--exit-gate"


def check_exits(exits: ExitsConfig, loops: int, shared: bool, layout: str) -> None:
    """Raise ``ValueError`` for settings that a core run ``loops`` times, ``shared`` or not, cannot have."""
    if not exits.exit_gate:
        for name in _OF_GATE:
            if (value := getattr(exits, name)) != getattr(ExitsConfig, name):
                shown = flag(name) if value is True else f"{flag(name)} {value}"
                raise ValueError(f"{shown} without --exit-gate: there is no gate to train; add --exit-gate or drop it")
    weights, given = exits.loop_loss_weights, exits.losses_flag
    if exits.exit_gate and weights:
        raise ValueError(f"{given} with --exit-gate: the gate weighs the losses; drop one of the two")
    if exits.losses_after_loops and (loops == 0 or not shared):
        raise ValueError(
            f"{given} with --layout {layout}: a token can leave after a loop only if all loops share their layers, "
            "for its keys and values stand in for those of later loops; use a layout such as 4+8R4+4, or drop the flag"
        )
    if weights and len(weights) != loops:
        raise ValueError(f"{given}: {len(weights)} weights for the {loops} loops of --layout {layout}; give {loops}")
    if weights and sum(weights) == 0:
        raise ValueError(f"{given}: no loss is left; give at least one weight above 0")
    if exits.exit_gate_only and loops < 2:
        raise ValueError(
            f"{given} with --layout {layout}: its target compares the losses of two loops; use a layout of at "
            "least 2 loops"
        )
