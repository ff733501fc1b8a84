"""Choice of the optimizer, and the settings of Muon, by Megatron-LM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mesh_megatron.config.bounds import Bounds, Count


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """The optimizer and Muon's settings; ``TrainingConfig`` inherits them."""

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    """AdamW, or gradient descent with momentum (sgd) for all parameters, or Muon for the matrices of layers and AdamW
    for all others."""
    sgd_momentum: Annotated[float, Bounds(above=0, below=1)] = 0.9
    """Momentum of sgd: each update is the gradient plus this times the last update. Its weight decay is part of the
    gradient."""
    muon_momentum: Annotated[float, Bounds(least=0, below=1)] = 0.95
    """Decay of Muon's momentum, an average of gradients."""
    muon_nesterov: bool = False
    """Use Nesterov's momentum."""
    muon_num_ns_steps: Count = 5
    """Newton-Schulz steps that orthogonalise the momentum."""
    muon_coefficient_type: Literal["simple", "quintic", "polar_express"] = "quintic"
    """Coefficients of the Newton-Schulz steps."""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """Scale of an orthogonal update of OUT x IN: sqrt(max(OUT, IN)), sqrt(OUT / IN) or sqrt(max(1, OUT / IN))."""
    muon_extra_scale_factor: Annotated[float, Bounds(above=0)] = 1.0
    """Factor on that scale; 0.2 with spectral gives updates as large as AdamW's, so that both take the same --lr."""
    muon_no_split_qkv: bool = False
    """Orthogonalise queries, keys and values of a layer as one matrix; default as three."""
    muon_fp32_matmul_prec: Literal["medium", "high"] = "high"
    """Newton-Schulz steps in float32 (high) or bfloat16 (medium: faster on GPUs, less exact)."""
    muon_scalar_lr: Annotated[float, Bounds(above=0)] | None = None
    """Peak learning rate of what AdamW updates beside Muon; default --lr. It falls in proportion to --lr."""
