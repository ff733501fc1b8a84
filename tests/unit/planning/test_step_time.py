"""Predicted times against closed forms: what a step takes where only one thing does."""

from dataclasses import replace

import pytest

from mesh_megatron.config import cli
from mesh_megatron.config.bounds import check_bounds
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.duration import duration
from mesh_megatron.planning.flops import training_flops_per_token
from mesh_megatron.planning.fully_sharded import gathered_bytes, step_traffic
from mesh_megatron.planning.hardware import Assumptions, Links, gpu_named
from mesh_megatron.planning.pipeline_schedule import Pass, RingTimes, bubble, order_of_work, replay
from mesh_megatron.planning.search import micro_batches
from mesh_megatron.planning.step_time import StepModel
from mesh_megatron.planning.summary import summary_of
from mesh_megatron.planning.traffic import layer_collectives, traffic_of_step

ROWS = 52352
IDEAL = Assumptions(
    matmul_efficiency=1, fp8_matmul_efficiency=1, attention_efficiency=1, memory_efficiency=1, link_efficiency=1,
    nvlink_latency_us=0, network_latency_us=0, layer_launch_us=0,
)  # fmt: skip
H100 = gpu_named("h100")
PRODUCTS_ONLY = Links(replace(H100, memory_gb_s=1e15, nvlink_gb_s=1e15, network_gb_s=1e15), IDEAL, 8)

SLOW_LINKS = Links(replace(H100, memory_gb_s=1e15), IDEAL, 8)


def run_config(flags: str = "") -> RunConfig:
    base = "--preset pythia-1.4b --bf16 --global-batch-size 512 --train-iters 10"
    return cli.parse_run(RunConfig, PRESETS, f"{base} {flags}".split(), prog="plan.py")


def model(flags: str = "", ranks: int = 8, links: Links = PRODUCTS_ONLY) -> StepModel:
    run = run_config(flags)
    run = replace(run, dry_run=True)
    run.validate(ranks)
    return StepModel(run, ROWS, ranks, micro_batches(run, ranks), links)


@pytest.mark.parametrize("ring, micro_batches, chunks", [(2, 8, 4), (4, 8, 4), (4, 16, 5), (8, 8, 2)])
def test_the_bubble_of_an_even_ring_is_the_formulas(ring: int, micro_batches: int, chunks: int):
    work = [order_of_work(ring, stage, chunks, micro_batches) for stage in range(ring)]
    tasks = replay(work, RingTimes.of_layers([[1] * chunks] * ring))
    assert bubble(tasks) == pytest.approx((ring - 1) / (micro_batches * chunks + ring - 1))


def one_micro_batch(ring: int, chunks: int, times: RingTimes) -> float:
    order = [Pass("F", chunk, 0) for chunk in range(chunks)] + [Pass("B", c, 0) for c in reversed(range(chunks))]
    return max(task.stop for task in replay([order] * ring, times))


@pytest.mark.parametrize("overlapped", [True, False])
def test_a_single_micro_batch_pays_for_every_hop(overlapped: bool):
    ring, chunks, hop = 3, 4, 0.25
    times = RingTimes([[1.0] * chunks] * ring, [[2.0] * chunks] * ring, [hop] * ring, overlapped)
    assert one_micro_batch(ring, chunks, times) == pytest.approx(ring * chunks * 3 + 2 * (ring * chunks - 1) * hop)


def test_links_between_nodes_are_paid_where_they_are():
    times = RingTimes([[1.0, 1.0]] * 2, [[2.0, 2.0]] * 2, [0.5, 4.0])
    assert one_micro_batch(2, 2, times) == pytest.approx(2 * 2 * 3 + 2 * (0.5 + 4.0 + 0.5))


def test_slow_links_make_messages_queue():
    """Messages that take longer than passes set the pace: m of them, one after the other, on each way."""
    ring, count, hop = 2, 6, 10.0
    orders = [[Pass("F", 0, i) for i in range(count)] + [Pass("B", 0, i) for i in range(count)]] * ring
    tasks = replay(orders, RingTimes([[1.0]] * 2, [[2.0]] * 2, [hop, hop]))
    last_forward = max(task.stop for task in tasks if task.kind == "F")
    assert last_forward == pytest.approx(1 + count * hop + 1)


