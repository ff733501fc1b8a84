"""Plans add up: over ranks to the whole model, over experts to what a token meets."""

import pytest

from mesh_megatron.config import cli
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.hardware import gpu_named, known_gpus
from mesh_megatron.planning.parameters import active_parameters, count_parameters
from mesh_megatron.planning.plan import Plan, plan_run
from mesh_megatron.planning.rank_parameters import rank_parameters


def run_config(flags: str = "") -> RunConfig:
    base = "--preset pythia-1.4b --bf16 --global-batch-size 512 --train-iters 10"
    return cli.parse_run(RunConfig, PRESETS, f"{base} {flags}".split(), prog="plan.py")


def plan(flags: str = "", ranks: int = 64) -> Plan:
    return plan_run(run_config(flags), ranks)


@pytest.mark.parametrize("ring", [1, 2, 4, 8])
@pytest.mark.parametrize("model", ["", "--layout 3+5R2+3", "--recurrence vanilla", "--num-experts 8 --swiglu"])
def test_ranks_of_a_ring_hold_the_model_once(ring: int, model: str):
    run = run_config(f"{model} --pipeline-model-parallel-size {ring}")
    held = sum(rank_parameters(run.model, run.parallel, 52352, stage).total for stage in range(ring))
    assert held == count_parameters(run.model, 52352).total


def test_low_rank_differences_divide_over_tensor_parallel_ranks():
    """Column-parallel layers cut B, row-parallel ones A; Muon's matrices are others."""
    run = run_config("--loop-lora-rank 8 --tensor-model-parallel-size 4 --no-parallel-residual")
    plain = run_config("--tensor-model-parallel-size 4 --no-parallel-residual")
    one, without = (rank_parameters(r.model, r.parallel, 52352, 0) for r in (run, plain))
    whole, cut = 2048, (3 * 2048 + 2048 + 8192 + 8192) // 4  # four linear layers, one side each
    assert one.dense - without.dense == 8 * 2 * 8 * (4 * whole + cut)
    assert one.matrices == without.matrices
    (row,) = [row for row in plan_run(run, 64).traffic if "low-rank" in row.reason]
    micro_batches, tokens = 32, 4096  # 512 sequences on 16 replicas, one at a time
    assert row.messages == 16 * 4 * micro_batches  # 8 layers twice: gradients of two layers' A x, sums of two
    assert row.bytes_sent == row.messages * 2 * tokens * 8 * 2 * 3 // 4


def test_a_tied_table_is_at_both_ends_of_a_ring():
    run = run_config("--no-untie-embeddings-and-output-weights --pipeline-model-parallel-size 2")
    held = sum(rank_parameters(run.model, run.parallel, 52352, stage).total for stage in range(2))
    assert held == count_parameters(run.model, 52352).total + 52352 * 2048


def test_experts_divide_over_their_ranks():
    run = run_config("--num-experts 8 --expert-model-parallel-size 4")
    whole = run_config("--num-experts 8")
    mine, everyone = (rank_parameters(r.model, r.parallel, 52352, 0) for r in (run, whole))
    assert mine.experts * 4 == everyone.experts and mine.dense == everyone.dense


def test_active_parameters_of_a_mixture():
    dense = count_parameters(run_config().model, 52352).total
    mixture = run_config("--num-experts 8 --moe-router-topk 1").model
    routers = 8 * 8 * (2048 + 1)
    assert active_parameters(mixture, 52352) == dense + routers
    assert active_parameters(run_config().model, 52352) == dense


