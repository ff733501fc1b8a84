"""Layouts of ranks and the models they are tried on: add a line to test a combination.

``layout`` and ``model`` are the flags a user would give. Every case is compared with one process that trains
the same model on the same batches (``test_layouts.py`` has the law).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from mesh_megatron.config import cli
from mesh_megatron.config.model import Recurrence
from mesh_megatron.config.run import RunConfig

STEPS = 10
BASE = (
    "--layout 2+2R2+2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --padded-vocab-size 96 "
    "--micro-batch-size 4 --global-batch-size 8 --lr 2e-3 --init-method-std 0.1 --eval-iters 2 "
    "--mock-data --num-workers 0"
)
TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
SMALLER = "--micro-batch-size 2"  # for rings, which want several at once, and for replicas, which share them
PP2, PP4 = (f"--pipeline-model-parallel-size {size} {SMALLER}" for size in (2, 4))
CP2 = "--context-parallel-size 2"
DISTOPT = f"--use-distributed-optimizer {SMALLER}"
OVERLAP = f"{DISTOPT} --overlap-grad-reduce --overlap-param-gather"
SLOW_ROUTERS = "--router-lr-mult 0.1"
ROUTER_LOSSES = "--router-z-loss 0.3 --router-entropy-loss 0.5 --router-input rmsnorm"
GATES = "--router-gate sigmoid --router-init anchor_emb --router-input rmsnorm --router-scale 0.5 --router-wd-mult 0"
BUCKETS = "--ddp-bucket-size 10000"
FULL, SELECTIVE = "--recompute-granularity full", "--recompute-granularity selective"
PARTS = f"{SELECTIVE} --recompute-modules core_attn layernorm mlp"
DEEP = "--layout 4+4R2+4"
GATED = "--swiglu --normalization RMSNorm --disable-bias-linear --num-query-groups 2"
LLAMA = f"{GATED} --no-parallel-residual"
QK = "--qk-layernorm"
TIED = "--no-untie-embeddings-and-output-weights"
DROPOUT = "--hidden-dropout 0.2 --attention-dropout 0.3"
DOCUMENTS = "--reset-attention-mask --tokenizer-type NullTokenizer --vocab-size 95"


@dataclass(frozen=True)
class Case:
    """One layout of ranks on one model."""

    name: str
    ranks: int
    layout: str = ""
    model: str = ""
    steps: int = STEPS


# Every kind of parallelism, alone and together.
CASES = [
    Case("tp2", 2, TP2),
    Case("tp2-sp-gated", 2, f"{TP2} {SP}", LLAMA),
    Case("pp2", 2, PP2),
    Case("pp2-uneven", 2, PP2, "--layout 1+3R2+1"),
    Case("pp4", 4, PP4, DEEP),
    Case("cp2", 2, CP2),
    Case("dp2-distopt-overlap-buckets", 2, f"{OVERLAP} {BUCKETS}"),
    Case("tp2-sp-pp2", 4, f"{TP2} {SP} {PP2}"),
    Case("pp2-dp2-distopt-overlap-buckets", 4, f"{PP2} {OVERLAP} {BUCKETS}"),
    Case("pp2-cp2", 4, f"{PP2} {CP2}"),
    Case("tp2-sp-pp2-sigmoid-routers", 4, f"{TP2} {SP} {PP2}", f"{GATES} {SLOW_ROUTERS}"),
    Case("tp2-sp-cp2-dropout", 4, f"{TP2} {SP} {CP2}", DROPOUT),
    Case("pp2-dp2-distopt-full-recompute-dropout", 4, f"{PP2} {DISTOPT} {FULL}", DROPOUT),
]

# What else may matter to each kind (make test-all).
MORE_CASES = [
    Case("tp2-sp-dynamic", 2, f"{TP2} {SP}", "--recurrence dynamic"),
    Case("tp4", 4, "--tensor-model-parallel-size 4"),
    Case("pp2-many-micro-batches", 2, f"{PP2} --micro-batch-size 1"),
    Case("pp2-three-loops", 2, PP2, "--layout 2+2R3+2"),
    Case("pp2-tied", 2, PP2, TIED),
    Case("tp2-sp-pp2-router-losses", 4, f"{TP2} {SP} {PP2}", ROUTER_LOSSES),
    Case("cp2-distopt-router-losses", 4, f"{CP2} {DISTOPT}", f"{ROUTER_LOSSES} --router-gate sigmoid"),
    Case("pp2-warm-scaled-routers", 2, PP2, "--router-temperature 2 --router-scale 0.5 --router-init sum"),
    Case("pp2-slots", 2, PP2, "--memory-kernel slots"),
    Case("pp2-plain-model", 2, PP2, "--recurrence vanilla --layout 4"),
    Case("pp2-document-masks", 2, PP2, DOCUMENTS),
    Case("pp2-full-recompute", 2, f"{PP2} {FULL}"),
    Case("pp2-full-recompute-in-uneven-groups", 2, f"{PP2} {FULL} --recompute-num-layers 2", "--layout 3+6R2+2"),
    Case(
        "pp2-block-recompute", 2, f"{PP2} {FULL} --recompute-method block --recompute-num-layers 2", "--layout 3+6R2+2"
    ),
    Case("tp2-sp-recomputed-parts", 2, f"{TP2} {SP} {PARTS}", DROPOUT),
    Case("pp2-recomputed-parts", 2, f"{PP2} {PARTS}", GATED),
    Case("pp4-document-masks", 4, PP4, f"{DEEP} {DOCUMENTS}"),
    Case("pp4-empty-segments", 4, PP4, "--layout 2+3R2+2"),
    Case("pp4-no-overlap-p2p", 4, f"{PP4} --no-overlap-p2p", DEEP),
    Case("tp2-sp-pp2-loss-in-chunks", 4, f"{TP2} {SP} {PP2} --loss-chunk-tokens 24"),
    Case("tp2-sp-pp2-normalised-heads", 4, f"{TP2} {SP} {PP2}", f"{QK} {LLAMA}"),
    Case("dp2-dropout", 2, SMALLER, f"{DROPOUT} {LLAMA}"),
    Case("dp2", 2, SMALLER),
    Case("tp2-sp-distopt-overlap-buckets-full-recompute", 4, f"{TP2} {SP} {OVERLAP} {BUCKETS} {FULL}"),
]

# Loops drawn for each step: with this seed 4, 1, 1, 1, 2, 1, 3, 2, 4, 3.
DRAWN = "--layout 2+2R4+2 --loops-sampling uniform"
SAMPLED_CASES = [
    Case("pp2-dp2-distopt-overlap-buckets-drawn-loops", 4, f"{PP2} {OVERLAP} {BUCKETS}", DRAWN),
    Case("dp2-distopt-overlap-buckets-full-recompute-drawn-loops", 2, f"{OVERLAP} {BUCKETS} {FULL}", DRAWN),
]
MORE_SAMPLED_CASES = [
    Case("tp2-sp-drawn-loops", 2, f"{TP2} {SP}", DRAWN),
    Case("pp2-drawn-loops-full-recompute", 2, f"{PP2} {FULL}", DRAWN),
    Case("pp2-cp2-drawn-loops", 4, f"{PP2} {CP2}", DRAWN),
    Case("pp2-growing-loops", 2, PP2, "--layout 2+2R3+2 --loops-sampling schedule --loops-ramp-iters 6"),
]
# Gradients through the last two of four loops.
CUT = "--layout 2+2R4+2 --backprop-loops 2"
SAMPLED_CASES += [
    Case("pp2-dp2-distopt-overlap-cut-drawn-loops", 4, f"{PP2} {OVERLAP}", f"{CUT} --loops-sampling uniform")
]
MORE_SAMPLED_CASES += [
    Case("pp2-cut-full-recompute", 2, f"{PP2} {FULL}", CUT, steps=5),
    Case("pp4-cut-uneven", 4, PP4, "--layout 2+3R3+2 --backprop-loops 1", steps=5),
    Case("dp2-distopt-overlap-buckets-cut", 2, f"{OVERLAP} {BUCKETS} {FULL}", CUT, steps=5),
]
CASES += SAMPLED_CASES
MORE_CASES += MORE_SAMPLED_CASES

# Schemes of other looped models. Lanes begin equal, so that their numbers only scale the state, which norms undo: with
# small embeddings the little that is left of their gradients is far above rounding.
SMALL = "--no-embedding-scaling"
LOOP_SCHEMES = {
    "adapter": "--recurrence adapter",
    "decay": "--recurrence decay",
    "decay-linear": "--recurrence decay --decay-input linear",
    "hyper": f"--recurrence hyper --hyper-lanes 3 {SMALL}",
    "hyper-dynamic": f"--recurrence hyper-dynamic {SMALL}",
    "attend": "--recurrence attend",
}

# Every scheme on the ring, with one core for all loops and with one a loop (make nightly, if it only adds up states).
SCHEMES = [name for name in get_args(Recurrence) if not name.startswith("vanilla")]
SUMS = [name for name in SCHEMES if "anchor" in name or "residual" in name]


def unshared_on_ring(schemes: Iterable[str]) -> list[Case]:
    return [
        Case(f"pp2-{scheme}-unshared", 2, PP2, f"{scheme_flags(scheme)} --layout 2+2+2+2", steps=3)
        for scheme in schemes
    ]


def scheme_flags(scheme: str) -> str:
    return LOOP_SCHEMES.get(scheme, f"--recurrence {scheme}")


MORE_CASES += [
    *(Case(f"pp2-{scheme}-shared", 2, PP2, scheme_flags(scheme), steps=3) for scheme in SCHEMES if scheme != "mesh"),
    *unshared_on_ring(scheme for scheme in SCHEMES if scheme not in SUMS),
]
CASES += [Case("tp2-sp-pp2-lora", 4, f"{TP2} {SP} {PP2}", "--loop-lora-rank 3 --swiglu", steps=3)]
CASES += [Case("tp2-sp-pp2-hyper-dynamic", 4, f"{TP2} {SP} {PP2}", LOOP_SCHEMES["hyper-dynamic"], steps=3)]
AROUND = "--loop-norm --loop-embedding"
SANDWICH = "--sandwich-norm"
LORA = "--loop-lora-rank 3"
KEYS = "--share-kv-across-loops --layout 2+2R3+2"
CASES += [
    Case("tp2-sp-pp2-shared-keys", 4, f"{TP2} {SP} {PP2}", KEYS, steps=3),
    Case("pp2-dp2-distopt-overlap-buckets-keys-drawn-loops", 4, f"{PP2} {OVERLAP} {BUCKETS}", f"{KEYS} {DRAWN}", 5),
]
MORE_CASES += [
    Case("tp2-sp-full-recompute-shared-keys", 2, f"{TP2} {SP} {FULL}", f"{KEYS} {LLAMA} {DROPOUT}", steps=3),
    Case("pp2-full-recompute-shared-keys-drawn-loops", 2, f"{PP2} {FULL}", f"{KEYS} {DRAWN}", steps=5),
    Case("pp4-uneven-shared-keys", 4, PP4, f"{KEYS} --layout 2+3R3+2 {DOCUMENTS}", steps=3),
    Case("pp2-cp2-shared-keys", 4, f"{PP2} {CP2}", f"{KEYS} {GATED}", steps=3),
]
MORE_CASES += [
    Case(f"{name}-{scheme}", ranks, layout, flags, steps=3)
    for name, ranks, layout in [
        ("tp2-sp-full-recompute", 2, f"{TP2} {SP} {FULL}"),
        ("cp2-dp2-distopt-overlap-buckets", 4, f"{CP2} {OVERLAP} {BUCKETS}"),
    ]
    for scheme, flags in {**LOOP_SCHEMES, "around": AROUND, "per-loop-norms": "--per-loop-norms"}.items()
    if scheme not in ("decay", "hyper")  # what they do is also in decay-linear and hyper-dynamic
]
MORE_CASES += [
    Case("pp2-around", 2, PP2, AROUND, steps=3),
    Case("pp2-recomputed-per-loop-norms-sequential", 2, f"{PP2} {PARTS}", f"--per-loop-norms {LLAMA}", steps=3),
    Case("tp2-sp-recomputed-per-loop-norms", 2, f"{TP2} {SP} {PARTS}", "--per-loop-norms", steps=3),
    Case("tp2-sp-full-recompute-lora", 2, f"{TP2} {SP} {FULL}", f"{LORA} {GATED} --per-loop-norms", steps=3),
    Case("tp2-sp-recomputed-lora", 2, f"{TP2} {SP} {PARTS}", LORA, steps=3),
    Case("pp2-recomputed-lora", 2, f"{PP2} {PARTS}", f"{LORA} {SANDWICH} --layout 2+2R3+2", steps=3),
    Case("pp2-dp2-distopt-overlap-buckets-lora-drawn-loops", 4, f"{PP2} {OVERLAP} {BUCKETS}", f"{LORA} {DRAWN}", 5),
    Case("pp2-recomputed-sandwich-sequential", 2, f"{PP2} {PARTS}", f"{SANDWICH} {LLAMA} {DROPOUT}", steps=3),
]

# Losses after every loop. With a large coefficient the entropy, which only the gate feels, is no small part.
GATE = "--layout 2+2R3+2 --exit-gate --exit-entropy-coeff 0.5"
LOSS_WEIGHTS = "--layout 2+2R3+2 --loop-loss-weights 1 2 3"
GATE_ONLY = "--layout 2+2R3+2 --exit-gate --exit-gate-only --exit-improvement-slope 5"
CASES += [
    Case("tp2-sp-cp2-exit-gate-dropout", 4, f"{TP2} {SP} {CP2}", f"{GATE} {DROPOUT}", steps=3),
    Case("dp2-distopt-overlap-buckets-exit-gate", 2, f"{OVERLAP} {BUCKETS}", GATE, steps=3),
    Case("tp2-sp-exit-gate-only", 2, f"{TP2} {SP}", GATE_ONLY, steps=3),
    Case("tp2-sp-pp2-exit-gate-dropout", 4, f"{TP2} {SP} {PP2}", f"{GATE} {DROPOUT}", steps=3),
    Case("pp2-dp2-distopt-overlap-exit-gate-drawn-loops", 4, f"{PP2} {OVERLAP}", f"{GATE} --loops-sampling uniform", 6),
    Case("pp2-exit-gate-only", 2, PP2, GATE_ONLY, steps=3),
]
MORE_CASES += [
    Case("tp2-exit-gate", 2, TP2, f"{GATE} --recurrence dynamic --loss-chunk-tokens 40", steps=3),
    Case("tp2-sp-exit-gate-full-recompute", 2, f"{TP2} {SP} {FULL}", f"{GATE} --recurrence base", steps=3),
    Case("tp2-sp-loop-loss-weights", 2, f"{TP2} {SP}", LOSS_WEIGHTS, steps=3),
    Case("pp2-exit-gate-shared-keys", 2, PP2, f"{GATE} {KEYS}", steps=3),
    Case("pp2-loop-loss-weights", 2, PP2, LOSS_WEIGHTS, steps=3),
    Case("pp2-cp2-exit-gate", 4, f"{PP2} {CP2}", f"{GATE} --recurrence residual+anchor", steps=3),
    Case("pp4-exit-gate-document-masks", 4, PP4, f"{GATE} --layout 4+4R3+4 {DOCUMENTS}", steps=3),
]

# Combinations of what other cases have one by one (make nightly).
RARE_CASES = [
    Case("tp2-sp", 2, f"{TP2} {SP}"),
    Case("tp2-sp-sigmoid-routers", 2, f"{TP2} {SP}", GATES),
    Case("pp2-sigmoid-slots", 2, PP2, f"{GATES} --memory-kernel slots"),
    Case("pp2-gated", 2, PP2, LLAMA),
    Case("pp2-selective-recompute", 2, f"{PP2} {SELECTIVE}"),
    Case("tp2-sp-joint-recomputed-parts", 2, f"{TP2} {SP} {PARTS}"),
    Case("cp2-gated", 2, CP2, LLAMA),
    Case("tp2-loss-in-chunks", 2, f"{TP2} --loss-chunk-tokens 24"),
    Case("tp2-dropout", 2, TP2, f"{DROPOUT} {LLAMA}"),
    Case("pp2-cut-attend", 2, PP2, f"{CUT} --recurrence attend --loop-norm --loop-embedding", steps=5),
    Case("tp2-sp-cut", 2, f"{TP2} {SP}", CUT, steps=5),
    Case("pp2-exit-gate-full-recompute-uneven", 2, f"{PP2} {FULL}", f"{GATE} --layout 1+3R3+1", steps=3),
    Case("tp2-sp-exit-gate-attend", 2, f"{TP2} {SP}", f"{GATE} --recurrence attend", steps=3),
    *unshared_on_ring(SUMS),
    Case("tp2-sp-gated-parallel", 2, f"{TP2} {SP}", GATED),
    Case("pp2-least-micro-batches", 2, f"{PP2} --micro-batch-size 4"),
    Case("pp2-3+6R3+3", 2, PP2, "--layout 3+6R3+3"),
    Case("pp2-normalized-base-routers", 2, PP2, "--router-input normalized --router-init base"),
    Case("pp2-sigmoid-routers", 2, PP2, GATES),
    Case("tp2-router-losses", 2, TP2, ROUTER_LOSSES),
    Case("pp2-gated-recomputed-parts", 2, f"{PP2} {PARTS}", f"{LLAMA} {DROPOUT}"),
    Case("tp2-normalised-heads", 2, TP2, QK),
    Case("pp4-document-masks-dropout", 4, PP4, f"{DEEP} {DOCUMENTS} {DROPOUT}"),
    Case("tp2-sp-pp2-tied", 4, f"{TP2} {SP} {PP2}", TIED),
    Case("tp2-sp-slow-routers", 2, f"{TP2} {SP}", SLOW_ROUTERS),
    Case("dp4-distopt-overlap-buckets", 4, f"{OVERLAP} {BUCKETS}"),
    Case("pp2-cut-slots", 2, PP2, f"{CUT} --memory-kernel slots", steps=5),
    Case("pp2-cut-anchor", 2, PP2, f"{CUT} --recurrence residual+anchor", steps=5),
    Case("cp2-cut", 2, CP2, CUT, steps=5),
    Case("pp2-tied-drawn-loops", 2, PP2, f"{DRAWN} {TIED}", steps=5),
    Case("cp2-drawn-loops-dynamic", 2, CP2, f"{DRAWN} --recurrence dynamic", steps=5),
    Case("tp2-lora-sequential-gated", 2, TP2, f"{LORA} {LLAMA}", steps=3),
    Case("tp2-sp-recomputed-lora-sequential-gated", 2, f"{TP2} {SP} {PARTS}", f"{LORA} {LLAMA}", steps=3),
    Case("pp2-cut-lora", 2, PP2, f"{CUT} {LORA}", steps=3),
    Case("tp2-sandwich", 2, TP2, f"{SANDWICH} {LLAMA}", steps=3),
    Case("tp2-sp-recomputed-sandwich", 2, f"{TP2} {SP} {PARTS}", SANDWICH, steps=3),
    Case("pp2-exit-gate-only-shared-keys", 2, PP2, f"{GATE_ONLY} {KEYS}", steps=3),
    Case("pp2-exit-gate-hyper", 2, PP2, f"{GATE} {LOOP_SCHEMES['hyper']}", steps=3),
    Case("tp2-exit-gate-hyper-dynamic", 2, f"{TP2} {FULL}", f"{GATE} {LOOP_SCHEMES['hyper-dynamic']}", steps=3),
    Case("pp2-exit-gate-around-drawn-loops-attend", 2, PP2, f"{GATE} {AROUND} --recurrence attend {DRAWN}", steps=5),
    Case("dp2-exit-gate-document-masks", 2, SMALLER, f"{GATE} {DOCUMENTS}", steps=3),
    Case("tp2-exit-gate-tied", 2, TP2, f"{GATE} {TIED}", steps=3),
    Case("cp2-dp2-distopt-overlap-exit-gate-only", 4, f"{CP2} {OVERLAP} {BUCKETS}", GATE_ONLY, steps=3),
    Case("tp2-exit-gate-only-full-recompute", 2, f"{TP2} {FULL}", GATE_ONLY, steps=3),
    Case("cp2-dp2-exit-gate-recomputed-parts", 4, f"{CP2} {SMALLER} {PARTS}", f"{GATE} {AROUND}", steps=3),
    Case("tp2-sp-recomputed-shared-keys-lora", 2, f"{TP2} {SP} {PARTS}", f"{KEYS} {LORA} {GATED}", steps=3),
    Case("pp2-recomputed-shared-keys-attend", 2, f"{PP2} {PARTS}", f"{KEYS} {DROPOUT} --recurrence attend", steps=3),
    Case("cp2-dp2-distopt-overlap-buckets-shared-keys", 4, f"{CP2} {OVERLAP} {BUCKETS}", KEYS, steps=3),
    Case("tp2-shared-keys", 2, TP2, f"{KEYS} {QK}", steps=3),
    Case("dp2-distopt-overlap-full-recompute-shared-keys", 2, f"{OVERLAP} {FULL}", f"{KEYS} {DRAWN}", steps=5),
    Case("tp2-sp-exit-gate-shared-keys", 2, f"{TP2} {SP}", f"{GATE} {KEYS}", steps=3),
    Case("pp2-exit-gate-one-loop", 2, PP2, f"{GATE} --layout 2+2R1+2", steps=3),
    Case("pp2-loop-loss-weights-slots", 2, PP2, f"{LOSS_WEIGHTS} --memory-kernel slots", steps=3),
    Case("pp2-exit-gate-attend", 2, PP2, f"{GATE} --recurrence attend", steps=3),
    Case("pp2-exit-gate-adapter-lora", 2, PP2, f"{GATE} --recurrence adapter {LORA} --per-loop-norms", steps=3),
    Case("pp4-exit-gate", 4, PP4, f"{GATE} --layout 4+4R3+4", steps=3),
    Case("pp2-exit-gate-base-tied", 2, PP2, f"{GATE} --recurrence base {TIED} {LLAMA}", steps=3),
    Case("tp2-sp-pp2-exit-gate-only", 4, f"{TP2} {SP} {PP2}", GATE_ONLY, steps=3),
    Case("pp2-exit-gate-without-coda", 2, PP2, f"{GATE} --recurrence dynamic --layout 2+2R3+0", steps=3),
    Case("tp2-sp-exit-gate-lora-sandwich", 2, f"{TP2} {SP}", f"{GATE} {LORA} {SANDWICH} {GATED}", steps=3),
    Case("tp2-sp-static", 2, f"{TP2} {SP}", "--recurrence static"),
    Case("cp2-sigmoid-routers", 2, CP2, GATES),
    Case("dp2-distopt-overlap-buckets-sigmoid-routers", 2, f"{OVERLAP} {BUCKETS}", GATES),
    Case("pp2-selective-recompute-dropout", 2, f"{PP2} {SELECTIVE}", f"{DROPOUT} --layout 1+3+3+1"),
    Case("cp2-distopt-normalised-heads", 4, f"{CP2} {DISTOPT}", QK),
    Case("tp2-sp-biases-of-queries", 2, f"{TP2} {SP}", "--disable-bias-linear --add-qkv-bias --normalization RMSNorm"),
    Case("dp2-distopt-overlap-buckets-static", 2, f"{OVERLAP} {BUCKETS}", "--recurrence static", steps=3),
    Case("pp2-dp2-distopt-overlap-full-recompute", 4, f"{PP2} {OVERLAP} {FULL}"),
    Case("pp2-dp2-distopt-overlap-buckets-slow-routers", 4, f"{PP2} {OVERLAP} {BUCKETS}", SLOW_ROUTERS),
    Case("tp2-sp-cp2", 4, f"{TP2} {SP} {CP2}"),
    Case("pp2-cut-dynamic", 2, PP2, f"{CUT} --recurrence dynamic", steps=5),
    Case("cp2-dp2-distopt-overlap-buckets-lora", 4, f"{CP2} {OVERLAP} {BUCKETS}", LORA, steps=3),
    Case("cp2-dp2-distopt-overlap-buckets-sandwich", 4, f"{CP2} {OVERLAP} {BUCKETS}", SANDWICH, steps=3),
    Case("tp2-sp-full-recompute-sandwich", 2, f"{TP2} {SP} {FULL}", f"{SANDWICH} --per-loop-norms", steps=3),
    Case("tp2-lora", 2, TP2, LORA, steps=3),
    Case("pp2-dp2-distopt-overlap-buckets-exit-gate-only", 4, f"{PP2} {OVERLAP} {BUCKETS}", GATE_ONLY, steps=3),
    Case("dp2-distopt-overlap-exit-gate-drawn-loops", 2, OVERLAP, f"{GATE} --loops-sampling uniform", steps=6),
    Case(
        "pp2-dp2-distopt-overlap-exit-gate-hyper-dynamic",
        4,
        f"{PP2} {OVERLAP}",
        f"{GATE} {LOOP_SCHEMES['hyper-dynamic']}",
        steps=3,
    ),
]

# bfloat16 weights and activations (routers float32): compared within its noise.
BF16_CASES = [Case("pp2-dp2-distopt-overlap-bf16", 4, f"{PP2} {OVERLAP}", "--bf16")]
MORE_BF16_CASES = [
    Case("tp2-sp-bf16", 2, f"{TP2} {SP}", "--bf16"),
    Case("pp2-gradients-in-bf16", 2, f"{PP2} --grad-reduce-in-bf16", "--bf16"),
    Case("tp2-sp-exit-gate-bf16", 2, f"{TP2} {SP}", f"--bf16 {GATE}"),
    Case("pp2-exit-gate-bf16", 2, PP2, f"--bf16 {GATE}"),
    Case("dp2-distopt-overlap-exit-gate-only-bf16", 2, OVERLAP, f"--bf16 {GATE_ONLY}"),
]
RARE_BF16_CASES = [
    Case("dp2-distopt-gradients-in-bf16", 2, f"{DISTOPT} --grad-reduce-in-bf16", "--bf16"),
    Case("pp2-bf16", 2, PP2, "--bf16"),
    Case("dp2-distopt-overlap-buckets-bf16", 2, f"{OVERLAP} {BUCKETS}", "--bf16"),
]

# Where checkpoints are written and continued (test_checkpoints.py): from one process to what is split in every way.
CHECKPOINT_LAYOUTS = [
    Case("one", 1),
    Case("tp2", 2, TP2),
    Case("pp2", 2, PP2),
    Case("dp2-distopt-overlap-buckets", 2, f"{OVERLAP} {BUCKETS}"),
    Case("tp2-pp2", 4, f"{TP2} {PP2}"),
    Case("pp2-dp2-distopt-overlap-buckets", 4, f"{PP2} {OVERLAP} {BUCKETS}"),
]


def only_in_full(cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test that ``make test`` leaves to ``make test-all``."""
    return [pytest.param(case, marks=pytest.mark.full) for case in cases]


