"""The states between the blocks of a transformers model while it reads one sequence, taken by hooks.

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
    """What one sequence was turned into."""

    states: list[Tensor]
    """h_emb, then the state that enters each later block (h(0) .. h(K)), then h_out: K + 3 of [S, D]."""
    outputs: list[Tensor]
    """What each block made of the state that entered it: K + 2 of [S, D]; the last one is h_out."""
    writes: list[Tensor]
    """Weights over the slots that each cycle's output was written with: K + 1 of [S, M]; empty unless mesh."""
    reads: list[Tensor]
    """Weights that the state after each cycle was read with, likewise."""
    readout: Readout
    """Logits [S, V] of a state [S, D] put through the coda and the head."""

    def coefficients(self) -> Tensor:
        """How much of each source the state after each cycle is: [S, K + 1, K + 2], row c for s_{c+1}.

        Column 0 is r_0, of h_emb; column 1 + i is <r_c, w_i>, of y_i; zero for what cycle c has not seen yet.
        """
        cycles = len(self.reads)
        rows = [
            [read[:, 0], *((read * write).sum(-1) for write in self.writes[: cycle + 1])]
            for cycle, read in enumerate(self.reads)
        ]
        empty = torch.zeros_like(rows[0][0])
        return torch.stack([torch.stack(row + [empty] * (cycles + 1 - len(row)), -1) for row in rows], 1)


class Tracer:
    """Traces a model of transformers; ``build_tracer`` chooses the kind."""

    slots: int | None = None
    """M, of a model whose recurrence is mesh."""

    def __init__(self, model: Any, loops: int, coda: list[nn.Module]) -> None:
        self.model, self.body, self.loops, self.coda = model, model.base_model, loops, coda

    @torch.no_grad()
    def __call__(self, ids_S: Tensor) -> Trace:
        """Run the model on one sequence of token ids."""
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
        """Lists [1, S, D] that a forward pass fills: states but h_out, and outputs of blocks where they differ."""
        raise NotImplementedError

    def _outputs(self, states: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """What each block put out."""
        return outputs

    def _routing(self, states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights that each cycle's routers give, from the states that enter them."""
        return [], []


class MeshTracer(Tracer):
    """A model of ours: its recurrence is called with its blocks as functions, and here with ones that are watched."""

    def __init__(self, model: MeshForCausalLM) -> None:
        coda: Any = model.base_model.coda
        super().__init__(model, model.config.num_loops, list(coda))
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
            return args, {name: watched(block) for name, block in blocks.items()}

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
    """A GPT-NeoX, its layers seen as the blocks of a layout: the state that enters one is what the last put out."""

    def __init__(self, model: GPTNeoXForCausalLM, layout: Layout) -> None:
        layers: Any = model.base_model.layers
        if layout.computed_layers != len(layers):
            raise ValueError(
                f"--plain-layout {layout}: that is {layout.computed_layers} computed layers, the plain model has "
                f"{len(layers)}: give a layout of as many"
            )
        super().__init__(model, layout.loops, list(layers[len(layers) - layout.coda :]))
        self.starts = [0, *(layout.prelude + layout.core * loop for loop in range(layout.loops + 1))]

    def _watch(self, hooks: ExitStack) -> tuple[list[Tensor], list[Tensor]]:
        states: list[Tensor] = []
        places = [*self.body.layers, self.body.final_layer_norm]  # the norm follows at once on an empty coda
        for start in self.starts:
            hooks.enter_context(_before(places[start], lambda args, kwargs: states.append(args[0])))
        return states, []

    def _outputs(self, states: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        return [*states[1:], *outputs]


def build_tracer(model: Any, plain_layout: Layout | None = None) -> Tracer:
    """``plain_layout`` is how a GPT-NeoX is seen, default as two halves; ``ValueError`` where its depth is another."""
    if isinstance(model, MeshForCausalLM):
        return MeshTracer(model)
    return PlainTracer(model, plain_layout or Layout.parse(str(len(model.base_model.layers))))


def _before(module: nn.Module, note: Callable[[tuple, dict], None]) -> AbstractContextManager:
    """Calls ``note`` with what ``module`` is called with, for as long as the context lasts."""

    def hook(called: nn.Module, args: tuple, kwargs: dict) -> None:
        note(args, kwargs)

    return module.register_forward_pre_hook(hook, with_kwargs=True)
