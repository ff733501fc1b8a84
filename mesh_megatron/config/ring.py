"""The chunks of a ring: what each virtual pipeline chunk of a rank runs, in the order of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

from mesh_megatron.config.layout import Layout, share
from mesh_megatron.config.model import ModelConfig

Item = TypeVar("Item")


class ChunkRole(NamedTuple):
    """Role of one chunk of a ring; every rank runs its share of the segment's layers."""

    segment: Literal["prelude", "core", "gate", "coda"]
    """``gate`` has no layers: it takes the exit gate's numbers from the first rank, which computes them, to the last,
    which computes the losses."""
    number: int = 1
    """Loop of a core chunk, from 1; with losses after every loop, that whose state the coda runs on."""

    def layers(self, layout: Layout) -> range:
        """Return the indices of the segment's layers that the ranks share."""
        if self.segment == "core":
            return layout.core_slice(self.number - 1)
        return range({"prelude": layout.prelude, "gate": 0, "coda": layout.coda}[self.segment])


def ring_chunks(model: ModelConfig) -> list[ChunkRole]:
    """Return the roles of a rank's chunks: prelude, K cores, coda.

    With losses after every loop in training, the coda runs once per loop, after the gate's numbers if there is a gate.
    """
    loops = model.segments.loops
    return [
        ChunkRole("prelude"),
        *(ChunkRole("core", loop) for loop in range(1, loops + 1)),
        *([ChunkRole("gate")] if model.exit_gate else []),
        *(ChunkRole("coda", loop) for loop in range(1, model.losses_per_token + 1)),
    ]


def layers_by_rank(model: ModelConfig, ranks: int) -> list[int]:
    """Return the number of layers that each rank of a ring computes per micro-batch, over all its chunks."""
    segments = [role.layers(model.segments) for role in ring_chunks(model)]
    return [sum(len(share(layers, rank, ranks)) for layers in segments) for rank in range(ranks)]


def running(roles: Sequence[ChunkRole], items: Sequence[Item], loops: int, exits: bool) -> list[Item]:
    """Return the ``items``, one per role, of the chunks that run with ``loops`` loops; ``exits``: losses after each."""
    most = {"prelude": 1, "core": loops, "gate": int(exits), "coda": loops if exits else 1}
    return [item for role, item in zip(roles, items, strict=True) if role.number <= most[role.segment]]
