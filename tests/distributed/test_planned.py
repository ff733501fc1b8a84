"""Plans against instruments: hops, order of work and what is held from step to step exactly, activations within 5%."""

from __future__ import annotations

from collections import Counter

import pytest
from cases import (
    AROUND,
    CP2,
    DISTOPT,
    DROPOUT,
    FULL,
    GATE,
    GATE_ONLY,
    GATED,
    KEYS,
    LLAMA,
    LOOP_SCHEMES,
    LORA,
    LOSS_WEIGHTS,
    PARTS,
    PP2,
    PP4,
    SANDWICH,
    SELECTIVE,
    SP,
    TP2,
    run_config,
)
from collective_runs import bytes_to_experts, collectives_of_a_layer
from planned_runs import observe
from rank_pool import RankPool
from training_runs import VOCABULARY

from mesh_megatron.config.ring import ring_chunks
from mesh_megatron.planning.low_rank import low_rank_collectives
from mesh_megatron.planning.pipeline_schedule import order_of_work
from mesh_megatron.planning.rank_memory import memory_of_ranks, state_sizes
from mesh_megatron.planning.rank_parameters import rank_parameters
from mesh_megatron.planning.traffic import expert_bytes, hop_bytes, hops_of_ranks, layer_collectives

pytestmark = pytest.mark.full

