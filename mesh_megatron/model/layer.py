"""One transformer layer, and the specs that say what it is made of."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.model.attention import ScaledDotProductAttention
from mesh_megatron.model.norm import NORMS

# Where the norms live in a checkpoint: Transformer Engine fuses them into the linear layer that follows, so these
# names are the ones both specs can share.
_NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class ParallelResidualLayer(TransformerLayer):
    """x + attn(ln1(x)) + mlp(ln2(x)), the layer of GPT-NeoX (Section 4)."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[S, B, D] to [S, B, D]; the second value is Megatron-Core's cross-attention context, unused."""
        attention, attention_bias = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        mlp, mlp_bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        output = hidden_states + attention + mlp
        if attention_bias is not None:
            output = output + (attention_bias + mlp_bias)
        return output, None


def layer_spec(
    config: ModelConfig, implementation: str = "local", core_attention: type = ScaledDotProductAttention
) -> ModuleSpec:
    """What one layer is made of. ``core_attention`` serves the local implementation only."""
    parts = _transformer_engine_parts() if implementation == "transformer_engine" else _local_parts(config, core_attention)
    norm, column, row, attention = parts
    return ModuleSpec(
        module=ParallelResidualLayer if config.parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=attention, linear_proj=row, q_layernorm=IdentityOp, k_layernorm=IdentityOp
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if norm is IdentityOp else _NORM_KEYS,
        ),
    )


def _local_parts(config: ModelConfig, core_attention: type) -> tuple[type, type, type, type]:
    """Norm, column-parallel linear, row-parallel linear and core attention from torch and Megatron-Core."""
    return NORMS[config.normalization], ColumnParallelLinear, RowParallelLinear, core_attention


def _transformer_engine_parts() -> tuple[type, type, type, type]:
    """The same from Transformer Engine, whose linear layers bring the norm before them."""
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    return IdentityOp, TELayerNormColumnParallelLinear, TERowParallelLinear, TEDotProductAttention
