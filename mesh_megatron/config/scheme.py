"""A recurrence scheme without torch: the base class of the descriptions of all schemes, which is the base recursion.

D is the hidden size, K the number of loops, M the number of memory slots. Cycle 0 is the prelude, cycle c is loop
c - 1; chunk c of a pipeline begins with the state that enters cycle c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mesh_megatron.config.bounds import flag
from mesh_megatron.config.model import ModelConfig

FLOAT32 = 4
"""Bytes of a float32 value."""
Constant = float | tuple[float, ...]
"""A tensor as ``constant_tensor`` takes it: a number on its diagonal, or values along its last axis (one fills it)."""
FAVOURED = 0.99
"""Share of the base recursion at a start near it, where what is learned beside it still gets gradients."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a scheme; always float32, whatever the run's precision."""

    shape: tuple[int, ...]
    start: Constant | Literal["normal"] = "normal"
    """Initial value; normal draws from N(0, std)."""
    std: float | None = None
    """Standard deviation of normal; default ``--init-method-std``."""
    at_base: Constant = (0.0,)
    """Initial value with which the scheme starts at the base recursion, or near it (uptraining)."""


@dataclass(frozen=True)
class StateSize:
    """Size of one state [S, B, D] of one micro-batch on one rank."""

    tokens: int
    hidden: int
    value_bytes: int
    on_ring: bool
    """States pass between pipeline ranks; the schedule keeps each tensor that it receives."""

    @property
    def state(self) -> int:
        """Bytes of the state."""
        return self.tokens * self.hidden * self.value_bytes

    def float32(self, width: int) -> int:
        """Return the bytes of ``width`` numbers per token in float32."""
        return self.tokens * width * FLOAT32


@dataclass(frozen=True)
class SchemeSpec:
    """The base recursion, h(t+1) = f_core(h(t)), which has no parameters, costs nothing and keeps nothing."""

    model: ModelConfig

    seen_in: ClassVar[str] = ""
    """Paper or model that the scheme is from, in Markdown; empty for the base recursion, which is everybody's."""

    @property
    def loops(self) -> int:
        return self.model.segments.loops

    def settings(self) -> dict[str, Any]:
        """Return this scheme's own settings under their names in ``ModelConfig`` and ``MeshConfig``."""
        return {}

    def parameters(self) -> dict[str, Parameter]:
        """Return the parameters by their name in a checkpoint after ``recurrence.``, in the order of export."""
        return {}

    def all_parameters(self) -> dict[str, Parameter]:
        """Return ``parameters``, and those of the core's input and of exits, which every scheme may have."""
        return self.parameters() | input_parameters(self.model) | exit_parameters(self.model)

    @property
    def injects_prelude(self) -> bool:
        """True if the prelude's output reaches the later loops and the coda also past the core."""
        return False

    def own_cycle(self, cycle: int, loops: int) -> int:
        """Return the cycle whose own parameters ``cycle`` takes when the core runs ``loops`` times instead of K.

        The last cycle, which leads to the coda, takes those of cycle K whatever ``loops`` is. The others take their own
        up to cycle K - 1; later ones take those of the last cycle that led back to the core.
        """
        return self.loops if cycle == loops else min(cycle, max(self.loops - 1, 1))

    def validate(self) -> None:
        """Raise ``ValueError`` for settings that the scheme cannot follow."""
        for name in ("router_z_loss", "router_entropy_loss"):
            if value := getattr(self.model, name):
                raise ValueError(
                    f"{flag(name)} {value:g} with --recurrence {self.model.recurrence}: only mesh has routers with "
                    "gates; drop the flag"
                )

    def check_base_start(self) -> None:
        """Raise ``ValueError`` if the scheme cannot start at the base recursion with these settings."""

    def routing_macs(self) -> int:
        """Return the forward multiply-adds per token of products with weights, over all cycles."""
        return 0

    def mixing_macs(self) -> int:
        """Return the forward multiply-adds per token of weighted sums of states, over all cycles."""
        return 0

    def exit_macs(self) -> tuple[int, int]:
        """Return the further ``routing_macs`` and ``mixing_macs`` of the states that exits of loops 1..K-1 lead to."""
        return 0, 0

    def boundary_traffic(self, cycle: int, value_bytes: int) -> tuple[float, float]:
        """Return how many states the end of ``cycle`` reads and writes in GPU memory, forward and backward.

        The numbers are those of the table in docs/performance.md; a value of a state has ``value_bytes``.
        """
        return 0, 0

    def history(self, chunk: int, size: StateSize) -> int:
        """Return the bytes kept at the start of ``chunk`` (0..K+1) for the backward pass, besides layers' inputs."""
        return 0

    def exit_history(self, chunk: int, size: StateSize) -> int:
        """Return the further bytes kept at the start of ``chunk`` for the exit of the loop before it."""
        return 0

    @property
    def own_exits(self) -> bool:
        """True if the state of an exit is not that which enters the next loop, so that a ring keeps both."""
        return False

    def deferred(self, size: StateSize) -> int:
        """Return the bytes of the gradient that one boundary's backward pass holds for the boundaries before it."""
        return 0


def input_parameters(model: ModelConfig) -> dict[str, Parameter]:
    """Return what changes the state that a loop reads: the scale of ``--loop-norm``, ``--loop-embedding``'s vectors."""
    found, hidden = {}, model.hidden_size
    if model.loop_norm:
        found["loop_norm.weight"] = Parameter((hidden,), start=(1.0,), at_base=(1.0,))
    if model.loop_embedding:
        found["loop_embedding.weight"] = Parameter((model.segments.loops, hidden), start=(0.0,))
    return found


def exit_parameters(model: ModelConfig) -> dict[str, Parameter]:
    """Return the exit gate, a linear layer to one number (``--exit-gate``)."""
    if not model.exit_gate:
        return {}
    return {"exit_gate.weight": Parameter((1, model.hidden_size)), "exit_gate.bias": Parameter((1,), start=(0.0,))}