MODEL = "--layout 4+4R2+4 --hidden-size 64 --seq-length 64"
MANY = "--global-batch-size 16"  # more micro-batches than are ever under way
SHARED = "--moe-shared-expert-intermediate-size 128 --disable-bias-linear"
EXPERTS = "--num-experts 4 --moe-ffn-hidden-size 64"
SHARED_AGAIN = f"{SELECTIVE} --recompute-modules core_attn shared_experts"
MUON = "--optimizer muon"
SHAPES = [
    (1, "", EXPERTS),
    (2, f"{TP2} {SP}", "--bf16"),
    (2, CP2, ""),
    (1, f"{SELECTIVE} --recompute-modules layernorm mlp", f"{GATED} {DROPOUT}"),
    (2, f"{PP2} {FULL}", "--layout 4+6R3+3"),
    (4, f"{PP2} {DISTOPT}", "--bf16"),
    (2, f"{TP2} {SP}", f"--bf16 {DROPOUT}"),
    (2, f"{PP2}", f"{MUON} {LLAMA}"),
    (1, "", GATE),
    (2, PP2, KEYS),
    (2, PP2, GATE),
]
MORE_SHAPES = [
    (1, "", f"{MUON} {EXPERTS} --bf16"),
    (2, PP2, "--optimizer sgd --bf16"),
    (4, f"{TP2} {SP} {DISTOPT}", f"{MUON} --bf16"),
    (1, "", ""),
    (1, "", "--bf16"),
    (1, "", f"{GATE} {LORA} {SANDWICH}"),
    (1, "", f"{LLAMA} --bf16"),
    (1, "", "--recurrence dynamic --bf16"),
    (1, "", "--qk-layernorm"),
    (1, "", "--qk-layernorm --group-query-attention"),
    (2, f"{DISTOPT} --grad-reduce-in-bf16", "--bf16"),
    (2, f"{TP2} {SP}", f"{LLAMA} --qk-layernorm --bf16"),
    (1, "", "--memory-kernel slots --bf16"),
    (1, "", "--router-input normalized"),
    (1, "", "--router-input rmsnorm --router-gate sigmoid --router-scale 0.01"),
    (1, "", "--router-input rmsnorm --bf16 --router-entropy-loss 0.1"),
    (1, "", "--router-z-loss 0.1"),
    (1, "", "--layout 4+4R4+4 --backprop-loops 2 --recurrence anchor"),
    (2, PP2, "--layout 4+4R4+4 --backprop-loops 2"),
    (1, "", "--layout 4+4R4+4 --backprop-loops 2 --bf16"),
    (1, SELECTIVE, ""),
    (1, "", f"{EXPERTS} {SHARED}"),
    (2, f"{TP2} {SP}", f"{EXPERTS} {SHARED} --expert-tensor-parallel-size 1"),
    (2, f"{TP2} {SP} {SHARED_AGAIN}", f"{EXPERTS} {SHARED} --expert-tensor-parallel-size 1"),
    (1, PARTS, ""),
    (1, PARTS, f"{LLAMA} --bf16"),
    (2, f"{TP2} {SP} {PARTS}", ""),
    (1, f"{PARTS} moe", f"{EXPERTS} --bf16"),
    (1, f"{FULL} --recompute-method block --recompute-num-layers 3", ""),
    (2, f"{PP2} {FULL} --recompute-method block", MANY),
    (1, SELECTIVE, DROPOUT),
    (1, "", f"{LLAMA} {DROPOUT}"),
    (2, CP2, DROPOUT),
    (1, FULL, ""),
    (2, TP2, "--bf16"),
    (2, PP2, MANY),
    (2, PP2, "--recurrence base --bf16"),
    (2, PP2, "--recurrence residual"),
    (1, f"{FULL} --recompute-num-layers 2", "--layout 3+3R2+4"),
    (2, f"{PP2} {FULL} --recompute-num-layers 2", "--layout 4+6R2+3"),
    (2, DISTOPT, "--bf16"),
    (4, PP4, f"{MANY} --no-untie-embeddings-and-output-weights"),
    (4, f"{PP2} {TP2} {SP}", "--bf16"),
    (1, "", f"{AROUND} --bf16"),
    (1, "", f"{GATE} --bf16"),
    (1, "", f"{GATE} --recurrence base"),
    (2, f"{TP2} {SP}", f"{GATE} {LLAMA}"),
    (1, f"{FULL} --recompute-num-layers 2", f"{GATE} --layout 4+4R3+3"),
    (1, "", f"{GATE_ONLY} --bf16"),
    (4, f"{PP2} {TP2} {SP}", f"{GATE} --bf16 --recurrence base"),
    (2, f"{PP2} {FULL} --recompute-num-layers 2", f"{GATE} --layout 4+4R3+3 {MANY}"),
    (2, PP2, f"{GATE_ONLY} --bf16"),
    (2, PP2, f"{GATE} {KEYS} --layout 4+4R3+4"),
    (2, PP2, f"{LOSS_WEIGHTS} --recurrence attend --layout 4+4R3+4"),
    (2, PP2, f"{LOSS_WEIGHTS} --recurrence hyper --layout 4+4R3+4"),
    (1, "", f"{LOSS_WEIGHTS} --recurrence hyper-dynamic --bf16"),
    (1, "", f"{SANDWICH} --bf16"),
    (1, "", f"{LORA} --bf16"),
    (1, "", f"{KEYS} {GATED} --bf16"),
    (1, "", f"{KEYS} --qk-layernorm --group-query-attention"),
    (1, PARTS, f"{KEYS} {LLAMA} --qk-layernorm --bf16"),
    (1, f"{FULL} --recompute-method block", f"{KEYS} --bf16"),
    (2, f"{TP2} {SP}", f"{KEYS} {LORA}"),
    (2, CP2, KEYS),
    (2, f"{CP2} {SELECTIVE}", KEYS),
    (1, FULL, KEYS),
    (2, f"{TP2} {SP}", f"{LORA} --bf16"),
    (2, f"{TP2} {SP} {PARTS}", f"{LORA} {LLAMA}"),
    (2, f"{PP2} {DISTOPT}", f"{LORA} {MUON}"),
    (2, f"{TP2} {SP} {PARTS}", f"{SANDWICH} {LLAMA}"),
    (2, PP2, f"{AROUND} --recurrence hyper"),
    *((1, "", f"{flags} --bf16") for flags in LOOP_SCHEMES.values()),
    *((2, PP2, f"{flags} --layout 4+4R3+4") for flags in LOOP_SCHEMES.values()),
]