def only_nightly(cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test that ``make test-all`` leaves to ``make nightly``."""
    return [pytest.param(case, marks=[pytest.mark.full, pytest.mark.long]) for case in cases]


@functools.cache
def run_config(model: str = "", layout: str = "", steps: int = STEPS) -> RunConfig:
    """The settings of a run on the little model; later flags win over earlier ones."""
    flags: dict[str, list[str]] = {}
    for word in f"{BASE} --train-iters {steps} {model} {layout}".split():
        if word.startswith("--"):
            values = flags[word] = []
        else:
            values.append(word)
    return cli.parse(RunConfig, [word for flag, values in flags.items() for word in (flag, *values)])


# Models whose losses are kept as text, by the name of the file (test_golden.py).
GOLDEN_MODELS = {name: f"--recurrence {name}" for name in get_args(Recurrence)} | {
    "gated": LLAMA,
    "loop-norm": AROUND,
    "per-loop-norms": "--per-loop-norms",
    "exit-gate": GATE,
    "loop-loss-weights": LOSS_WEIGHTS,
    "sandwich-norm": SANDWICH,
    "loop-lora": LORA,
    "shared-keys": KEYS,
}


# Those whose layers Transformer Engine has too.
ENGINE_MODELS = [name for name, flags in GOLDEN_MODELS.items() if run_config(flags).model.needs_local_layers is None]


def golden_file(name: str) -> Path:
    return Path(__file__).parents[1] / "golden" / f"{name}.txt"
