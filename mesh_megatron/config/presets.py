"""Presets: the models of Table 1, and forms of mesh's routers, by name. A preset only changes defaults."""

from __future__ import annotations

from typing import Any

# Pythia's widths (Biderman et al., 2023) with the paper's layouts, sequence and padded vocabulary (Appendix B).
_COMMON = {"seq_length": 4096, "padded_vocab_size": 52352}
PRESETS: dict[str, dict[str, Any]] = {
    "pythia-160m": {"layout": "2+4R2+2", "hidden_size": 768, "num_attention_heads": 12, **_COMMON},
    "pythia-410m": {"layout": "4+8R2+4", "hidden_size": 1024, "num_attention_heads": 16, **_COMMON},
    "pythia-1b": {"layout": "3+5R2+3", "hidden_size": 2048, "num_attention_heads": 8, **_COMMON},
    "pythia-1.4b": {"layout": "4+8R2+4", "hidden_size": 2048, "num_attention_heads": 16, **_COMMON},
}

# Groups of settings, as in the YAML of --config. docs/study.md has the comparison of the two.
ROUTER_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "model": {
            "router_gate": "softmax",
            "router_init": "uniform",
            "router_init_std": None,
            "router_input": "state",
            "router_temperature": 1.0,
            "router_scale": None,
        },
        "training": {"router_lr_mult": 1.0, "router_wd_mult": 1.0},
    },
    "recommended": {
        "model": {
            "router_gate": "sigmoid",
            "router_init": "anchor_emb",
            "router_bias": 3.0,
            "router_init_std": 0.0,
            "router_input": "rmsnorm",
        },
        "training": {"router_lr_mult": 0.1},
    },
}