def test_products_alone_are_the_flops_over_the_peak():
    flops = training_flops_per_token(run_config().model, ROWS)
    attention = flops.attention * 3.5 / 3  # a backward pass that computes scores again
    expected = (flops.projections + flops.feed_forward + flops.logits + attention) * 512 * 4096
    assert model().simulated().total == pytest.approx(expected / (8 * H100.bf16_tflops * 1e12), rel=1e-6)


def test_efficiencies_divide_their_own_part():
    whole = model().simulated()
    half = Links(PRODUCTS_ONLY.gpu, replace(IDEAL, matmul_efficiency=0.5), 8)
    assert model(links=half).simulated().busiest.products == pytest.approx(2 * whole.busiest.products)
    assert model(links=half).simulated().busiest.attention == pytest.approx(whole.busiest.attention)


def test_full_recompute_is_one_more_forward_pass_of_the_layers():
    plain, again = (model(flags).simulated().busiest for flags in ("", "--recompute-granularity full"))
    head = 6 * 2048 * ROWS * 64 * 4096 / (H100.bf16_tflops * 1e12)
    assert again.products - head == pytest.approx((plain.products - head) * 4 / 3)
    assert again.attention == pytest.approx(plain.attention * 4.5 / 3.5)


def test_tensor_parallel_ranks_share_the_products():
    plain = model(ranks=8).simulated().busiest
    shared = model("--tensor-model-parallel-size 8 --sequence-parallel").simulated().busiest
    assert shared.products == pytest.approx(plain.products)
    assert shared.attention == pytest.approx(plain.attention)


def test_eight_bits_double_the_layers_products_alone():
    plain, fp8 = (model(flags).simulated().busiest for flags in ("", "--fp8-format hybrid"))
    head = 6 * 2048 * ROWS * 64 * 4096 / (H100.bf16_tflops * 1e12)
    ratio = H100.fp8_tflops / H100.bf16_tflops
    assert fp8.products - head == pytest.approx((plain.products - head) / ratio)
    core = model("--fp8-format hybrid --fp8-core-only").simulated().busiest
    assert core.products - head == pytest.approx((plain.products - head) * (1 / 3 + 2 / 3 / ratio))
    with pytest.raises(ValueError, match="--fp8-format hybrid: NVIDIA A100"):
        _ = model("--fp8-format hybrid", links=Links(gpu_named("a100"), IDEAL, 8)).least


def test_the_optimizer_is_bound_by_memory_and_shared():
    slow = Links(replace(H100, nvlink_gb_s=1e15, network_gb_s=1e15), IDEAL, 8)
    alone = model("--micro-batch-size 4", links=slow).simulated().optimizer
    parameters = 1_020_231_710
    assert alone == pytest.approx(parameters * (32 + 2 + 4) / (H100.memory_gb_s * 1e9))
    shared = model("--micro-batch-size 4 --use-distributed-optimizer", links=slow).simulated().optimizer
    assert shared == pytest.approx(parameters * (34 / 8 + 4) / (H100.memory_gb_s * 1e9))


def test_muon_adds_the_products_of_newton_schulz_and_saves_a_moment():
    fast = Links(replace(H100, nvlink_gb_s=1e15, network_gb_s=1e15), IDEAL, 8)
    adam = model("--optimizer adam", links=fast).simulated().optimizer
    hidden, width, layers = 2048, 8192, 16
    parts = 4 * 6 * hidden**3 + 2 * (4 * hidden**2 * width + 2 * hidden**3)  # four square matrices, two wide
    matrices = 4 * hidden**2 + 2 * hidden * width
    saved = layers * matrices * 8 / (H100.memory_gb_s * 1e9)
    for precision, rate in (("high", H100.fp32_tflops), ("medium", H100.bf16_tflops)):
        muon = model(f"--optimizer muon --muon-fp32-matmul-prec {precision}", links=fast).simulated().optimizer
        assert muon == pytest.approx(adam - saved + layers * 5 * parts / (rate * 1e12))
    shared = model("--optimizer muon --use-distributed-optimizer", links=fast).simulated().optimizer
    adam = model("--optimizer adam --use-distributed-optimizer", links=fast).simulated().optimizer
    assert shared == pytest.approx(adam + (layers * 5 * parts / (H100.fp32_tflops * 1e12) - saved) / 8)


