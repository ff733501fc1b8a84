"""A rank that hangs before the first step is reported; waiting for rank 0 to index data is not."""

import time

import pytest
from fleet import Fleet
from integration_runs import SMALL
from test_signals import SlowIndex

pytestmark = pytest.mark.full

FLAGS = [*SMALL, "--train-iters", "2", "--micro-batch-size", "1"]


class SleepsInBuilding:
    """Rank 1 hangs while it builds the model."""

    def __call__(self, rank):
        from mesh_megatron.training import pretrain

        original = pretrain.build_model

        def sleepy(*args):
            if rank == 1:
                time.sleep(3600)
            return original(*args)

        pretrain.build_model = sleepy


def test_a_rank_that_hangs_while_the_model_is_built(corpus, tmp_path):
    flags = [*FLAGS, "--data-path", corpus, "--distributed-timeout-minutes", "0.4"]
    with Fleet(2, flags, tmp_path, SleepsInBuilding()) as fleet:
        fleet.first_exit_codes()  # rank 0 gives up waiting
        told = [line for rank in (0, 1) for line in fleet.output(rank).splitlines() if "does not end" in line]
    (warning,) = told
    assert "building the model does not end; rank 1 on " in warning and "has been building the model for" in warning
    assert "time.sleep(3600)" in warning and "rank 0" not in warning


def test_rank_0_may_index_for_longer_than_the_timeout(corpus, tmp_path):
    flags = [*FLAGS, "--data-path", corpus, "--distributed-timeout-minutes", "0.4"]
    with Fleet(2, flags, tmp_path, SlowIndex(tmp_path)) as fleet:
        fleet.wait_for("indexing")
        time.sleep(27)
        (tmp_path / "go on").touch()
        assert fleet.exit_codes() == [0, 0], fleet.output(0)
        assert "does not end" not in fleet.output(0) + fleet.output(1)
