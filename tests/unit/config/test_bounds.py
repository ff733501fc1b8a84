"""Numbers that no run can use are refused with flag, value and bounds."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
from test_run import settings

from mesh_megatron.config import cli
from mesh_megatron.config.bounds import Bounds, Count, _bounds_in, check_bounds
from mesh_megatron.config.run import RunConfig

UNBOUNDED = {"seed", "num_experts"}  # any seed will do; experts are checked with what else they need

REFUSED = [
    ("model", "hidden_size", 0, "at least 1"),
    ("model", "ffn_hidden_size", 0, "at least 1"),
    ("model", "num_query_groups", 0, "at least 1"),
    ("model", "kv_channels", -1, "at least 1"),
    ("model", "norm_epsilon", 0.0, "above 0"),
    ("model", "rotary_percent", 1.5, "above 0 and at most 1"),
    ("model", "rotary_base", 0, "at least 1"),
    ("model", "init_method_std", -1.0, "at least 0"),
    ("model", "router_bias", float("nan"), "a finite number"),
    ("parallel", "distributed_timeout_minutes", -1.0, "above 0"),
    ("parallel", "ddp_bucket_size", 0, "at least 1"),
    ("training", "lr", float("inf"), "finite and above 0"),
    ("training", "lr", float("nan"), "finite and above 0"),
    ("training", "lr_warmup_iters", -5, "at least 0"),
    ("training", "lr_warmup_samples", -2, "at least 0"),
    ("training", "lr_decay_iters", 0, "at least 1"),
    ("training", "lr_wsd_decay_iters", 0, "at least 1"),
    ("training", "clip_grad", -1.0, "0 (no clipping) or more"),
    ("training", "weight_decay", -1.0, "at least 0"),
    ("training", "adam_beta1", 2.0, "at least 0 and below 1"),
    ("training", "adam_eps", 0.0, "above 0"),
    ("training", "loss_scale_window", 0, "at least 1"),
    ("training", "manual_gc_interval", -3, "0 (leave it to Python) or more"),
    ("logging", "log_interval", 0, "at least 1"),
    ("logging", "profile_ranks", (0, -1), "at least 0"),
]


@pytest.mark.parametrize(("group", "name", "value", "bounds"), REFUSED)
def test_refused_with_flag_value_and_bounds(group, name, value, bounds):
    number = value[-1] if isinstance(value, tuple) else value
    run = settings()
    run = dataclasses.replace(run, **{group: dataclasses.replace(getattr(run, group), **{name: value})})
    with pytest.raises(ValueError) as refused:
        run.validate(1)
    assert str(refused.value) == f"--{name.replace('_', '-')} {number}: must be {bounds}"


def test_every_number_of_a_run_has_bounds():
    groups = [group.default_factory for group in fields(RunConfig) if dataclasses.is_dataclass(group.default_factory)]
    for cls in (RunConfig, *groups):
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            if re.search(r"\b(int|float)\b", repr(hint)) and name not in UNBOUNDED:
                assert list(_bounds_in(hint)), f"{cls.__name__}.{name}"


@dataclass(frozen=True)
class Numbers:
    count: Count = 1
    maybe: Annotated[float, Bounds(above=0, below=1)] | None = None
    several: tuple[Count, ...] = ()
    word: str = "any"


def test_alternatives_and_items_are_checked():
    check_bounds(Numbers())
    check_bounds(Numbers(maybe=0.5, several=(1, 2)))
    for bad in (Numbers(count=0), Numbers(maybe=0.0), Numbers(maybe=1.0), Numbers(several=(1, 0))):
        with pytest.raises(ValueError, match="must be"):
            check_bounds(bad)


def test_a_tools_command_line_is_refused(capsys):
    assert cli.parse(Numbers, ["--maybe", "0.25", "--several", "3", "4"]) == Numbers(maybe=0.25, several=(3, 4))
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Numbers, ["--several", "3", "-4"], prog="tool.py")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "tool.py: error: --several -4: must be at least 1\n"
