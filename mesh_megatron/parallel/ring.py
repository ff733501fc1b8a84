"""The ring: recursion on Megatron-Core's interleaved pipeline schedule.

Virtual chunk v of every rank runs the rank's share of segment v of: prelude, core, core, ..., coda. A micro-batch
circles the ring once per loop, so all core chunks of a rank are the same layers: chunk 1 owns them, later chunks refer
to them. The recurrence runs only on rank 0, where every cycle begins; ranks send each other one [S, B, D] tensor, as in
a plain GPT.

With losses after every loop, rank 0 keeps the state after each loop, and the coda circles the ring once for each. The
last rank keeps what leaves the coda, and computes the losses of all loops in the last chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from mesh_megatron.config.layout import share
from mesh_megatron.config.loops import loops_without_gradients
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.ring import ring_chunks, running
from mesh_megatron.model.dropout import Masks
from mesh_megatron.model.exits import outcome
from mesh_megatron.model.layer import LayerPass
from mesh_megatron.model.loop_keys import LoopKeys
from mesh_megatron.model.mesh_model import MeshLanguageModule
from mesh_megatron.model.scheme import Memory, with_zero_gradients, without_graph
from mesh_megatron.model.segment import Segment
from mesh_megatron.model.transformer_config import MeshTransformerConfig
from mesh_megatron.parallel.edges import pass_to_later_chunks
from mesh_megatron.parallel.numbers import as_state, numbers_of


@dataclass(frozen=True)
class PipelineRank:
    """A rank's place on the ring of ``size`` ranks."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1


