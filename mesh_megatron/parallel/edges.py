"""Edges: tensors that pass from one pipeline chunk of a micro-batch to later chunks on the same rank.

The schedule runs each chunk's backward pass separately, later chunks first. A tensor that one chunk computes and later
chunks use therefore crosses as a *twin* (``model/twins.py``), which collects the gradients of the later chunks. The
chunk that computed the tensor adds them in its own backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mesh_megatron.model.twins import collect, twin_of


def pass_to_later_chunks(
    state: Tensor, memory: Mapping[str, Any], arrived: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the state to continue with in this chunk, and ``memory`` for later chunks, with twins for new tensors.

    Tensors that ``arrived`` from earlier chunks are already twins and pass unchanged; so do values that are not
    tensors. A tensor whose twin receives no gradient from later chunks gets the gradient None. This chunk's output must
    depend on the returned state, because the chunk's backward pass starts at its output.
    """
    if not torch.is_grad_enabled():
        return state, dict(memory)
    passing = {id(value) for value in arrived.values()}
    new = {name: value for name, value in memory.items() if isinstance(value, Tensor) and id(value) not in passing}
    twins = {name: twin_of(tensor) for name, tensor in new.items()}
    state = collect(list(twins.values()), state, list(new.values()))
    return state, {**memory, **twins}
