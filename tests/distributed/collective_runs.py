"""Which collectives a layer calls and which ranges a step marks, by torch's profiler in the ranks of a pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import rank_preload  # noqa: F401  (before megatron.core)
import torch
from training_runs import VOCABULARY, build_trainer

from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.build_model import build_model
from mesh_megatron.parallel.groups import start_model_parallel


def collectives_of_a_layer(run: RunConfig, segment: str = "prelude") -> Counter[str]:
    """Name of a collective -> how often one layer of prelude or core calls it, forward and backward."""
    start_model_parallel(run)
    (model,) = build_model(run, VOCABULARY).modules
    split = run.parallel.tensor_model_parallel_size if run.parallel.sequence_parallel else 1
    state = torch.randn(run.model.seq_length // split, 2, run.model.hidden_size, requires_grad=True)
    rotations = model.rotations(state)
    layer = (model.prelude if segment == "prelude" else model.core[0]).layers[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output, _ = layer(state, rotary_pos_emb=rotations)
        output.sum().backward()
    return Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))


def bytes_to_experts(run: RunConfig) -> dict[str, int]:
    """Name of a collective -> bytes of states that this rank sends by it in the first core layer, there and back."""
    start_model_parallel(run)
    (model,) = build_model(run, VOCABULARY).modules
    split = run.parallel.tensor_model_parallel_size if run.parallel.sequence_parallel else 1
    shape = run.model.seq_length // split, run.training.micro_batch_size, run.model.hidden_size
    state = torch.randn(shape, dtype=model.config.params_dtype, requires_grad=True)
    rotations, sent = model.rotations(state), Counter[str]()

    def counting(name: str, parts: Callable[..., list[torch.Tensor]]) -> Any:
        original = getattr(torch.distributed, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            mine = torch.distributed.get_rank(kwargs["group"])
            others = [part for rank, part in enumerate(parts(*args, **kwargs)) if rank != mine]
            sent[name] += sum(part.nbytes for part in others if part.shape[1:] == shape[2:])
            return original(*args, **kwargs)

        return patch.object(torch.distributed, name, collective)

    with (
        counting("all_gather", lambda outputs, tensor, **_: [tensor] * len(outputs)),
        counting("reduce_scatter", lambda output, tensors, **_: tensors),
        counting("all_to_all_single", lambda output, tensor, **given: tensor.split(list(given["input_split_sizes"]))),
    ):
        output = model.core[0](state, None, rotary_pos_emb=rotations)
        output.float().sum().backward()
    return dict(sent)


def ranges_of_a_step(run: RunConfig) -> Counter[str]:
    """Name of a part of the model -> how often a training step runs it on this rank."""
    trainer = build_trainer(run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.step()
    parts = ("prelude", "core", "coda", "head")
    return Counter(event.name for event in profile.events() if event.name.split(",")[0] in parts)
