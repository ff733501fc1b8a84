"""Settings that are given but have no effect beside the others; a run warns of them and goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

from mesh_megatron.config.bounds import flag
from mesh_megatron.config.recurrence import scheme_spec
from mesh_megatron.config.run import RunConfig

Test = Callable[[RunConfig], bool]


def _scheme_has(setting: str) -> Test:
    return lambda run: setting in scheme_spec(run.model).settings()


def _is(group: str, setting: str, *values: Any) -> Test:
    return lambda run: getattr(getattr(run, group), setting) in values


def _given_one(group: str, *settings: str) -> Test:
    return lambda run: any(getattr(getattr(run, group), setting) for setting in settings)


def _has_biased_routers(run: RunConfig) -> bool:
    return run.model.router_init != "uniform" or not _scheme_has("num_memory_slots")(run)


def _has_routers(run: RunConfig) -> bool:
    return any(name.startswith("router") for name in scheme_spec(run.model).parameters())


_HERE = "with --recurrence {model.recurrence}"
_DECAY = "with --lr-decay-style {training.lr_decay_style}"
_OPTIMIZER = "with --optimizer {training.optimizer}"
_TOKENIZER = "with --tokenizer-type {data.tokenizer_type}"
_MEMORY = (
    "num_memory_slots router_init router_bias router_input router_gate router_temperature router_scale router_preset "
    "memory_kernel"
)
_NEEDS: tuple[tuple[str, Test, str], ...] = (
    (_MEMORY, _scheme_has("num_memory_slots"), _HERE),
    ("router_bias", _has_biased_routers, "with --router-init uniform"),
    ("router_init_std router_lr_mult router_wd_mult", _has_routers, _HERE),
    (
        "exit_entropy_coeff router_z_loss router_entropy_loss",
        lambda run: not run.model.exit_gate_only,
        "with --exit-gate-only",
    ),
    ("decay_input", _scheme_has("decay_input"), _HERE),
    ("hyper_lanes", _scheme_has("hyper_lanes"), _HERE),
    ("exit_gate share_kv_across_loops", lambda run: run.model.segments.loops > 1, "with --layout {model.layout}"),
    ("moe_*", lambda run: run.model.num_experts is not None, "without --num-experts"),
    (
        "moe_aux_loss_coeff",
        lambda run: run.model.num_experts is None or run.model.moe_router_load_balancing_type != "none",
        "with --moe-router-load-balancing-type none",
    ),
    (
        "moe_router_bias_update_rate",
        lambda run: run.model.num_experts is None or run.model.moe_router_enable_expert_bias,
        "without --moe-router-enable-expert-bias",
    ),
    (
        "moe_router_pre_softmax",
        lambda run: run.model.num_experts is None or run.model.moe_router_score_function == "softmax",
        "with --moe-router-score-function {model.moe_router_score_function}",
    ),
    ("exit_improvement_*", _given_one("model", "exit_gate_only"), "without --exit-gate-only"),
    (
        "make_vocab_size_divisible_by",
        _is("model", "padded_vocab_size", None),
        "with --padded-vocab-size {model.padded_vocab_size}",
    ),
    ("vocab_size", _is("data", "tokenizer_type", "NullTokenizer", "TikTokenizer"), _TOKENIZER),
    ("tiktoken_*", _is("data", "tokenizer_type", "TikTokenizer"), _TOKENIZER),
    ("tokenizer_hf_*", _is("data", "tokenizer_type", "HuggingFaceTokenizer"), _TOKENIZER),
    ("split", lambda run: not run.data.per_split, "with paths for each split"),
    ("multiple_validation_sets", _given_one("data", "valid_data_path"), "without --valid-data-path"),
    ("rope_scaling_factor", lambda run: run.model.use_rope_scaling, "without --use-rope-scaling"),
    ("muon_*", _is("training", "optimizer", "muon"), _OPTIMIZER),
    ("adam_*", _is("training", "optimizer", "adam", "muon"), _OPTIMIZER),
    ("sgd_momentum", _is("training", "optimizer", "sgd"), _OPTIMIZER),
    (
        "weight_decay",
        _is("training", "weight_decay_incr_style", "constant"),
        "with --weight-decay-incr-style {training.weight_decay_incr_style}",
    ),
    ("lr_wsd_*", lambda run: run.training.lr_decay_style == "WSD", _DECAY),
    ("min_lr decoupled_min_lr", lambda run: run.training.lr_decay_style != "constant", _DECAY),
    ("loss_scale *_loss_scale loss_scale_window", lambda run: run.training.fp16, "without --fp16"),
    ("disable_bf16_reduced_precision_matmul", lambda run: run.training.bf16, "without --bf16"),
    (
        "initial_loss_scale min_loss_scale loss_scale_window",
        lambda run: run.training.loss_scale is None or not run.training.fp16,
        "with --loss-scale {training.loss_scale}",
    ),
    ("error_injection_type", _given_one("training", "error_injection_rate"), "without --error-injection-rate"),
    ("loss_spike_window", lambda run: run.training.loss_spike_factor is not None, "without --loss-spike-factor"),
    (
        "recompute_method recompute_num_layers",
        lambda run: run.parallel.recompute_granularity == "full",
        "without --recompute-granularity full",
    ),
    (
        "recompute_modules",
        lambda run: run.parallel.recompute_granularity == "selective",
        "without --recompute-granularity selective",
    ),
    (
        "ddp_bucket_size",
        lambda run: run.parallel.overlap_grad_reduce or run.parallel.use_torch_fsdp2,
        "without --overlap-grad-reduce",
    ),
    ("ddp_bucket_size", lambda run: not run.parallel.use_torch_fsdp2, "with --use-torch-fsdp2"),
    (
        "attention_backend",
        lambda run: run.parallel.transformer_impl != "local" or run.parallel.attention_backend == "local",
        "with --transformer-impl local",
    ),
    ("keep_last async_save no_save_*", _given_one("checkpoint", "save"), "without --save"),
    ("ckpt_step no_load_* verify_checkpoint", _given_one("checkpoint", "save", "load"), "without --load or --save"),
    ("timing_log_option", _given_one("logging", "timing_log_level"), "without --timing-log-level"),
    ("wandb_exp_name", _given_one("logging", "wandb_project"), "without --wandb-project"),
    ("profile_*", _given_one("logging", "profile"), "without --profile"),
)
"""Fields, by name or pattern; the test of a run in which they have an effect; what to say where it fails."""


def settings_without_effect(run: RunConfig) -> list[str]:
    """Return a line for each cause, with the flags and values that differ from their defaults."""
    given = dict(_given(run))
    lines = []
    for patterns, has_effect, where in _NEEDS:
        names = [name for name in given if any(fnmatchcase(name, pattern) for pattern in patterns.split())]
        if names and not has_effect(run):
            verb = "has" if len(names) == 1 else "have"
            shown = ", ".join(_shown(name, given[name]) for name in names)
            lines.append(f"{shown} {verb} no effect {where.format(**vars(run))}")
    return lines


def _given(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of all groups that differ from their defaults."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _given(value)
        elif value != field.default:
            yield field.name, value


def _shown(name: str, value: Any) -> str:
    words = value if isinstance(value, tuple) else () if value is True else (value,)
    return " ".join([flag(name), *map(str, words)])
