"""Muon: orthogonalised momentum for the matrices of layers, beside AdamW for all other parameters.

A matrix W with gradient G has momentum M = mu M + (1 - mu) G and is updated by W -= lr (scale * orthogonal(M) + wd W).
Jordan et al. 2024; scales and the shared rate with AdamW: Liu et al. 2025, arXiv:2502.16982.

Megatron-Core's own is not used: it needs the package emerging-optimizers, which asks for Python 3.12, and its version
in 0.16.1 has another interface. The rules and the names of flags are the same.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from mesh_megatron.checkpoint.optimizer_state import held_parameters, main_parameter, sub_optimizers
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.muon import MuonConfig
from mesh_megatron.parallel.build_model import RankModel

GROUP = "muon"
"""Key of the parameter groups that Muon updates."""
_LAYER_MATRIX = re.compile(r"\.linear_(qkv|proj|fc1|fc2)\.weight\d*$")
_COEFFICIENTS = {
    "simple": [(3.4445, -4.7750, 2.0315)],
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [  # arXiv:2505.16932, Algorithm 1, with its safety factor
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ],
}
"""a, b, c of X := a X + b (X X^T) X + c (X X^T)^2 X, step by step."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer, as a rank holds it."""

    axis: int
    """Axis along which tensor-parallel ranks split it: 0 for rows (outputs), 1 for columns (inputs)."""
    group: dist.ProcessGroup
    """The ranks that split it."""
    parts: tuple[int, ...] = ()
    """Rows of queries, keys and values in each group of heads, to orthogonalise separately; () for one matrix."""


Matrices = Mapping[nn.Parameter, Matrix]


class Muon:
    """An optimizer that updates ``matrices`` and leaves all other parameters of ``adam``'s groups to ``adam``.

    Learning rate and weight decay come from the parameter groups. A matrix keeps its momentum as ``exp_avg``, like
    AdamW's first moment, which is the same average.
    """

    def __init__(self, adam: torch.optim.Optimizer, matrices: Matrices, settings: MuonConfig) -> None:
        self.adam, self.matrices, self.settings = adam, dict(matrices), settings
        self.param_groups: list[dict[str, Any]] = adam.param_groups
        adam.param_groups = [group for group in self.param_groups if GROUP not in group]
        self.state = adam.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters; a collective of the tensor-parallel ranks."""
        self.adam.step()
        for group in self.param_groups:
            if GROUP not in group:
                continue
            for weight in group["params"]:
                update = orthogonalize(self._direction(weight), self.matrices[weight], self.settings)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _direction(self, weight: nn.Parameter) -> Tensor:
        """Average the gradient into the momentum of ``weight`` and return what is to be orthogonalised."""
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(weight)
        momentum = state["exp_avg"].lerp_(gradient, 1 - self.settings.muon_momentum)
        return gradient.lerp(momentum, self.settings.muon_momentum) if self.settings.muon_nesterov else momentum


def layer_matrices(model: RankModel, settings: ModelConfig, split_qkv: bool) -> dict[nn.Parameter, Matrix]:
    """Map every matrix of this rank's layers and experts to how it is held; routers are no such matrices."""
    queries = settings.num_attention_heads // settings.query_groups * settings.head_size
    parts = (queries, settings.head_size, settings.head_size) if split_qkv else ()
    found: dict[nn.Parameter, Matrix] = {}
    for name, parameter in _named_parameters(model):
        if (match := _LAYER_MATRIX.search(name)) is None:
            continue
        expert = ".experts." in name
        group = (
            parallel_state.get_expert_tensor_parallel_group()
            if expert
            else parallel_state.get_tensor_model_parallel_group()
        )
        axis = 0 if match[1] in ("qkv", "fc1") else 1
        found[parameter] = Matrix(axis, group, parts if match[1] == "qkv" else ())
    return found


def _named_parameters(model: RankModel) -> Iterator[tuple[str, nn.Parameter]]:
    return itertools.chain.from_iterable(module.named_parameters() for module in model.modules)


def use_muon(optimizer: MegatronOptimizer, matrices: Matrices, settings: MuonConfig) -> None:
    """Let Muon update ``matrices``, parameters of the model, whose groups are marked with ``GROUP``."""
    for part in sub_optimizers(optimizer):
        held = [parameter for parameter in held_parameters(part) if parameter in matrices]
        mains = {main_parameter(part, parameter)[0]: matrices[parameter] for parameter in held}
        part.optimizer = Muon(part.optimizer, mains, settings)


def orthogonalize(update: Tensor, matrix: Matrix, settings: MuonConfig) -> Tensor:
    """Return this rank's part of the orthogonalised and scaled ``update`` [rows, columns] of a matrix.

    Tensor-parallel ranks gather the update and each computes the complete result, as one process would.
    """
    ranks = matrix.group.size()
    if ranks > 1:
        pieces = [torch.empty_like(update) for _ in range(ranks)]
        dist.all_gather(pieces, update.contiguous(), group=matrix.group)
        update = torch.cat(pieces, dim=matrix.axis)
    if matrix.parts:
        by_group = update.view(-1, sum(matrix.parts), update.shape[1]).split(matrix.parts, dim=1)
        kinds = [_scaled(part.reshape(-1, update.shape[1]), settings).view(part.shape) for part in by_group]
        result = torch.cat(kinds, dim=1).view(update.shape)
    else:
        result = _scaled(update, settings)
    return result.chunk(ranks, dim=matrix.axis)[matrix.group.rank()] if ranks > 1 else result


def _scaled(matrix: Tensor, settings: MuonConfig) -> Tensor:
    rows, columns = matrix.shape
    scale = {
        "spectral": max(rows, columns) ** 0.5,
        "unit_rms_norm": (rows / columns) ** 0.5,
        "shape_scaling": max(1, rows / columns) ** 0.5,
    }[settings.muon_scale_mode]
    low = torch.bfloat16 if settings.muon_fp32_matmul_prec == "medium" else torch.float32
    result = newton_schulz(matrix, settings.muon_num_ns_steps, settings.muon_coefficient_type, low)
    return result * (scale * settings.muon_extra_scale_factor)


def newton_schulz(matrix: Tensor, steps: int, coefficients: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return nearly U V^T for ``matrix`` = U S V^T [rows, columns], computed in ``dtype``; zero stays zero.

    Coefficients start again from the first after the last, but ``polar_express`` repeats its last.
    """
    table = _COEFFICIENTS[coefficients]
    flat = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT  # the smaller of X X^T and X^T X
    x = (flat / flat.norm().clamp_min(1e-7)).to(dtype)
    for step in range(steps):
        last = coefficients == "polar_express" and step >= len(table)
        a, b, c = table[-1] if last else table[step % len(table)]
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrix.dtype)
    return x if flat is matrix else x.mT
