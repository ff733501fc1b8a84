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


def _has_routers(run: RunConfig) -> bool:
    return any(name.startswith("router") for name in scheme_spec(run.model).parameters())


_HERE = "with --recurrence {model.recurrence}"
_DECAY = "with --lr-decay-style {training.lr_decay_style}"
_MEMORY = (
    "num_memory_slots router_init router_bias router_input router_gate router_temperature router_scale router_preset "
    "memory_kernel"
)
_NEEDS: tuple[tuple[str, Test, str], ...] = (
    (_MEMORY, _scheme_has("num_memory_slots"), _HERE),
    ("router_init_std router_lr_mult router_wd_mult", _has_routers, _HERE),
    (
        "exit_entropy_coeff router_z_loss router_entropy_loss",
        lambda run: not run.model.exit_gate_only,
        "with --exit-gate-only",
    ),
    ("decay_input", _scheme_has("decay_input"), _HERE),
    ("hyper_lanes", _scheme_has("hyper_lanes"), _HERE),
    ("share_kv_across_loops", lambda run: run.model.segments.loops > 1, "with --layout {model.layout}"),
    ("moe_*", lambda run: run.model.num_experts is not None, "without --num-experts"),
    ("rope_scaling_factor", lambda run: run.model.use_rope_scaling, "without --use-rope-scaling"),
    ("muon_*", lambda run: run.training.optimizer == "muon", "with --optimizer {training.optimizer}"),
    ("lr_wsd_*", lambda run: run.training.lr_decay_style == "WSD", _DECAY),
    ("min_lr decoupled_min_lr", lambda run: run.training.lr_decay_style != "constant", _DECAY),
    ("loss_scale *_loss_scale loss_scale_window", lambda run: run.training.fp16, "without --fp16"),
    ("disable_bf16_reduced_precision_matmul", lambda run: run.training.bf16, "without --bf16"),
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
    ("profile_*", lambda run: run.logging.profile, "without --profile"),
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
