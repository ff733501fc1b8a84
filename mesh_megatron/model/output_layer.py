"""The output layer: hidden states to logits, or with labels directly to their loss."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.model.cross_entropy import resolve_loss_kernel, summed_cross_entropy


class OutputLayer(ColumnParallelLinear):
    """The output matrix [V, D], split over the vocabulary.

    The loss is part of the layer because it reads the weight chunk by chunk, and only a *call* of the module makes
    the weight available: a distributed optimizer gathers it in a hook.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, vocabulary: int, own_weight: bool) -> None:
        """Without ``own_weight``, every call must pass the embedding's weight."""
        config = copy.copy(config)
        config.gradient_accumulation_fusion = False  # its gradient is computed by chunks in the forward pass
        super().__init__(
            model.hidden_size, vocabulary, config=config, init_method=config.init_method, bias=False,
            skip_weight_param_allocation=not own_weight,
        )  # fmt: skip
        self.kernel, self.chunk_tokens = model.loss_kernel, model.loss_chunk_tokens

    def forward(  # type: ignore[override]
        self, state_SBD: Tensor, weight: Tensor | None, labels_BS: Tensor | None, weights_BS: Tensor | None
    ) -> Any:
        """Return the summed loss as in ``MeshLanguageModule.head`` and the tokens' losses [B, S], which are constants.

        Without labels, return this rank's logits [S, B, V].
        """
        if labels_BS is None:
            return super().forward(state_SBD, weight=weight)[0]
        if self.sequence_parallel:
            state_SBD = gather_from_sequence_parallel_region(state_SBD, group=self.tp_group)
        else:
            state_SBD = copy_to_tensor_model_parallel_region(state_SBD, group=self.tp_group)
        if weights_BS is None:
            weights_BS = torch.ones_like(labels_BS, dtype=torch.float32)
        summed, losses_T = summed_cross_entropy(
            state_SBD.flatten(0, 1),
            self.weight if weight is None else weight,
            labels_BS.T.flatten(),
            weights_BS.T.flatten().float(),
            group=self.tp_group,
            chunk_tokens=self.chunk_tokens,
            kernel=resolve_loss_kernel(self.kernel, state_SBD.device),
        )
        return summed, losses_T.view(labels_BS.T.shape).T
