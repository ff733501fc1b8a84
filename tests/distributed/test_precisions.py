"""A checkpoint continues in another precision from its most exact weights, to the bit, under any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import BUCKETS, DISTOPT, LLAMA, OVERLAP, PP2, Case, run_config
from integration_runs import weights
from rank_pool import RankPool
from test_moe import EP2, EXPERTS
from training_runs import checkpointer_of, resumed_trainer, train_and_save

from mesh_megatron.checkpoint.folder import folder_of
from mesh_megatron.config.run import RunConfig

pytestmark = pytest.mark.full

STEPS = 3
DTYPES = {"": torch.float32, "--bf16": torch.bfloat16, "--fp16": torch.float16}
EXPERT = f"{EXPERTS} {LLAMA}"  # gated: one parameter is two tensors in a checkpoint
SMALL_SCALE = "--initial-loss-scale 16"
ONE = Case("one", 1)
DP2 = Case("dp2-distopt", 2, DISTOPT)
DP2_OVERLAP = Case("dp2-distopt-overlap-buckets", 2, f"{OVERLAP} {BUCKETS}")
RING = Case("pp2", 2, PP2)
EP_ONE = Case("experts", 1, "", EXPERT)
EP_TWO = Case("experts-ep2-distopt", 2, f"{EP2} {OVERLAP}", EXPERT)


def run_of(case: Case, precision: str, **checkpoint: object) -> RunConfig:
    run = run_config(f"{case.model} {precision} {SMALL_SCALE}", case.layout, 10)
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, **checkpoint))


def load_and_save(run: RunConfig, checkpoint: Path) -> None:
    """State of a continued run before its first step."""
    checkpointer = checkpointer_of(resumed_trainer(run, checkpoint))
    checkpointer.save()
    checkpointer.close()


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, str], Path]:
    """The checkpoint of a layout in a precision after ``STEPS`` steps; written once."""
    known: dict[tuple[str, str], Path] = {}

    def checkpoint(case: Case, precision: str) -> Path:
        if (case.name, precision) not in known:
            save = tmp_path_factory.mktemp(case.name)
            ranks.run(case.ranks, train_and_save, run_of(case, precision, save=save), STEPS)
            known[case.name, precision] = folder_of(save, STEPS)
        return known[case.name, precision]

    return checkpoint


def exact_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [name for name in tensors if not name.startswith(("optimizer.", "rng."))]
    return {name: tensors.get(f"optimizer.main.{name}", tensors[name]) for name in names}


def assert_holds(tensors: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """The weights in ``dtype`` are those rounded, and main weights are those; routers are float32 in any run."""
    assert all(tensor.dtype == torch.float32 for tensor in exact.values())
    for name, tensor in exact.items():
        kept = torch.float32 if name.startswith("recurrence.") else dtype
        assert tensors[name].dtype == kept, name
        assert torch.equal(tensors[name], tensor.to(kept)), name
        if kept != torch.float32:
            assert torch.equal(tensors[f"optimizer.main.{name}"], tensor), name


PAIRS = [
    (ONE, "--bf16", ONE, ""),
    (ONE, "--bf16", DP2, ""),
    (DP2_OVERLAP, "--bf16", ONE, ""),
    (DP2_OVERLAP, "--bf16", DP2_OVERLAP, ""),
    (RING, "--fp16", DP2, ""),
    (EP_TWO, "--bf16", EP_ONE, ""),
    (EP_ONE, "--bf16", EP_TWO, ""),
    (ONE, "", ONE, "--bf16"),
    (ONE, "", DP2_OVERLAP, "--bf16"),
    (DP2, "", RING, "--fp16"),
    (EP_ONE, "", EP_TWO, "--bf16"),
    (ONE, "--bf16", DP2, "--fp16"),
    (DP2, "--fp16", ONE, "--bf16"),
    (DP2, "--bf16", ONE, "--bf16"),
]


@pytest.mark.parametrize(
    ("source", "before", "target", "after"),
    PAIRS,
    ids=lambda value: value.name if isinstance(value, Case) else value.removeprefix("--") or "fp32",
)
def test_weights_and_main_weights_are_the_exact_ones(
    source: Case, before: str, target: Case, after: str, ranks: RankPool, saved: Callable, tmp_path: Path
) -> None:
    checkpoint = saved(source, before)
    there = weights(checkpoint)
    ranks.run(target.ranks, load_and_save, run_of(target, after, save=tmp_path), checkpoint)
    here = weights(folder_of(tmp_path, STEPS))
    exact = exact_weights(there)
    assert any(not torch.equal(tensor, tensor.to(torch.bfloat16).float()) for tensor in exact.values())
    assert_holds(here, exact, DTYPES[after])
    for name in (name for name in there if name.startswith("optimizer.exp_avg")):
        assert torch.equal(here[name], there[name]), name


@pytest.mark.parametrize(("before", "after"), [("--bf16", ""), ("", "--bf16"), ("--bf16", "--bf16")])
def test_finetuning_starts_from_the_exact_ones_too(
    before: str, after: str, ranks: RankPool, saved: Callable, tmp_path: Path
) -> None:
    checkpoint = saved(DP2, before)
    run = run_of(ONE, after, save=tmp_path, load=checkpoint.parent, finetune=True)
    ranks.run(1, load_and_save, run, checkpoint)
    here = weights(folder_of(tmp_path, 0))
    assert_holds(here, exact_weights(weights(checkpoint)), DTYPES[after])
    assert not any(here[name].any() for name in here if name.startswith("optimizer.exp_avg"))