@pytest.mark.parametrize(
    "count, layout, model",
    [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.long) for shape in MORE_SHAPES)],
    ids=lambda value: str(value).replace("--", "").strip() or "-",
)
def test_a_step_is_as_planned(ranks: RankPool, count: int, layout: str, model: str) -> None:
    run = run_config(f"{MODEL} {model}", layout)
    ring = run.parallel.pipeline_model_parallel_size
    replicas = run.parallel.data_parallel_size(count)
    micro_batches = run.training.batch_size(replicas) // run.training.micro_batch_size // replicas
    planned = memory_of_ranks(run, VOCABULARY, count, micro_batches)
    observed = ranks.run(count, observe, run)
    for rank, seen in enumerate(observed):
        stage = seen["stage"]
        plan = planned[stage]
        assert seen["activations"] == pytest.approx(plan.activations + plan.history, rel=0.05), f"rank {rank}"
        held = state_sizes(run, rank_parameters(run.model, run.parallel, VOCABULARY, stage), count)
        assert seen["held"]["parameters"] == held.weights
        assert seen["held"]["gradients"] == held.gradients
        if not run.parallel.use_distributed_optimizer:
            assert seen["held"]["optimizer"] == held.optimizer
        if ring > 1:
            chunks = len(ring_chunks(run.model))
            assert seen["work"] == order_of_work(ring, stage, chunks, micro_batches)
            assert seen["hops"] == {hop_bytes(run): hops_of_ranks(run, micro_batches)[stage]}
    if run.parallel.use_distributed_optimizer:  # shares differ by where parameters end, their sum does not
        total = sum(seen["held"]["optimizer"] for seen in observed)
        assert total == pytest.approx(sum(planned[seen["stage"]].optimizer for seen in observed), abs=count)


@pytest.mark.parametrize("model", ["", "--no-parallel-residual", "--hidden-dropout 0.1", SANDWICH])
@pytest.mark.parametrize("layout", [TP2, f"{TP2} {SP}", f"{TP2} {SP} {PARTS}", f"{TP2} {PARTS}"])
def test_collectives_of_a_layer_are_as_planned(ranks: RankPool, layout: str, model: str) -> None:
    run = run_config(model, layout)
    planned = layer_collectives(run)
    names = {"allreduce_": planned.all_reduce, "_allgather_base_": planned.all_gather}
    names["_reduce_scatter_base_"] = planned.reduce_scatter
    for seen in ranks.run(2, collectives_of_a_layer, run):
        found: Counter[str] = Counter()
        for call, times in seen.items():
            found[next((name for name in names if name in call), call)] += times
        assert {name: found[name] for name in names} == names


@pytest.mark.parametrize("model", ["", "--no-parallel-residual"])
@pytest.mark.parametrize("layout", [TP2, f"{TP2} {SP}", f"{TP2} {SP} {PARTS}", f"{TP2} {PARTS}"])
def test_collectives_of_low_rank_differences_are_as_planned(ranks: RankPool, layout: str, model: str) -> None:
    run = run_config(f"{LORA} {model}", layout)
    planned = layer_collectives(run).calls + low_rank_collectives(run).calls
    for seen in ranks.run(2, collectives_of_a_layer, run, "core"):
        assert sum(seen.values()) == planned


EP2 = "--expert-model-parallel-size 2"


@pytest.mark.parametrize(
    "count, layout, passes",
    [(2, EP2, 2), (2, f"{TP2} {SP}", 2), (2, f"{TP2} {SP} {FULL}", 3), (4, f"{TP2} {SP} {EP2} --bf16", 2)],
    ids=["ep2", "tp2", "tp2-full", "tp2-ep2-bf16"],
)
def test_bytes_to_experts_are_as_planned(ranks: RankPool, count: int, layout: str, passes: int) -> None:
    """Where every token goes to every expert, as it must for them to be exact."""
    run = run_config("--layout 1+1R2+1 --num-experts 2 --moe-router-topk 2 --disable-bias-linear", layout)
    planned = expert_bytes(run)
    there_and_back = planned.gathered + planned.scattered
    for seen in ranks.run(count, bytes_to_experts, run):
        assert seen.get("all_to_all_single", 0) == 2 * passes * planned.moved
        assert seen.get("all_gather", 0) + seen.get("reduce_scatter", 0) == passes * there_and_back