def test_gradients_and_weights_cross_links_unless_hidden():
    time = model("--use-distributed-optimizer", links=SLOW_LINKS).simulated()
    sent = 1_020_231_710 * 7 / 8 / (H100.nvlink_gb_s * 1e9)
    assert (time.gradients, time.weights) == (pytest.approx(4 * sent), pytest.approx(2 * sent))
    overlaps = "--overlap-grad-reduce --overlap-param-gather"
    hidden = model(f"--use-distributed-optimizer {overlaps}", links=SLOW_LINKS).simulated()
    assert hidden.gradients == hidden.weights == 0
    reduced = model(links=SLOW_LINKS).simulated()
    assert reduced.gradients == pytest.approx(8 * sent) and reduced.weights == 0


def test_copies_of_shares_gather_inside_nodes_and_sum_between():
    flags = "--use-torch-fsdp2 --num-distributed-optimizer-instances 2"
    planned = model(flags, ranks=16, links=SLOW_LINKS)
    traffic, step = step_traffic(planned.run, ROWS, planned.micro_batches), planned.simulated()
    inside, between = H100.nvlink_gb_s * 1e9, H100.network_gb_s * 1e9
    assert step.weights == pytest.approx(traffic.gathered * 7 / 8 / inside)
    assert step.gradients == pytest.approx(traffic.reduced * 7 / 8 / inside + traffic.reduced / 8 / between)
    sent = {row.reason: row for row in traffic_of_step(planned.run, ROWS, 16, planned.micro_batches)}
    assert sent["data parallel, weights (all-gather)"].link == "nvlink"
    copies = sent["data parallel, gradients of copies (all-reduce)"]
    assert (copies.link, copies.messages) == ("network", traffic.reductions)
    assert copies.bytes_sent == pytest.approx(traffic.reduced / 8)


def test_core_layers_with_parameters_of_their_own_are_gathered_in_every_loop():
    """8 of 16 layers, in 2 loops, with low-rank differences of both; their gradients are reduced once a step."""
    plain, lora = (
        model(f"--use-torch-fsdp2 --layout 4+8R2+4 {flags}", ranks=8) for flags in ("", "--loop-lora-rank 8")
    )
    before, after = (step_traffic(planned.run, ROWS, planned.micro_batches) for planned in (plain, lora))
    more = 2 * 8 * (2048 + 6144 + 2048 + 2048 + 2048 + 8192 + 8192 + 2048)
    assert after.gathered - before.gathered == 2 * plain.micro_batches * 8 * 2 * more * 2
    assert after.reduced - before.reduced == 8 * more * 4
    held = gathered_bytes(lora.run, ROWS) - gathered_bytes(plain.run, ROWS)
    assert held == 2 * more * 2 + (8 + 1) * more * 4  # two layers in bfloat16, gradients of the core and of one layer


def test_every_collective_pays_its_latency_once():
    late = Links(PRODUCTS_ONLY.gpu, replace(IDEAL, nvlink_latency_us=1e6), 8)
    time = model("--use-distributed-optimizer", links=late).simulated()
    assert (time.gradients, time.weights) == (pytest.approx(7, rel=1e-3), pytest.approx(7, rel=1e-3))


def test_collectives_by_link_and_latency():
    links = Links(H100, replace(IDEAL, nvlink_latency_us=2, network_latency_us=10), 8)
    assert links.collective(45e9, 8, 1) == pytest.approx(0.1 + 7 * 2e-6)
    assert links.collective(5e9, 4, 8) == pytest.approx(0.1 + 3 * 10e-6)  # one rank a node: one adapter
    assert links.collective(40e9, 16, 1, rounds=2) == pytest.approx(0.1 + 2 * (14 * 2e-6 + 10e-6))  # eight adapters
    assert links.collective(1e9, 1, 1) == 0