class RingChunk(MeshLanguageModule):
    """One virtual chunk of one rank, built after the ``earlier`` chunks of the same rank."""

    layers: Segment

    def __init__(
        self,
        model: ModelConfig,
        config: MeshTransformerConfig,
        vocabulary: int,
        specs: Mapping[str, ModuleSpec],
        earlier: list[RingChunk],
        place: PipelineRank,
    ) -> None:
        super().__init__(model, config, vocabulary, specs)
        self.role = ring_chunks(model)[len(earlier)]
        self.place, self.first_rank = place, place.first
        self.chunk = self.vp_stage = len(earlier)
        self.last_chunk = False
        self.outbox: deque[Memory] = deque()  # memory for the next chunk, per micro-batch in flight
        self.keys: deque[LoopKeys] = deque()  # for the next loop's chunk, per micro-batch in flight; on every rank
        self._input: Tensor | None = None
        segment = self.role.segment
        alike = next((chunk for chunk in earlier if chunk.role.segment == segment), None)
        if alike is not None and (segment == "coda" or model.segments.shared):
            self._refer("layers", alike.layers)
        else:
            layers = share(self.role.layers(model.segments), place.rank, place.size)
            self.layers = self.segment("coda" if segment == "gate" else segment, layers)
        if place.first and segment == "prelude":
            self.build_embedding()
        elif place.first:
            self._refer("recurrence", earlier[0].recurrence)
        if earlier:
            self._refer("earlier_keys", earlier[-1].keys)
        if place.last and segment == "coda" and alike is None:
            self._build_last_head()
        elif place.last and alike is not None and segment == "coda":
            self._refer("final_norm", alike.final_norm)
            self._refer("output_layer", alike.output_layer)
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def _build_last_head(self) -> None:
        """Build the head as that of the last chunk, in which Megatron-Core looks for it to tie it to the embedding."""
        self.chunk = self.vp_stage = len(ring_chunks(self.model)) - 1
        self.build_head()

    def take_place(self, chunk: int, before: RingChunk | None, loops: int, last: bool) -> None:
        """Become chunk number ``chunk``, after ``before``, of a ring that runs the core ``loops`` times."""
        self.chunk = self.vp_stage = chunk
        self.last_chunk, self.loops = last, loops
        if before is not None:
            self._refer("inbox", before.outbox)
        if self.first_rank:
            self.recurrence.loops = loops

    def _refer(self, name: str, value: object) -> None:
        """Refer to a module that another chunk owns, without registering its parameters here."""
        object.__setattr__(self, name, value)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        if self.place.last and self.role.segment == "coda":
            return self.output_layer.weight
        return super().shared_embedding_or_output_weight()

    def forward(
        self,
        tokens_BS: Tensor | None,
        attention_mask: Tensor | None = None,
        labels_BS: Tensor | None = None,
        weights_BS: Tensor | None = None,
        numbers_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the state [S, B, D] for the next rank; on the last rank of the last chunk the result of ``head``.

        With losses after every loop, training returns there ``exits.outcome`` of them. With ``--exit-gate-only`` all
        but what leads from the gate to it has no graph; then gradients of zero go back along the ring.
        """
        masks = self.masks(numbers_BS)
        frozen = self.model.exit_gate_only and torch.is_grad_enabled()
        with nullcontext() if self.role.segment == "gate" else self._unless_frozen():
            state = self._enter_cycle(tokens_BS, masks) if self.first_rank else self._input
            assert state is not None
            state = self._run(state, attention_mask, masks)
        if self.place.last and self._after_core:
            state = self._end(state, labels_BS, weights_BS)
        received, self._input = self._input, None
        if not frozen or received is None or self._received_numbers:
            return state
        return with_zero_gradients(state, received)

    @property
    def _received_numbers(self) -> bool:
        """True if the input has the gate's numbers; to add zeros to the bits of their gradients may change these."""
        return self.role.segment == "gate" and not self.first_rank

    def _unless_frozen(self) -> AbstractContextManager:
        """Return a context without graph if the gate alone learns."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.model.exit_gate_only)

    @property
    def _after_core(self) -> bool:
        return self.chunk > self.loops

    @property
    def _has_exits(self) -> bool:
        """True if training now computes the loss after every loop."""
        return self.training and self.model.losses_after_loops

    def _run(self, state: Tensor, attention_mask: Tensor | None, masks: Masks | None) -> Tensor:
        """Run this rank's layers on the state [S, B, D]."""
        if not len(self.layers.indices):
            return state.clone()  # the schedule sends and frees the output, so it must own its memory
        cycle = min(self.chunk, self.loops + 1)
        cut = self._without_graph(cycle)
        with torch.no_grad() if cut else nullcontext():
            here = LayerPass(masks, keys=self._loop_keys())
            output = self.run_block(self.layers, cycle, state, attention_mask, self.rotations(state), here)
        return without_graph(state, output) if cut else output

    def _loop_keys(self) -> LoopKeys | None:
        """Return the first loop's keys and values of the next micro-batch, which the next loop's chunk gets, too."""
        if not self.model.share_kv_across_loops or self.loops == 1 or not 1 <= self.chunk <= self.loops:
            return None
        keys = LoopKeys() if self.chunk == 1 else self.earlier_keys.popleft()
        if self.chunk < self.loops:
            self.keys.append(keys)
        return keys

    def _without_graph(self, cycle: int) -> bool:
        """Return whether a cycle is one of the first loops, which have no gradients (``--backprop-loops``)."""
        cut = loops_without_gradients(self.loops, self.config.backprop_loops)
        return torch.is_grad_enabled() and 1 <= cycle <= cut

    def _enter_cycle(self, tokens_BS: Tensor | None, masks: Masks | None) -> Tensor:
        """Finish the cycle that has passed all ranks, begin this chunk's, and store the memory for later chunks."""
        arrived: Memory = {}
        if self.chunk == 0:
            assert tokens_BS is not None
            state = self.embed(tokens_BS, masks)
            memory = self.recurrence.begin(state)
        else:
            arrived = self.inbox.popleft()
            with self._unless_frozen():
                state, memory = self._finish_loop(arrived)
        if self._after_core:
            return self._enter_coda(state, memory, arrived) if self._has_exits else state
        memory = self.recurrence.enter(self.chunk, state, memory)
        state, memory = pass_to_later_chunks(state, memory, arrived)
        self.outbox.append(memory)
        return self.recurrence.core_input(self.chunk, state)

    def _finish_loop(self, arrived: Memory) -> tuple[Tensor, Memory]:
        """Return the state that follows the cycle whose output has arrived, and the memory with the loop's exit."""
        cycle = self.chunk - 1
        if cycle > self.loops:  # the output of a coda, which stays on the last rank
            assert self._input is not None
            return self._input, arrived
        state, memory = self._leave_cycle(cycle, arrived)
        if self._has_exits and cycle > 0:
            memory = {**memory, f"exit{cycle}": self.recurrence.exit_state(cycle, state, memory)}
        return state, memory

    def _leave_cycle(self, cycle: int, arrived: Memory) -> tuple[Tensor, Memory]:
        """Finish the cycle whose output has arrived; return the next state and the memory."""
        assert self._input is not None
        if not self._without_graph(cycle):
            return self.recurrence.leave(cycle, self._input, arrived)
        with torch.no_grad():
            passed, memory = self.recurrence.leave(cycle, self._input.detach(), arrived)
        state = without_graph(self._input, passed)
        if not self._without_graph(self.chunk):
            memory = self.recurrence.resume(self.chunk, state, memory)
        return state, memory

    def _enter_coda(self, state: Tensor, memory: Memory, arrived: Memory) -> Tensor:
        """Return what the first rank sends after the core: the gate's numbers, or the state after this chunk's loop."""
        names = [f"exit{loop}" for loop in range(1, self.loops + 1)]
        exits = {name: memory[name] for name in names}
        if not self.last_chunk:
            with self._unless_frozen():
                state, exits = pass_to_later_chunks(state, exits, arrived)
            self.outbox.append(exits)
        if self.role.segment == "gate":
            logits = torch.stack([self.recurrence.exit_logits(exits[name]) for name in names], dim=-1)
            sent = as_state(logits, state.shape[-1], state.dtype)
        else:
            sent = exits[f"exit{self.role.number}"]
        return with_zero_gradients(sent, state)

    def _end(self, state: Tensor, labels_BS: Tensor | None, weights_BS: Tensor | None) -> Tensor:
        """Return the losses; before the last chunk keep what they need, and return what the next rank ignores."""
        if not self._has_exits:
            return self.head(state, labels_BS, weights_BS)
        arrived = self.inbox.popleft() if self.chunk > self.loops + 1 else {}
        if self.role.segment == "gate":
            memory = {**arrived, "logits": numbers_of(state, self.loops)}
            state = state.detach()  # the next rank ignores it, and its zero gradient must not be added to the numbers'
        else:
            memory = {**arrived, f"state{self.role.number}": state}
        if self.last_chunk:
            assert labels_BS is not None and weights_BS is not None
            return self._outcome(memory, labels_BS, weights_BS)
        state, memory = pass_to_later_chunks(state, memory, arrived)
        self.outbox.append(memory)
        return state

    def _outcome(self, memory: Memory, labels_BS: Tensor, weights_BS: Tensor) -> Tensor:
        """Return ``exits.outcome`` of the states that have left the coda, in the order of loops."""
        logits = self.complete_logits(memory["logits"].transpose(1, 2)) if self.model.exit_gate else None

        def measure(weights_KBS: Tensor) -> tuple[Tensor, Tensor]:
            with self._unless_frozen():
                states = torch.cat([memory[f"state{loop}"] for loop in range(1, self.loops + 1)], dim=1)
                return self.losses_of_loops(states, labels_BS, weights_KBS)

        return outcome(self.model, logits, weights_BS.float(), measure)


def arrange(chunks: Sequence[RingChunk], loops: int, exits: bool) -> None:
    """Make a ring of the chunks that run with ``loops`` loops, with or without losses after each."""
    now = running([chunk.role for chunk in chunks], chunks, loops, exits)
    for place, (before, chunk) in enumerate(zip([None, *now], now, strict=False)):
        chunk.take_place(place, before, loops, last=place == len(now) - 1)


def build_ring(
    model: ModelConfig,
    config: MeshTransformerConfig,
    vocabulary: int,
    specs: Mapping[str, ModuleSpec],
    place: PipelineRank,
) -> list[nn.Module]:
    """Build the chunks of a rank, in the order of the ring."""
    chunks: list[RingChunk] = []
    for _ in ring_chunks(model):
        chunks.append(RingChunk(model, config, vocabulary, specs, chunks, place))
    arrange(chunks, model.segments.loops, model.losses_after_loops)
    return list(chunks)
