"""The complete model on one pipeline stage: the paper's loop (Section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.model.dropout import Masks
from mesh_megatron.model.exits import outcome
from mesh_megatron.model.fp8 import forward_fp8_context
from mesh_megatron.model.layer import LayerPass
from mesh_megatron.model.loop_keys import LoopKeys
from mesh_megatron.model.norm import NORMS
from mesh_megatron.model.output_layer import OutputLayer
from mesh_megatron.model.profiling import name_of_cycle, profiler_range
from mesh_megatron.model.recurrence import build_scheme
from mesh_megatron.model.rotary import rotations_of
from mesh_megatron.model.scheme import Memory, without_graph
from mesh_megatron.model.segment import CoreLoops, Segment
from mesh_megatron.model.transformer_config import MeshTransformerConfig

Run = Callable[[Any, int, Tensor], Tensor]
"""Runs a block in a cycle on the state [S, B, D] that enters it."""


class MeshLanguageModule(LanguageModule):
    """Base class of the complete model and of a ring chunk: builds their modules, under the same names."""

    def __init__(
        self, model: ModelConfig, config: MeshTransformerConfig, vocabulary: int, specs: Mapping[str, ModuleSpec]
    ) -> None:
        """``specs`` is the layer spec of each segment, ``vocabulary`` the padded number of rows of the embedding."""
        super().__init__(config)
        self.model = model
        self.vocabulary = vocabulary
        self.specs = specs
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = not model.untie_embeddings_and_output_weights
        self.pre_process = self.post_process = False
        self.loops = model.segments.loops
        """Number of times that the core runs now."""
        self.rotary = RotaryEmbedding(
            model.head_size,
            model.rotary_percent,
            rotary_base=model.rotary_base,
            rope_scaling=model.use_rope_scaling,
            rope_scaling_factor=model.rope_scaling_factor,
            use_cpu_initialization=True,
        )
        if (factor := model.rotary_seq_len_interpolation_factor) is not None:
            self.rotary.inv_freq = self.rotary.inv_freq / factor  # dividing positions would round unlike transformers

    def build_embedding(self) -> None:
        self.pre_process = True
        self.embedding = LanguageModelEmbedding(
            self.config, self.vocabulary, self.model.seq_length, position_embedding_type="rope"
        )
        self.recurrence = build_scheme(self.model, self.config)

    def build_head(self) -> None:
        self.post_process = True
        norm = NORMS[self.model.normalization]
        self.final_norm = norm(self.config, self.model.hidden_size, self.model.norm_epsilon)
        tied = self.pre_process and self.share_embeddings_and_output_weights
        self.output_layer = OutputLayer(self.model, self.config, self.vocabulary, own_weight=not tied)

    def segment(self, name: str, indices: range) -> Segment:
        return Segment(self.config, self.specs[name], name, indices)

    def masks(self, numbers_BS: Tensor | None) -> Masks | None:
        """Return the dropout masks of a pass over tokens with these numbers; None for no dropout."""
        if numbers_BS is None or not self.training or not self.model.drops:
            return None
        return Masks.of_pass(numbers_BS, self.config.dropout_seed, self.config.sequence_parallel)

    def run_block(
        self,
        block: Segment,
        cycle: int,
        state: Tensor,
        attention_mask: Tensor | None,
        rotations: Tensor,
        here: LayerPass,
    ) -> Tensor:
        """Run this rank's layers of a cycle on the state [S, B, D]; ``here`` has masks and keys of the pass."""
        layers = self.model.segments.computed_before(cycle)
        masks = None if here.masks is None else here.masks.after(layers)
        keys = here.keys if 1 <= cycle <= self.loops else None
        with profiler_range(name_of_cycle(cycle, self.loops)):
            return block(
                state, attention_mask, rotary_pos_emb=rotations, masks=masks, loop=max(cycle - 1, 0), keys=keys
            )

    def embed(self, tokens_BS: Tensor, masks: Masks | None = None) -> Tensor:
        """Return h_emb [S, B, D], the embedding of ``tokens_BS`` scaled by sqrt(D) (Appendix B)."""
        embedding_SBD = self.embedding(tokens_BS, None)
        if masks is not None and self.model.hidden_dropout:
            embedding_SBD = masks.drop(embedding_SBD, "embedding", 0, self.model.hidden_dropout)
        return embedding_SBD * math.sqrt(self.model.hidden_size) if self.model.embedding_scaling else embedding_SBD

    def rotations(self, state_SBD: Tensor) -> Tensor:
        """Return the rotary rotations of queries and keys, for this rank's positions of the sequence."""
        angles = self.rotary(self.rotary.get_rotary_seq_len(None, None, state_SBD, self.config, None))
        return rotations_of(angles, self.config)

    def head(self, state_SBD: Tensor, labels_BS: Tensor | None = None, weights_BS: Tensor | None = None) -> Tensor:
        """Compute the cross-entropy of the labels times their weights (default 1), summed over tokens in float32.

        Without labels, return this rank's logits [B, S, V].
        """
        if labels_BS is not None:
            return self.losses(state_SBD, labels_BS, weights_BS)[0]
        return self._output(state_SBD, None, None).transpose(0, 1).contiguous()

    def losses(self, state_SBD: Tensor, labels_BS: Tensor, weights_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the same, and each token's own loss [B, S], a constant."""
        return self._output(state_SBD, labels_BS, weights_BS)

    def losses_of_loops(self, states_SBD: Tensor, labels_BS: Tensor, weights_KBS: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``exits.Measure`` does, of the states [S, K B, D] that leave the coda, those of loop 1 first."""
        loops = len(weights_KBS)
        summed, losses = self.losses(states_SBD, labels_BS.repeat(loops, 1), weights_KBS.flatten(0, 1))
        return summed, losses.unflatten(0, (loops, -1))

    def complete_logits(self, logits_SKB: Tensor) -> Tensor:
        """Return the gate's logits [K, B, S] for every token, on each tensor-parallel rank."""
        if self.config.sequence_parallel:  # every rank computes the same with them, so each keeps its own gradient
            logits_SKB = gather_from_sequence_parallel_region(logits_SKB, tensor_parallel_output_grad=False)
        return logits_SKB.permute(1, 2, 0)

    def _output(self, state_SBD: Tensor, labels_BS: Tensor | None, weights_BS: Tensor | None) -> Any:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        with profiler_range("head"):
            return self.output_layer(self.final_norm(state_SBD), weight, labels_BS, weights_BS)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return this module's embedding or output matrix; None on a chunk that has neither."""
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else None


def check_loops(model: ModelConfig, loops: int) -> None:
    """Raise ``ValueError`` if the core cannot run ``loops`` times: each loop of an unshared core has its own layers."""
    layout = model.segments
    if loops < min(layout.loops, 1) or (loops != layout.loops and not layout.shared):
        raise ValueError(f"--layout {model.layout} cannot run its core {loops} times: only a shared core, once or more")


class MeshModel(MeshLanguageModule):
    """A recursive transformer P+CRK+Q (or unshared, or plain) with any recurrence scheme."""

    def __init__(
        self, model: ModelConfig, config: MeshTransformerConfig, vocabulary: int, specs: Mapping[str, ModuleSpec]
    ) -> None:
        super().__init__(model, config, vocabulary, specs)
        layout = model.segments
        self.build_embedding()
        self.prelude = self.segment("prelude", range(layout.prelude))
        cores = range(min(layout.loops, 1) if layout.shared else layout.loops)
        self.core = CoreLoops(self.segment("core", layout.core_slice(loop)) for loop in cores)
        self.coda = self.segment("coda", range(layout.coda))
        self.build_head()
        self.setup_embeddings_and_output_layer()

    def set_loops(self, loops: int) -> None:
        """Run the core ``loops`` times from now on; more often than the layout says only without gradients.

        ``SchemeSpec.own_cycle`` says which parameters a cycle takes. Raises ``ValueError`` for an unshared core.
        """
        check_loops(self.model, loops)
        self.loops = self.recurrence.loops = loops

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Ignore the stage's input, which Megatron-Core's schedules set; the complete model starts from tokens."""

    def block(self, cycle: int) -> torch.nn.Module:
        """Return the block of a cycle: the prelude for cycle 0, else the core of loop ``cycle - 1``."""
        return self.prelude if cycle == 0 else self.core[(cycle - 1) % len(self.core)]

    def forward(
        self,
        tokens_BS: Tensor,
        attention_mask: Tensor | None = None,
        labels_BS: Tensor | None = None,
        weights_BS: Tensor | None = None,
        numbers_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum of the labels' losses, or without labels the logits [B, S, V] (see ``head``).

        ``attention_mask`` is as in ``attention.py``; ``numbers_BS`` are the tokens' numbers in the training data,
        which dropout needs. With losses after every loop, training returns ``exits.outcome`` of them.
        """
        if labels_BS is not None and self.training and self.model.losses_after_loops:
            with forward_fp8_context(self.config):
                return self._after_every_loop(tokens_BS, attention_mask, labels_BS, weights_BS, numbers_BS)
        masks = self.masks(numbers_BS)
        state = self.embed(tokens_BS, masks)
        run = self._runner(state, attention_mask, masks)
        with forward_fp8_context(self.config):
            state = self._loops(run, state)
            state = run(self.coda, self.loops + 1, state)
        return self.head(state, labels_BS, weights_BS)

    def _runner(self, state_SBD: Tensor, attention_mask: Tensor | None, masks: Masks | None) -> Run:
        """Return what runs blocks on states of the shape of ``state_SBD``."""
        rotations = self.rotations(state_SBD)
        here = LayerPass(masks, keys=LoopKeys() if self.model.share_kv_across_loops and self.loops > 1 else None)
        return lambda block, cycle, state: self.run_block(block, cycle, state, attention_mask, rotations, here)

    def _after_every_loop(
        self,
        tokens_BS: Tensor,
        attention_mask: Tensor | None,
        labels_BS: Tensor,
        weights_BS: Tensor | None,
        numbers_BS: Tensor | None,
    ) -> Tensor:
        """Return the outcome of losses after every loop; with ``--exit-gate-only`` nothing but the gate has a graph."""
        learns = torch.is_grad_enabled() and not self.model.exit_gate_only
        exits: list[Tensor] = []
        with torch.set_grad_enabled(learns):
            masks = self.masks(numbers_BS)
            state = self.embed(tokens_BS, masks)
            self._loops(self._runner(state, attention_mask, masks), state, exits)
            together = torch.cat(exits, dim=1)

        def measure(weights_KBS: Tensor) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(learns):
                return self._losses_of_exits(together, attention_mask, labels_BS, weights_KBS, numbers_BS)

        logits = None
        if self.model.exit_gate:
            logits = self.complete_logits(self.recurrence.exit_logits(together).unflatten(1, (self.loops, -1)))
        if weights_BS is None:
            weights_BS = torch.ones_like(labels_BS, dtype=torch.float32)
        return outcome(self.model, logits, weights_BS.float(), measure)

    def _losses_of_exits(
        self,
        exits_SBD: Tensor,
        attention_mask: Tensor | None,
        labels_BS: Tensor,
        weights_KBS: Tensor,
        numbers_BS: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run coda and head on the states after all loops at once, as K B sequences; return what ``Measure`` does."""
        loops = len(weights_KBS)
        if attention_mask is not None and len(attention_mask) > 1:
            attention_mask = attention_mask.repeat(loops, 1, 1, 1)
        masks = self.masks(None if numbers_BS is None else numbers_BS.repeat(loops, 1))
        run = self._runner(exits_SBD, attention_mask, masks)
        return self.losses_of_loops(run(self.coda, self.loops + 1, exits_SBD), labels_BS, weights_KBS)

    def _loops(self, run: Run, embedding: Tensor, exits: list[Tensor] | None = None) -> Tensor:
        """Return the state [S, B, D] that enters the coda; with ``--backprop-loops`` the first loops have no graph.

        ``exits`` receives, for each loop, the state that would enter the coda after it.
        """
        recurrence = self.recurrence
        cut = recurrence.cut if torch.is_grad_enabled() else 0
        state, memory = self._cycles(run, range(1), embedding, recurrence.begin(embedding))
        if cut:
            with torch.no_grad():
                passed, memory = self._cycles(run, range(1, cut + 1), state, memory)
            state = without_graph(state, passed)
            memory = recurrence.resume(cut + 1, state, memory)
        return self._cycles(run, range(cut + 1, self.loops + 1), state, memory, exits)[0]

    def _cycles(
        self, run: Run, cycles: range, state: Tensor, memory: Memory, exits: list[Tensor] | None = None
    ) -> tuple[Tensor, Memory]:
        for cycle in cycles:
            memory = self.recurrence.enter(cycle, state, memory)
            output = run(self.block(cycle), cycle, self.recurrence.core_input(cycle, state))
            state, memory = self.recurrence.leave(cycle, output, memory)
            if exits is not None:
                exits.append(self.recurrence.exit_state(cycle, state, memory))
        return state, memory
