"""Settings that cannot work are refused with flag, value and fix; the rest resolves as documented."""

import dataclasses

import pytest

from mesh_megatron.config.cli import from_dict
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig


def settings(**groups) -> RunConfig:
    base = {"dry_run": True, "training": {"train_iters": 10}}
    for name, values in groups.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return from_dict(RunConfig, base, "test")


BAD = [
    ({"model": {"hidden_size": 100}}, 1, "--hidden-size 100 does not divide into --num-attention-heads 12: use 96"),
    ({"model": {"num_query_groups": 5}}, 1, "--num-query-groups 5 does not divide --num-attention-heads 12"),
    ({"model": {"num_memory_slots": 0}}, 1, "--num-memory-slots 0: must be at least 1"),
    ({"model": {"layout": "4+8R0+4"}}, 1, "the core must run at least once; use R1 or more"),
    (
        {"model": {"layout": "24", "recurrence": "vanilla", "loop_norm": True}},
        1,
        "--loop-norm with --layout 24: a plain",
    ),
    ({"model": {"layout": "4+8+8+4", "per_loop_norms": True}}, 1, "--per-loop-norms with --layout 4\\+8\\+8\\+4"),
    (
        {"model": {"per_loop_norms": True}, "fp8": {"fp8_format": "hybrid"}, "training": {"bf16": True}},
        1,
        "--per-loop-norms",
    ),
    ({"model": {"layout": "4+8+8+4", "loop_lora_rank": 4}}, 1, "--loop-lora-rank 4 with --layout 4\\+8\\+8\\+4"),
    (
        {"model": {"layout": "24", "recurrence": "vanilla", "loop_lora_rank": 4}},
        1,
        "--loop-lora-rank 4 with --layout 24",
    ),
    ({"model": {"loop_lora_rank": 0}}, 1, "--loop-lora-rank 0: must be at least 1"),
    ({"model": {"loop_lora_rank": 769}}, 1, "--loop-lora-rank 769: must be at most --hidden-size 768"),
    ({"model": {"loop_lora_rank": 4, "num_experts": 4}}, 1, "--loop-lora-rank 4 does not work with --num-experts 4"),
    (
        {"model": {"loop_lora_rank": 4}, "fp8": {"fp8_format": "hybrid"}, "training": {"bf16": True}},
        1,
        "--loop-lora-rank 4 does not work with Transformer Engine",
    ),
    (
        {"model": {"layout": "24", "recurrence": "vanilla", "share_kv_across_loops": True}},
        1,
        "--share-kv-across-loops with --layout 24 and --recurrence vanilla: only loops of a shared core",
    ),
    (
        {"model": {"layout": "4+8+8+4", "share_kv_across_loops": True}},
        1,
        "--share-kv-across-loops with --layout 4\\+8\\+8\\+4",
    ),
    (
        {"model": {"share_kv_across_loops": True}, "fp8": {"fp8_format": "hybrid"}, "training": {"bf16": True}},
        1,
        "--share-kv-across-loops does not work with Transformer Engine",
    ),
    (
        {"model": {"share_kv_across_loops": True}, "loops": {"backprop_loops": 1}},
        1,
        "--backprop-loops 1 with --share-kv-across-loops: the first loop",
    ),
    ({"model": {"recurrence": "hyper", "hyper_lanes": 0}}, 1, "--hyper-lanes 0: must be at least 1"),
    ({"model": {"layout": "24"}}, 1, "--recurrence mesh with --layout 24: a plain model has no loop"),
    ({"model": {"rotary_percent": 0.01}}, 1, "--rotary-percent 0.01 rotates 0 of 64 channels"),
    ({"parallel": {"recompute_method": "block"}}, 1, "--recompute-method block needs --recompute-granularity full"),
    (
        {"parallel": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
        1,
        "--recompute-modules moe needs --num-experts",
    ),
    (
        {"model": {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}},
        1,
        "--use-rope-scaling and --rotary-seq-len-interpolation-factor: .* give one",
    ),
    (
        {"model": {"moe_shared_expert_intermediate_size": 64}},
        1,
        "--moe-shared-expert-intermediate-size 64 needs --num-experts",
    ),
    (
        {"model": {"num_experts": 8, "moe_shared_expert_intermediate_size": 64}},
        1,
        "--moe-shared-expert-intermediate-size needs --disable-bias-linear: add it",
    ),
    ({"model": {"num_experts": 8, "moe_router_num_groups": 4}}, 1, "--moe-router-group-topk belong together"),
    (
        {"model": {"num_experts": 8, "moe_router_num_groups": 3, "moe_router_group_topk": 1}},
        1,
        "--moe-router-num-groups 3: must divide --num-experts 8",
    ),
    (
        {"model": {"num_experts": 8, "moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 1}},
        1,
        "--moe-router-topk 4: must be a multiple of --moe-router-group-topk 1 and at most 2",
    ),
    (
        {"training": {"step_batch_size_schedule": ["0:8", "1K:4"]}},
        1,
        "--step-batch-size-schedule 0:8 1K:4: begin with 0:SEQUENCES; tokens and sequences must grow",
    ),
    ({"training": {"step_batch_size_schedule": [f"0:{'9' * 400}"]}}, 1, "9: must be TOKENS:SEQUENCES"),
    ({"training": {"step_batch_size_schedule": ["8"]}}, 1, "--step-batch-size-schedule 8: must be TOKENS:SEQUENCES"),
    (
        {"training": {"step_batch_size_schedule": ["0:4 1K:8"], "global_batch_size": 16}},
        1,
        "--global-batch-size 16 is not the last batch of --step-batch-size-schedule 0:4 1K:8: drop it",
    ),
    (
        {"training": {"step_batch_size_schedule": ["0:3 1K:8"], "micro_batch_size": 2}},
        1,
        "--step-batch-size-schedule 0:SEQUENCES 3 does not divide .* use 2 or 4",
    ),
    ({"model": {"hidden_dropout": 1.0}}, 1, "--hidden-dropout 1.0: must be at least 0 and below 1"),
    *(
        (
            {"model": {"attention_dropout": 0.1}, "parallel": {"attention_backend": backend}},
            1,
            f"--attention-dropout 0.1 with --attention-backend {backend}: .* use --attention-backend local",
        )
        for backend in ("flash", "fused", "unfused")
    ),
    ({"parallel": {"tensor_model_parallel_size": 5}}, 5, "--num-attention-heads 12 does not divide by --tensor"),
    ({"parallel": {"sequence_parallel": True}}, 1, "--sequence-parallel needs --tensor-model-parallel-size above 1"),
    ({"parallel": {"pipeline_model_parallel_size": 2}}, 3, "3 ranks cannot hold .* start a multiple of 2 ranks"),
    ({"parallel": {"overlap_param_gather": True}}, 1, "--overlap-param-gather needs --use-distributed-optimizer"),
    ({"training": {"global_batch_size": 6, "micro_batch_size": 4}}, 1, "--global-batch-size 6 .* use 4 or 8"),
    (
        {"parallel": {"pipeline_model_parallel_size": 4}, "training": {"global_batch_size": 24, "micro_batch_size": 8}},
        4,
        "--global-batch-size 24 gives 3 micro-batches; .* needs a multiple of 4: use 32",
    ),
    (
        {"dry_run": False, "data": {"mock_data": True}, "training": {"train_iters": None}},
        1,
        "give --train-iters, --train-samples or --train-tokens",
    ),
    ({"training": {"train_samples": 5}}, 1, "--train-iters and --train-samples contradict"),
    ({"training": {"lr_warmup_init": 1.0}}, 1, "--lr-warmup-init 1.0: must be at most --lr"),
    ({"training": {"decoupled_min_lr": 0.0}}, 1, "--decoupled-min-lr 0.0 needs --decoupled-lr: add it"),
    (
        {"training": {"decoupled_min_lr": 1.0, "decoupled_lr": 0.5}},
        1,
        "--decoupled-min-lr 1.0: must be at most --decoupled-lr 0.5",
    ),
    ({"training": {"seed": -1}}, 1, "--seed -1: must be at least 0 and at most 4294967295"),  # numpy's
    ({"training": {"seed": 2**32}}, 1, "--seed 4294967296: must be at least 0 and at most 4294967295"),
    ({"training": {"train_iters": 10**400}}, 1, "--train-iters 10{400}: must be finite and at least 1"),
    ({"training": {"lr_warmup_iters": 10}}, 1, "--lr-warmup-iters 10: must be below --train-iters 10"),
    (
        {"training": {"lr_warmup_iters": 10, "lr_decay_iters": 9}},
        1,
        "--lr-warmup-iters 10: must be below --lr-decay-iters 9, where the decay ends",
    ),
    (
        {"training": {"train_iters": None, "train_samples": 64, "lr_warmup_samples": 65}},
        1,
        "--lr-warmup-samples 65: must be below --train-samples 64",
    ),
    ({"model": {"max_position_embeddings": 100}}, 1, "--max-position-embeddings 100 is below --seq-length 2048"),
    (
        {"parallel": {"expert_tensor_parallel_size": 2}},
        2,
        "--expert-tensor-parallel-size 2 needs --num-experts: set it or drop the flag",
    ),
    (
        {
            "model": {"num_experts": 4, "disable_bias_linear": True},
            "parallel": {"expert_tensor_parallel_size": 2},
        },
        3,
        "--expert-tensor-parallel-size 2 does not divide the 3 ranks of a pipeline stage",
    ),
    ({"training": {"lr_decay_iters": 5, "lr_decay_samples": 5}}, 1, "--lr-decay-iters and --lr-decay-samples contrad"),
    ({"training": {"end_weight_decay": 0.1}}, 1, "need --weight-decay-incr-style linear or cosine"),
    (
        {"training": {"weight_decay_incr_style": "linear", "start_weight_decay": 0.1}},
        1,
        "--weight-decay-incr-style linear needs --start-weight-decay .* found 0.1 and None",
    ),
    ({"parallel": {"grad_reduce_in_bf16": True}}, 1, "--grad-reduce-in-bf16 needs --bf16"),
    ({"checkpoint": {"exit_on_missing_checkpoint": True}}, 1, "--exit-on-missing-checkpoint needs --load"),
    ({"training": {"bf16": True, "fp16": True}}, 1, "--bf16 and --fp16 contradict"),
    (
        {"training": {"fp16": True, "initial_loss_scale": 1e-6}},
        1,
        "--initial-loss-scale 1e-06 is below --min-loss-scale 6.10352e-05: raise the first or lower the second",
    ),
    ({"training": {"router_lr_mult": -1.0}}, 1, "--router-lr-mult -1.0: must be 0"),
    ({"training": {"min_lr": 1.0}}, 1, "--min-lr 1.0: must be at most --lr"),
    ({"training": {"rampup_batch_size": [4, 3, 9], "global_batch_size": 8}}, 1, "does not reach --global-batch-size 8"),
    (
        {"dry_run": False, "data": {"mock_data": True}, "checkpoint": {"save_interval": 5}},
        1,
        "--save-interval 5 needs --save",
    ),
    ({"checkpoint": {"save_retain_interval": 6}}, 1, "--save-retain-interval 6 needs --keep-last"),
    (
        {"checkpoint": {"save": "x", "save_interval": 4, "keep_last": 1, "save_retain_interval": 6}},
        1,
        "--save-retain-interval 6: must be a multiple of --save-interval 4: use 8",
    ),
    ({"logging": {"log_interval": 0}}, 1, "--log-interval 0: must be at least 1"),
    ({"dry_run": False}, 1, "no data: give --data-path"),
    (
        {"dry_run": False, "data": {"data_path": ["nowhere/at_all"]}},
        1,
        "--data-path nowhere/at_all: neither nowhere/at_all.bin",
    ),
]


@pytest.mark.parametrize(("groups", "ranks", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_refused_before_any_rank_starts(groups, ranks, message):
    with pytest.raises(ValueError, match=message):
        settings(**groups).validate(ranks)


def test_a_dry_run_needs_no_folder():
    settings(checkpoint={"save_interval": 50}).validate(1)
    with pytest.raises(ValueError, match="--save-interval 50 needs --save"):
        settings(dry_run=False, data={"mock_data": True}, checkpoint={"save_interval": 50}).validate(1)


@pytest.mark.parametrize("split", ["a,b,c", "0,0,0", "-1,2,3", "1,2,3,4"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_dry_run_checks_the_split(split, dry_run):
    with pytest.raises(ValueError, match=f"--split {split}: write up to three numbers"):
        settings(dry_run=dry_run, data={"mock_data": True, "split": split}).validate(1)


def test_warmups_in_another_unit_than_the_decay_wait_for_the_course_of_the_run():
    settings(training={"lr_warmup_iters": 50, "lr_decay_samples": 1000}).validate(1)
    settings(training={"train_iters": None, "train_tokens": 2**20, "lr_warmup_iters": 50}).validate(1)
    settings(training={"lr_warmup_iters": 9, "lr_warmup_fraction": None}).validate(1)


def test_a_dry_run_needs_no_transformer_engine(monkeypatch):
    """It plans on a machine without a GPU what runs on others."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    engine = {"transformer_impl": "transformer_engine"}
    settings(parallel=engine).validate(1)
    with pytest.raises(ValueError, match="Transformer Engine is not installed"):
        settings(dry_run=False, data={"mock_data": True}, parallel=engine).validate(1)


def test_a_dry_run_needs_no_length():
    settings(training={"train_iters": None}).validate(1)


def test_what_is_right_passes():
    settings(training={"fp16": True, "loss_scale": 8.0, "initial_loss_scale": 1e-6}).validate(1)
    settings(training={"global_batch_size": 8}, parallel={"pipeline_model_parallel_size": 4}).validate(8)


def test_vanilla_names_set_sharing_and_scheme():
    plain, both = ModelConfig(recurrence="vanilla"), ModelConfig(recurrence="vanilla+mesh")
    assert (plain.scheme, plain.segments.shared) == ("base", False)
    assert (both.scheme, both.segments.shared) == ("mesh", False)
    assert ModelConfig(recurrence="mesh", layout="2+4+4+2").segments == both.segments
    assert ModelConfig(layout="3+6R3+3").memory_slots == 6


def test_vocabulary_is_padded_or_set():
    assert ModelConfig().padded_vocabulary(4097) == 4224
    assert ModelConfig(padded_vocab_size=52352).padded_vocabulary(50257) == 52352
    with pytest.raises(ValueError, match="--padded-vocab-size 100 is smaller than the tokenizer's vocabulary of 101"):
        ModelConfig(padded_vocab_size=100).padded_vocabulary(101)
    with pytest.raises(ValueError, match="give --padded-vocab-size or --tokenizer-type"):
        ModelConfig().padded_vocabulary(None)


def test_length_of_training_however_it_is_given():
    assert TrainingConfig(train_iters=7).total_iters(2, 128) == 7
    assert TrainingConfig(train_samples=100, global_batch_size=8).total_iters(2, 128) == 12
    assert TrainingConfig(train_tokens=128 * 100, global_batch_size=8).total_iters(2, 128) == 12


def test_length_in_sequences_is_kept_when_the_batch_changes():
    training = TrainingConfig(train_samples=80, global_batch_size=8)
    assert training.total_iters(1, 128, iteration=10, consumed=40) == 15
    assert training.samples_after(5, 8, 1, consumed=40) == 80
    ramped = dataclasses.replace(training, global_batch_size=16, rampup_batch_size=(4, 4, 40))
    assert ramped.total_iters(1, 128, iteration=3, consumed=12) == 3 + 6  # of 4 8 8 12 16 16, and 4 are left over
    assert ramped.samples_after(6, 16, 1, consumed=12) == 76
    assert training.total_iters(1, 128, iteration=30, consumed=96) == 30


def test_ramp_up_is_megatron_cores():
    from mesh_megatron.platform import device

    device.prepare()
    from megatron.core import num_microbatches_calculator

    if not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("megatron-core 0.19 grows batches in another way")
    training = TrainingConfig(train_samples=400, global_batch_size=16, rampup_batch_size=(4, 4, 100))
    theirs = num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator(16, 2, 2, False, 0, 4, 4, 100)
    consumed = steps = 0
    while True:
        theirs.update(consumed, consistency_check=False)
        size = training.ramped_batch_size(consumed, 16, 1)
        assert size == theirs.get_current_global_batch_size()
        if consumed + size > 400:
            break
        consumed, steps = consumed + size, steps + 1
    assert training.total_iters(2, 1) == steps
    assert training.samples_after(steps, 16, 1) == consumed


def test_groups_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().model.hidden_size = 3


@pytest.mark.parametrize("words", [("0:4", "0.16K:8", "400:16"), ("0:4 0.16K:8,400:16",)])
def test_the_batch_grows_at_tokens(words):
    """As Megatron-Core's calculator has it: from the first step on that begins at or after that many tokens."""
    training = TrainingConfig(train_samples=200, step_batch_size_schedule=words)
    training.validate()
    assert training.batch_size(1) == 16
    consumed, sizes = 0, []
    while consumed < 100:
        sizes.append(training.ramped_batch_size(consumed, 16, seq_length=10))
        consumed += sizes[-1]
    assert sizes == [4] * 4 + [8] * 3 + [16] * 4
    assert training.samples_after(8, 16, 10) == 56 and training.total_iters(1, 10) == 7 + (200 - 40) // 16
