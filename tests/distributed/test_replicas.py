"""One flipped bit in one copy of a weight is found, and sound runs raise no alarm."""

from __future__ import annotations

import pytest
import torch
from cases import BUCKETS, DISTOPT, OVERLAP, PP2, SMALLER, SP, TP2, Case, run_config
from rank_pool import RankPool
from training_runs import build_trainer

from mesh_megatron.config.run import RunConfig
from mesh_megatron.platform import device
from mesh_megatron.training.callbacks.replica_check import ReplicaCheck, disagreements
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

pytestmark = pytest.mark.full

ODD = 2


class Flip(Callback):
    """Flips the lowest bit of the middle word of one weight on one rank."""

    def __init__(self, name: str, at: int) -> None:
        self.name, self.at = name, at

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.state.iteration == self.at and device.rank() == ODD:
            words = trainer.model.modules[0].get_parameter(self.name).data.view(-1).view(torch.int32)
            words[len(words) // 2] ^= 1


def trained(run: RunConfig, flip: Flip | None, interval: int) -> tuple[int, int, str | None]:
    trainer = build_trainer(run)
    trainer.callbacks = [*([flip] if flip else []), ReplicaCheck(interval)]
    trainer.train()
    return trainer.state.iteration, trainer.exit_code, trainer.stop_reason


WEIGHT = "prelude.layers.0.mlp.linear_fc1.weight"
NORM_IN_CHECKPOINTS = "prelude.layers.0.self_attention.linear_qkv.layer_norm_weight"  # under Transformer Engine's name


@pytest.mark.parametrize(
    ("layout", "at"), [(SMALLER, 3), (DISTOPT, 4), (f"{TP2} {SP}", 3)], ids=["dp4", "dp4-distopt", "tp2-sp-dp2"]
)
def test_flipped_bit_is_found_and_named(layout: str, at: int, ranks: RankPool) -> None:
    split = TP2 in layout
    flip = Flip("prelude.layers.0.input_layernorm.weight" if split else WEIGHT, at)
    for iteration, code, reason in ranks.run(4, trained, run_config("", layout, 8), flip, 4):
        assert (iteration, code) == (4, 3)
        named = NORM_IN_CHECKPOINTS if split else flip.name
        assert reason is not None and f"{named} on rank 2, not as on ranks 0 1 3" in reason


@pytest.mark.parametrize(
    "case",
    [
        Case("pp2-dp2-distopt-overlap-buckets-bf16", 4, f"{PP2} {OVERLAP} {BUCKETS}", "--bf16"),
        Case("tp2-sp-pp2-tied", 4, f"{TP2} {SP} {PP2}", "--no-untie-embeddings-and-output-weights"),
        Case("ep2-experts", 2, "--expert-model-parallel-size 2", "--num-experts 4"),
    ],
    ids=lambda case: case.name,
)
def test_sound_ranks_agree(case: Case, ranks: RankPool) -> None:
    for outcome in ranks.run(case.ranks, trained, run_config(case.model, case.layout, 3), None, 1):
        assert outcome == (3, 0, None)


def test_without_a_majority_all_are_named() -> None:
    piece = ("a.weight", (0, 0))
    assert disagreements([{piece: 1}, {piece: 2}, {}]) == ["a.weight on ranks 0 1, of which no majority agrees"]
    assert disagreements([{piece: 1}, {piece: 1}, {}]) == []
