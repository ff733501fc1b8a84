"""Training with everything that a run does around its steps: saving, probes, times, measures, evaluation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cases import FULL, GATE, OVERLAP, PP2, SMALLER, Case, only_in_full, run_config
from rank_pool import RankPool
from test_moe import EP2, EXPERTS
from training_runs import VOCABULARY, build_trainer, checkpointer_of, resume

from mesh_megatron.checkpoint.folder import folder_of
from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.collectives import gather
from mesh_megatron.platform import device
from mesh_megatron.training import pretrain
from mesh_megatron.training.callbacks.hang_watchdog import Watchdog
from mesh_megatron.training.fault_tolerance.signals import SignalListener
from mesh_megatron.training.metrics.writer import MetricsWriter
from mesh_megatron.training.start_clock import StartClock
from mesh_megatron.training.step import StepResult
from mesh_megatron.training.trainer import Callback, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS, SAVED = 4, 2
EVERYTHING = (
    f"--save-interval {SAVED} --eval-interval 2 --log-interval 1 --probe-interval 2 --timing-log-level 2 "
    "--log-params-norm --log-num-zeros-in-grad --manual-gc --rerun-mode validate_results"
)
CASES = [
    Case("dp2-fully-sharded", 2, f"--use-torch-fsdp2 {SMALLER}", "--bf16"),
    *only_in_full(
        [
            Case("dp4-two-copies", 4, f"--use-torch-fsdp2 {SMALLER} --num-distributed-optimizer-instances 2", GATE),
            Case("pp2-exit-gate-drawn-loops", 2, PP2, f"{GATE} --loops-sampling uniform"),
            Case("ep2-pp2-weights-of-losses", 4, f"{EP2} {PP2} {OVERLAP} {FULL}", f"{EXPERTS} --loop-loss-weights 1 2"),
            Case("dp2-muon-layer-wise", 2, f"--use-distributed-optimizer {SMALLER}", "--optimizer muon"),
        ]
    ),
]


class Losses(Callback):
    """Keeps the losses of the steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.losses.append(result.loss)


def trained(run: RunConfig) -> tuple[list[float], list[str]]:
    """Losses of all steps, and the reasons of ranks that stopped early."""
    trainer, signals = build_trainer(run), SignalListener()
    watchdog = Watchdog(10, StartClock(signals.started))
    writer = MetricsWriter(run) if device.rank() == 0 else None
    summary: Any = SimpleNamespace(vocabulary_rows=VOCABULARY)
    all_of_a_run = pretrain._callbacks(run, writer, summary, checkpointer_of(trainer), signals, None, watchdog)
    kept = Losses()
    trainer.callbacks = [kept, *all_of_a_run]
    try:
        if writer is not None:
            writer.open(0)
        trainer.train()
    finally:
        watchdog.stop()
        signals.close()
    return kept.losses, [reason for reason in gather(trainer.stop_reason) if reason is not None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_with_all_callbacks_saves_and_continues_to_the_bit(case: Case, ranks: RankPool, tmp_path: Path) -> None:
    run = run_config(f"{case.model} {EVERYTHING} --save {tmp_path}", case.layout, STEPS)
    run.validate(case.ranks)
    for losses, stopped in ranks.run(case.ranks, trained, run):
        assert (len(losses), stopped) == (STEPS, [])
    for rest in ranks.run(case.ranks, resume, run, folder_of(tmp_path, SAVED)):
        assert rest == losses[SAVED:]
