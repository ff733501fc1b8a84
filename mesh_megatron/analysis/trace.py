"""Trace the states between the blocks of a transformers model on one sequence, by hooks.

A model has K + 2 blocks: the prelude, K loops of the core, the coda. Shapes: S positions, D hidden size, M slots.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM

from mesh_megatron.config.layout import Layout
from mesh_megatron.hf.modeling_mesh import MeshForCausalLM, MeshRecurrence

Readout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trace:
    """The states, block outputs and routings of one sequence."""

    states: list[Tensor]
    """h_emb, then the state that enters each later block (h(0) .. h(K)), then h_out: K + 3 of [S, D]."""
    outputs: list[Tensor]
    """Output of each block: K + 2 of [S, D]; the last one is h_out."""
    writes: list[Tensor]
    """Write weights over the slots in each cycle: K + 1 of [S, M]; empty unless the recurrence is mesh."""
    reads: list[Tensor]
    """Read weights over the slots in each cycle, likewise."""
    readout: Readout
    """Function from a state [S, D] to its logits [S, V] through coda and head."""

    def coefficients(self) -> Tensor:
        """Compute the coefficient of each source in the state after each cycle: [S, K + 1, K + 2], row c for s_{c+1}.

        Column 0 is r_0, for h_emb; column 1 + i is <r_c, w_i>, for y_i, and zero for i > c (Section 3.2).
        """
        cycles = len(self.reads)
        rows = [
            [read[:, 0], *((read * write).sum(-1) for write in self.writes[: cycle + 1])]
            for cycle, read in enumerate(self.reads)
        ]
        empty = torch.zeros_like(rows[0][0])
        return torch.stack([torch.stack(row + [empty] * (cycles + 1 - len(row)), -1) for row in rows], 1)


class Tracer:
    """Traces a transformers model; ``build_tracer`` chooses the subclass."""

    slots: int | None = None
    """Number of slots M of a mesh model, else None."""

    def __init__(self, model: Any, loops: int, coda: list[nn.Module]) -> None:
        self.model, self.body, self.loops, self.coda = model, model.base_model, loops, coda

    @torch.no_grad()
    def __call__(self, ids_S: Tensor) -> Trace:
        """Run the model on one sequence of token ids [S]."""
        coda_calls: list[tuple[tuple, dict]] = []
        with ExitStack() as hooks:
            states, outputs = self._watch(hooks)
            for layer in self.coda:
                hooks.enter_context(_before(layer, lambda args, kwargs: coda_calls.append((args[1:], kwargs))))
            hooks.enter_context(_before(self.body.final_layer_norm, lambda args, kwargs: outputs.append(args[0])))
            self.body(ids_S[None].to(self.model.device), use_cache=False)
        outputs = self._outputs(states, outputs)
        states.append(outputs[-1])

        @torch.no_grad()
        def readout(state_SD: Tensor) -> Tensor:
            hidden: Any = state_SD[None]
            for layer, (args, kwargs) in zip(self.coda, coda_calls, strict=True):
                hidden = layer(hidden, *args, **kwargs)
            return self.model.get_output_embeddings()(self.body.final_layer_norm(hidden))[0]

        return Trace([x[0] for x in states], [x[0] for x in outputs], *self._routing(states), readout)

    def _watch(self, hooks: ExitStack) -> tuple[list[Tensor], list[Tensor]]:
        """Register hooks and return the lists of [1, S, D] that a forward pass fills.

        They are the states except h_out, and the block outputs where these differ from the states.
        """
        raise NotImplementedError

    def _outputs(self, states: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """Complete the list of block outputs after a forward pass."""
        return outputs

    def _routing(self, states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute each cycle's write and read weights from the states that enter the cycles."""
        return [], []


class MeshTracer(Tracer):
    """Tracer of ``MeshForCausalLM``: wraps the blocks, which the model passes to its recurrence as functions."""

    def __init__(self, model: MeshForCausalLM) -> None:
        coda: Any = model.base_model.coda
        loops, trained = model.config.num_loops, model.config.num_trained_loops
        if loops > trained:
            raise ValueError(f"num_loops {loops}: probes show at most the {trained} loops of training; lower num_loops")
        super().__init__(model, loops, list(coda))
        if isinstance(self.body.recurrence, MeshRecurrence):
            self.slots = model.config.num_memory_slots

    def _watch(self, hooks: ExitStack) -> tuple[list[Tensor], list[Tensor]]:
        states: list[Tensor] = []
        outputs: list[Tensor] = []

        def watched(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*args: Any) -> Tensor:
                outputs.append(block(*args))
                return outputs[-1]

            return run

        def before(module: nn.Module, args: tuple, blocks: dict) -> tuple[tuple, dict]:
            return args, blocks | {name: watched(blocks[name]) for name in ("prelude", "core")}

        def after(module: nn.Module, args: tuple, result: list[Tensor]) -> None:
            states.extend(result)

        hooks.enter_context(self.body.recurrence.register_forward_pre_hook(before, with_kwargs=True))
        hooks.enter_context(self.body.recurrence.register_forward_hook(after))
        return states, outputs

    def _routing(self, states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.slots is None:
            return [], []
        routed = [self.body.recurrence.route(cycle, states[cycle]) for cycle in range(self.loops + 1)]
        return [write[0] for write, _ in routed], [read[0] for _, read in routed]


class PlainTracer(Tracer):
    """Tracer of GPT-NeoX, its layers grouped into a layout's blocks; each block's input is the previous output."""

    def __init__(self, model: GPTNeoXForCausalLM, layout: Layout) -> None:
        layers: Any = model.base_model.layers
        if layout.computed_layers != len(layers):
            raise ValueError(
                f"--plain-layout {layout}: has {layout.computed_layers} computed layers, but the plain model has "
                f"{len(layers)}: give a layout with as many"
            )
        super().__init__(model, layout.loops, list(layers[len(layers) - layout.coda :]))
        self.starts = [0, *(layout.prelude + layout.core * loop for loop in range(layout.loops + 1))]

    def _watch(self, hooks: ExitStack) -> tuple[list[Tensor], list[Tensor]]:
        states: list[Tensor] = []
        places = [*self.body.layers, self.body.final_layer_norm]  # the norm comes directly after an empty coda
        for start in self.starts:
            hooks.enter_context(_before(places[start], lambda args, kwargs: states.append(args[0])))
        return states, []

    def _outputs(self, states: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        return [*states[1:], *outputs]


def build_tracer(model: Any, plain_layout: Layout | None = None) -> Tracer:
    """Build the tracer of ``model``; ``plain_layout`` groups the layers of a GPT-NeoX (default: two halves).

    Raises ``ValueError`` if the layout's depth is not the model's.
    """
    if isinstance(model, MeshForCausalLM):
        return MeshTracer(model)
    return PlainTracer(model, plain_layout or Layout.parse(str(len(model.base_model.layers))))


def _before(module: nn.Module, note: Callable[[tuple, dict], None]) -> AbstractContextManager:
    """Call ``note`` with the arguments of every call of ``module`` while the context is open."""

    def hook(called: nn.Module, args: tuple, kwargs: dict) -> None:
        note(args, kwargs)

    return module.register_forward_pre_hook(hook, with_kwargs=True)