def test_bfloat16_and_its_optimizer():
    memory = plan("--use-distributed-optimizer", ranks=8).memory[0]
    parameters, routers = 1_020_231_710, 61_470
    assert memory.weights == 2 * (parameters - routers) + 4 * routers
    assert memory.gradients == 4 * parameters
    assert memory.optimizer == -(-(12 * (parameters - routers) + 8 * routers) // 8)


def test_history_is_on_the_first_rank_alone():
    memory = plan("--pipeline-model-parallel-size 4").memory
    assert memory[0].history > 0 and not any(rank.history for rank in memory[1:])
    base = plan("--pipeline-model-parallel-size 4 --recurrence base").memory
    assert base[0].history == 0
    assert [rank.activations for rank in base] == [rank.activations for rank in memory]


def test_hops_whatever_the_scheme():
    mesh, base = (plan(f"--pipeline-model-parallel-size 4 --recurrence {name}").traffic for name in ("mesh", "base"))
    assert mesh[0] == base[0]
    assert mesh[0].bytes_sent // mesh[0].messages == 4096 * 2048 * 2


def test_links_by_the_order_of_ranks():
    flags = "--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 2"
    links = {row.reason: row.link for row in plan(flags).traffic}
    assert links["tensor parallel, layers"] == "nvlink" and links["ring hops [S, B, D]"] == "network"
    assert {row.link for row in plan("--tensor-model-parallel-size 8", ranks=8).traffic} == {"nvlink"}


def test_experts_are_reached_over_consecutive_ranks():
    flags = "--num-experts 8 --disable-bias-linear --expert-model-parallel-size 4 --context-parallel-size 4"
    tensor = "--tensor-model-parallel-size 2 --sequence-parallel"
    (row,) = (row for row in plan(f"{flags} {tensor}").traffic if row.reason.startswith("expert parallel"))
    assert row.link == "nvlink"  # EP 4 x ETP 2, wherever the context-parallel ranks are
    (row,) = (row for row in plan(f"{flags} {tensor}").traffic if row.reason.startswith("expert tensor"))
    state = 4096 // 4 // 2 * 2048 * 2  # bytes of one [S, B, D]; two copies go, their outputs come back in float32
    assert row.bytes_sent == row.messages // 2 * (2 * state + 2 * 2 * state)


def test_recompute_choices():
    choices = {name: plan("--micro-batch-size 4").fullest_with(name) for name in (None, "selective", "full")}
    assert choices["full"].activations < choices["selective"].activations < choices[None].activations
    assert choices["full"].weights == choices[None].weights and choices["full"].working > 0


def test_masks_of_documents_are_kept_by_every_layer_or_once():
    """[B, 1, S, S] in bfloat16 as it is added to scores; where attention runs again, the mask itself."""
    positions = 2 * 4096 * 4096
    for recompute, kept in ((None, 24 * positions * 2), ("selective", positions), ("full", positions)):
        plain, masked = (
            plan(f"--micro-batch-size 2 {flag}").fullest_with(recompute) for flag in ("", "--reset-attention-mask")
        )
        assert masked.activations - plain.activations == kept
        assert masked.working - plain.working == (positions * 2 if recompute == "full" else 0)


def test_groups_that_are_recomputed_end_with_their_chunk():
    ring = "--pipeline-model-parallel-size 4 --micro-batch-size 4 --recompute-granularity full"
    memory = {n: plan(f"{ring} --recompute-num-layers {n}").memory for n in (1, 2, 32)}
    assert memory[32] == memory[2]  # no chunk has more than two layers
    assert memory[2][1].working == 2 * memory[1][1].working
    assert memory[2][1].activations < memory[1][1].activations


def test_what_cannot_start_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="--padded-vocab-size 52352 does not divide by .* 3"):
        plan("--tensor-model-parallel-size 3 --num-attention-heads 12 --hidden-size 3072 --kv-channels 256", ranks=96)
    with pytest.raises(ValueError, match="start a multiple of 8 ranks"):
        plan("--pipeline-model-parallel-size 8", ranks=4)
    with pytest.raises(
        ValueError, match="--gpu v100: the table has a100, h100, h200, b200.* mesh_megatron/planning/gpus.yaml"
    ):
        gpu_named("v100")


def test_the_table_of_gpus_names_its_sources():
    for gpu in known_gpus().values():
        assert "data sheet" in gpu.source and gpu.memory_gb > 0 and gpu.bf16_tflops > gpu.fp32_tflops
