"""A rank that is slow where the others are not, in a real run."""

import time

import pytest
from cases import run_config
from rank_pool import RankPool
from training_runs import build_trainer

from mesh_megatron.platform import device
from mesh_megatron.training.callbacks.stragglers import Stragglers
from mesh_megatron.util.terminal_log import log_to_terminal

pytestmark = pytest.mark.full


def run_with_a_slow_reader() -> str:
    """Return the output of this rank in a run where rank 1 reads slowly."""
    import contextlib
    import io

    trainer = build_trainer(run_config("--log-interval 3"))
    callback = Stragglers(2.0)
    callback.start(trainer)
    if device.rank() == 1:
        dataset = trainer.data.train.dataset
        original = type(dataset).__getitem__

        class Slow(type(dataset)):
            def __getitem__(self, index):
                time.sleep(0.1)
                return original(self, index)

        dataset.__class__ = Slow
    with log_to_terminal(device.rank()), contextlib.redirect_stdout(io.StringIO()) as printed:
        for _ in range(6):
            callback.before_step(trainer)
            callback.after_step(trainer, trainer.step())
    return printed.getvalue()


def test_the_slow_rank_is_named(ranks: RankPool) -> None:
    printed, elsewhere = ranks.run(2, run_with_a_slow_reader)
    lines = [line for line in printed.splitlines() if "takes" in line]
    assert lines and all("| straggler | rank 1 on " in line for line in lines) and elsewhere == ""
