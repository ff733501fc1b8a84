"""Flags of imports: where to write, how to make a plain model recursive, and what tensors do not show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mesh_megatron.config.bounds import Bounds, Count, flag
from mesh_megatron.config.model import Recurrence, RouterGate, RouterInput
from mesh_megatron.util.staged_folder import check_output

MODEL_FLAGS = (
    "num_memory_slots",
    "router_gate",
    "router_input",
    "decay_input",
    "hyper_lanes",
    "loop_lora_rank",
    "share_kv_across_loops",
    "exit_gate",
)
MARK = "model.yaml"  # the file by which an import is known as one


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Base of the settings of ``import_hf.py`` and ``import_megatron.py``."""

    output: Path
    """Folder to write; give it to pretrain_mesh.py as --load, and model.yaml in it as --config."""
    layout: str | None = None
    """Make it recursive: P+CRK+Q takes prelude and coda from the model's ends and the core from between them."""
    init: Literal["first", "average", "select"] | None = None
    """Core from the first C layers between the ends, from the mean of each C-th, or from C spread evenly, with
    --layout; default average."""
    recurrence: Recurrence | None = None
    """Recurrence scheme, with --layout; default mesh, which starts close to base."""
    num_memory_slots: Count | None = None
    """Memory slots of mesh, with --layout; default K + 3."""
    router_gate: RouterGate | None = None
    """Weights of mesh's slots from its routers' logits, with --layout; default softmax. sigmoid is --router-preset
    recommended's."""
    router_input: RouterInput | None = None
    """Input of mesh's routers, with --layout; default state. rmsnorm is --router-preset recommended's."""
    decay_input: Literal["diagonal", "linear"] | None = None
    """Matrix B of decay, with --layout; default diagonal."""
    hyper_lanes: Count | None = None
    """Lanes of hyper and hyper-dynamic, with --layout; default 2."""
    loop_lora_rank: Count | None = None
    """Rank of a difference of each loop in the core's linear layers, with --layout; all start at zero. Default none."""
    share_kv_across_loops: bool = False
    """Have loops after the first attend to its keys and values, with --layout."""
    exit_gate: bool = False
    """Add an exit gate, with --layout; it starts as in training from scratch."""
    force: bool = False
    """Replace an existing import."""

    def validate(self) -> None:
        """Raise ``ValueError`` if a flag needs --layout, or if the output must not be replaced or written."""
        for name in ("init", "recurrence", *MODEL_FLAGS):
            if self.layout is None and (value := getattr(self, name)) not in (None, False):
                given = flag(name) if value is True else f"{flag(name)} {value}"
                raise ValueError(f"{given} is for --layout, which makes a plain model recursive: add it")
        check_output(self.output, self.force, MARK)

    @property
    def model_flags(self) -> dict[str, Any]:
        """Return the settings of the recursive model that are given."""
        return {name: value for name in MODEL_FLAGS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class Given:
    """Settings of a model that no tensor shows; None takes the argument of this name that its checkpoint stores."""

    num_attention_heads: Count | None = None
    """Attention heads; default, as for the following flags, what the checkpoint says."""
    rotary_base: Count | None = None
    """Base of the rotary frequencies; if the checkpoint does not say it, 10000."""
    rotary_percent: Annotated[float | None, Bounds(above=0, most=1)] = None
    """Share of each head's channels that rotary positions rotate; if the checkpoint does not say it, 1.0."""
    norm_epsilon: Annotated[float | None, Bounds(above=0)] = None
    """Epsilon of the normalisation; if the checkpoint does not say it, 1e-5."""
    seq_length: Count | None = None
    """Tokens in a training sequence; if the checkpoint does not say it, 2048."""