@pytest.mark.parametrize("recompute, again", [("", 1), ("--recompute-granularity full", 2)])
def test_tokens_reach_experts_and_come_back(recompute: str, again: int):
    flags = "--num-experts 8 --disable-bias-linear --tensor-model-parallel-size 8 --sequence-parallel"
    experts = model(f"{flags} {recompute}", links=SLOW_LINKS).compute
    attention = layer_collectives(experts.run, experts=True, backward=False).sent(4096 * 2048 * 2, 8)
    copies = 2 * 4096 // 8 * 2048  # of two experts for each token; gathered as they are, scattered in float32
    exchange = 7 * copies * (2 + 4) / (H100.nvlink_gb_s * 1e9)
    assert experts.core_layer.forward.messages == pytest.approx(exchange + attention / (H100.nvlink_gb_s * 1e9))
    whole = model(f"{flags} {recompute} --expert-tensor-parallel-size 1", links=SLOW_LINKS).compute
    more = experts.core_layer.backward.messages - whole.core_layer.backward.messages
    assert more == pytest.approx(again * exchange)


def test_hops_inside_nodes_and_between():
    links = Links(H100, IDEAL, 8)
    assert [links.hop_is_inside(stage, 4, 8) for stage in range(4)] == [True] * 4
    assert [links.hop_is_inside(stage, 4, 16) for stage in range(4)] == [True, False, True, False]
    assert not any(links.hop_is_inside(stage, 4, 64) for stage in range(4))


def test_no_schedule_beats_the_bound_and_the_bubble_is_between():
    for flags in ("--pipeline-model-parallel-size 4", "--pipeline-model-parallel-size 8 --micro-batch-size 2"):
        ring = model(flags, ranks=64, links=Links(H100, Assumptions(), 8))
        time = ring.simulated()
        assert ring.least < time.total and 0 < time.bubble < 0.5


def test_state_passing_is_on_the_first_rank_and_costs_under_a_percent():
    mesh, base = (
        model(f"--pipeline-model-parallel-size 4 --recurrence {name}", links=Links(H100, Assumptions(), 8))
        for name in ("mesh", "base")
    )
    assert mesh.passes[1:] == base.passes[1:]
    assert 1 < mesh.simulated().total / base.simulated().total < 1.01


def test_losses_after_loops_take_a_coda_each_on_a_ring_and_a_head_each_on_its_last_rank():
    step = model("--pipeline-model-parallel-size 2 --layout 4+8R3+4 --exit-gate")
    first, last = ([chunk.forward.products for chunk in chunks] for chunks in step.passes)
    coda = 2 * step.compute.layer.forward.products
    assert first == pytest.approx([coda, *[2 * coda] * 3, 0, *[coda] * 3])
    assert last[:-1] == pytest.approx(first[:-1])
    assert last[-1] == pytest.approx(coda + 3 * step.compute.head.forward.products)


def test_a_layer_takes_no_less_than_its_launches():
    links = Links(PRODUCTS_ONLY.gpu, replace(IDEAL, layer_launch_us=1e6), 8)
    assert model(links=links).compute.layer.forward.total == pytest.approx(1)
    assert model("--recompute-granularity full", links=links).compute.layer.backward.total == pytest.approx(2)


def test_what_a_step_makes_of_a_run():
    run = run_config()
    whole = duration(summary_of(run, ROWS, 8), H100, 2.0)
    assert whole.tokens_a_second == 512 * 4096 / 2
    assert whole.days * 86400 == pytest.approx(20) and whole.gpu_hours == pytest.approx(20 / 3600 * 8)
    flops = training_flops_per_token(run.model, ROWS).total
    assert whole.mfu == pytest.approx(flops * 512 * 4096 / 2 / (8 * H100.bf16_tflops * 1e12))


def test_assumptions_are_named():
    with pytest.raises(ValueError, match="--matmul-efficiency 2"):
        check_bounds(Assumptions(matmul_efficiency=2))
    with pytest.raises(ValueError, match="--layer-launch-us -1"):
        check_bounds(Assumptions(layer_launch_us=-1))
