"""Signals to any one rank stop all of them at the same step, whatever they are doing."""

import json
import signal
import time

import pytest
from fleet import Fleet
from integration_runs import SMALL, losses

from mesh_megatron.training.fault_tolerance.run_status import read_status

DP2 = ["--train-iters", "100000", "--micro-batch-size", "1"]


class SlowEvaluation:
    """An evaluation of many minutes, whose begin this rank prints."""

    def __call__(self, rank):
        from mesh_megatron.training import trainer

        original = trainer.evaluation_sums

        def slow(*args):
            print("evaluating", flush=True)
            time.sleep(0.2)
            return original(*args)

        trainer.evaluation_sums = slow


class SlowIndex:
    """Rank 0 builds an index until it is released."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, rank):
        from mesh_megatron.data import datasets

        original = datasets._Build.__call__

        def slow(*args):
            if rank == 0:
                print("indexing", flush=True)
                while not (self.folder / "go on").exists():
                    time.sleep(0.05)
            return original(*args)

        datasets._Build.__call__ = slow


class Sleeper:
    """Rank 1 hangs before its third step, and rank 0 waits for it in a collective."""

    def __call__(self, rank):
        from mesh_megatron.training import trainer

        original, calls = trainer.train_step, iter(range(100))

        def hanging(*args, **kwargs):
            if next(calls) == 2:
                print("third step", flush=True)
                if rank == 1:
                    time.sleep(3600)
            return original(*args, **kwargs)

        trainer.train_step = hanging


def saved_iteration(save):
    return int((save / "latest_checkpointed_iteration.txt").read_text())


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.full) for number in (signal.SIGINT, signal.SIGUSR1))],
    ids=lambda number: number.name,
)
def test_one_rank_of_two_is_signalled(corpus, tmp_path, number):
    with Fleet(2, [*SMALL, *DP2, "--data-path", corpus, "--save", tmp_path], tmp_path / "logs") as fleet:
        fleet.wait_for("iteration        3/")
        fleet.signal(1, number)
        assert fleet.exit_codes() == [75, 75]
    status = read_status(tmp_path)
    assert (status.status, status.reason) == ("stopped early", number.name)
    assert status.iteration == saved_iteration(tmp_path) == max(losses(tmp_path)) >= 3
    assert status.last_checkpoint == f"iter_{status.iteration:07d}"


@pytest.mark.full
def test_whole_group_is_signalled(corpus, tmp_path):
    """Signal all processes of a rank, as torchrun does, while they save and read data in advance."""
    flags = ["--num-workers", "1", "--save-interval", "2", "--async-save"]
    with Fleet(2, [*SMALL, *DP2, *flags, "--data-path", corpus, "--save", tmp_path], tmp_path / "logs") as fleet:
        fleet.wait_for("checkpoint, training waited")
        for rank in (0, 1):
            fleet.signal(rank, signal.SIGTERM, group=True)
        assert fleet.exit_codes() == [75, 75], fleet.output(0)
    assert saved_iteration(tmp_path) == max(losses(tmp_path))


@pytest.mark.full
def test_signal_during_an_evaluation(corpus, tmp_path):
    """The evaluation ends within one batch; it is repeated when the run continues from the checkpoint of that step."""
    flags = [*SMALL, "--train-iters", 8, "--eval-interval", 4, "--micro-batch-size", 1, "--data-path", corpus]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with Fleet(2, [*flags, "--save", whole], tmp_path / "logs") as fleet:
        assert fleet.exit_codes() == [0, 0], fleet.output(0)
    with Fleet(2, [*flags, "--eval-iters", 1000, "--save", parts], tmp_path / "logs", SlowEvaluation()) as fleet:
        fleet.wait_for("evaluating", rank=1)
        fleet.signal(1, signal.SIGTERM)
        assert fleet.exit_codes() == [75, 75]
        assert fleet.output(1).count("evaluating") < 100
    assert saved_iteration(parts) == 4 and max(losses(parts)) == 4
    with Fleet(2, [*flags, "--save", parts], tmp_path / "logs") as fleet:
        assert fleet.exit_codes() == [0, 0], fleet.output(0)
    assert losses(parts) == losses(whole)
    assert evaluations(parts) == evaluations(whole) and len(evaluations(whole)) == 2


def evaluations(save):
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "lm loss validation" in record]


@pytest.mark.full
def test_signal_while_an_index_is_built(corpus, tmp_path):
    """All ranks stop before the first step with nothing to save, and the same command starts again."""
    flags = [*SMALL, "--train-iters", 2, "--micro-batch-size", 1, "--data-path", corpus, "--save", tmp_path / "run"]
    with Fleet(2, flags, tmp_path / "logs", SlowIndex(tmp_path)) as fleet:
        fleet.wait_for("indexing")
        fleet.signal(1, signal.SIGUSR1)
        fleet.wait_for("SIGUSR1 received", rank=1)
        (tmp_path / "go on").touch()
        assert fleet.exit_codes() == [75, 75], fleet.output(0)
    assert read_status(tmp_path / "run").iteration == 0
    with Fleet(2, flags, tmp_path / "logs") as fleet:
        assert fleet.exit_codes() == [0, 0], fleet.output(0)
    assert read_status(tmp_path / "run").status == "finished"


@pytest.mark.full
def test_second_interrupt_stops_at_once(corpus, tmp_path):
    """The second SIGINT ends even a rank that waits for a hanging one, where the first has no effect."""
    flags = [*SMALL, *DP2, "--data-path", corpus, "--save", tmp_path]
    with Fleet(2, flags, tmp_path / "logs", Sleeper()) as fleet:
        fleet.wait_for("third step")
        fleet.signal(0, signal.SIGINT)
        fleet.wait_for("SIGINT received")
        time.sleep(1.5)
        assert fleet.running
        fleet.signal(0, signal.SIGINT)
        assert fleet.first_exit_codes() == [130, None]
        assert "second SIGINT" in fleet.output(0)
