"""The ring: recursion on Megatron-Core's interleaved pipeline schedule.

Virtual chunk v of every rank runs the rank's share of segment v of: prelude, core, core, ..., coda. A micro-batch
circles the ring once per loop, so all core chunks of a rank are the same layers: chunk 1 owns them, later chunks refer
to them. The recurrence runs only on rank 0, where every cycle begins; ranks send each other one [S, B, D] tensor, as in
a plain GPT.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from mesh_megatron.config.layout import Layout, share
from mesh_megatron.config.loops import loops_without_gradients
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.model.dropout import Masks
from mesh_megatron.model.layer import LayerPass
from mesh_megatron.model.loop_keys import LoopKeys
from mesh_megatron.model.mesh_model import MeshLanguageModule
from mesh_megatron.model.scheme import Memory, without_graph
from mesh_megatron.model.segment import Segment
from mesh_megatron.model.transformer_config import MeshTransformerConfig
from mesh_megatron.parallel.edges import pass_to_later_chunks


def segment_of(layout: Layout, chunk: int) -> tuple[str, range]:
    """Return name and layer indices of the segment that chunk ``chunk`` (0..K+1) of the ring runs."""
    if chunk == 0:
        return "prelude", range(layout.prelude)
    if chunk == layout.loops + 1:
        return "coda", range(layout.coda)
    return "core", layout.core_slice(chunk - 1)


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
    """One virtual chunk of one rank: the one after the ``earlier`` chunks of the same rank."""

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
        self.chunk = self.vp_stage = chunk = len(earlier)
        self.first_rank = place.first
        self.last_chunk = chunk == model.segments.loops + 1
        self.outbox: deque[Memory] = deque()  # memory for the next chunk, per micro-batch in flight; rank 0 only
        self.keys: deque[LoopKeys] = deque()  # for the next loop's chunk, per micro-batch in flight; on every rank
        self._input: Tensor | None = None
        if chunk == 0 and self.first_rank:
            self.build_embedding()
        name, layers = segment_of(model.segments, chunk)
        if name == "core" and chunk > 1 and model.segments.shared:
            self._refer("layers", earlier[1].layers)
        else:
            self.layers = self.segment(name, share(layers, place.rank, place.size))
        if chunk > 0:
            self._refer("inbox", earlier[-1].outbox)
            self._refer("earlier_keys", earlier[-1].keys)
            if self.first_rank:
                self._refer("recurrence", earlier[0].recurrence)
        if self.last_chunk and place.last:
            self.build_head()
        self.setup_embeddings_and_output_layer()

    def set_loops(self, loops: int, before_coda: RingChunk) -> None:
        """Make this chunk part of a ring that runs the core ``loops`` times.

        The last chunk then follows chunk ``before_coda``; core chunks after that one are left out.
        """
        self.loops = loops
        if self.last_chunk:
            self.chunk = self.vp_stage = loops + 1
            self._refer("inbox", before_coda.outbox)
        if self.first_rank:
            self.recurrence.loops = loops

    def _refer(self, name: str, value: object) -> None:
        """Refer to a module that another chunk owns, without registering its parameters here."""
        object.__setattr__(self, name, value)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        tokens_BS: Tensor | None,
        attention_mask: Tensor | None = None,
        labels_BS: Tensor | None = None,
        weights_BS: Tensor | None = None,
        numbers_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the state [S, B, D] for the next rank; on the last rank of the last chunk the result of ``head``."""
        masks = self.masks(numbers_BS)
        state = self._enter_cycle(tokens_BS, masks) if self.first_rank else self._input
        assert state is not None
        if not len(self.layers.indices):
            state = state.clone()  # the schedule sends and frees the output, so it must own its memory
        else:
            cut = self._without_graph(self.chunk)
            with torch.no_grad() if cut else nullcontext():
                here = LayerPass(masks, keys=self._loop_keys())
                output = self.run_block(self.layers, self.chunk, state, attention_mask, self.rotations(state), here)
            state = without_graph(state, output) if cut else output
        return self.head(state, labels_BS, weights_BS) if self.post_process else state

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
            state, memory = self._leave_cycle(self.chunk - 1, arrived)
        if self.last_chunk:
            return state
        memory = self.recurrence.enter(self.chunk, state, memory)
        state, memory = pass_to_later_chunks(state, memory, arrived)
        self.outbox.append(memory)
        return self.recurrence.core_input(self.chunk, state)

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


def build_ring(
    model: ModelConfig,
    config: MeshTransformerConfig,
    vocabulary: int,
    specs: Mapping[str, ModuleSpec],
    place: PipelineRank,
) -> list[nn.Module]:
    """Build the K + 2 chunks of a rank, in the order of the ring."""
    chunks: list[RingChunk] = []
    for _ in range(model.segments.loops + 2):
        chunks.append(RingChunk(model, config, vocabulary, specs, chunks, place))
    return list(chunks)
