"""The ranks that the report of a hang names."""

import sys

from mesh_megatron.training.callbacks.hang_watchdog import PHASES, Place, place_of, report

NOW = 1000.0


def place(iteration=4, waits=True, since=900.0, seen=999.0):
    return Place(iteration, "step.py:1 call()", waits, since, seen, "node7")


def test_a_rank_that_does_not_wait_is_named():
    text = report([place(), place(waits=False, since=940.0), place()], NOW, 20)
    assert text == "step 5 does not end; rank 1 on node7 has been in step 5 for 60 s at step.py:1 call()"


def test_a_rank_that_says_nothing_is_named():
    text = report([place(), place(), place(seen=500.0)], NOW, 20)
    assert text == "step 5 does not end; rank 2 on node7 has given no sign of life for 500 s"
    assert "rank 1 has never reported" in report([place(), None], NOW, 20)


def test_a_rank_that_is_behind_is_named():
    assert "rank 0 on node7 has been in step 4" in report([place(iteration=3), place(), place()], NOW, 20)


def test_before_the_first_step_the_phase_is_named():
    loading, building = (
        PHASES.index(phase) - len(PHASES) for phase in ("loading the checkpoint", "building the model")
    )
    text = report([place(iteration=loading), place(iteration=building, waits=False, since=940.0)], NOW, 20)
    assert text == (
        "building the model does not end; rank 1 on node7 has been building the model for 60 s at step.py:1 call()"
    )
    assert "rank 0" in report([place(iteration=building), place(iteration=0)], NOW, 20)


def test_nobody_is_named_where_all_wait():
    assert "every rank waits" in report([place(), place()], NOW, 20)


def test_where_a_thread_stands():
    frame = sys._getframe()
    found = place_of(frame, 7, 1.0, 2.0)
    assert not found.waits and "callbacks/test_hang_watchdog.py" in found.line and "place_of(frame" in found.line
