"""Which chunks a ring has, and which of them run."""

from __future__ import annotations

import pytest

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.ring import ring_chunks, running


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "prelude core1 core2 core3 coda1"),
        ({"exit_gate": True}, "prelude core1 core2 core3 gate coda1 coda2 coda3"),
        ({"loop_loss_weights": (1.0, 0.0, 1.0)}, "prelude core1 core2 core3 coda1 coda2 coda3"),
        ({"layout": "4", "recurrence": "vanilla"}, "prelude coda1"),
    ],
    ids=str,
)
def test_chunks_are_in_the_order_of_a_micro_batch(fields, words):
    roles = ring_chunks(ModelConfig(**{"layout": "2+2R3+2", **fields}))
    assert [
        f"{role.segment}{role.number if role.segment in ('core', 'coda') else ''}" for role in roles
    ] == words.split()


@pytest.mark.parametrize(
    ("loops", "exits", "places"),
    [(3, True, [0, 1, 2, 3, 4, 5, 6, 7]), (2, True, [0, 1, 2, 4, 5, 6]), (2, False, [0, 1, 2, 5])],
)
def test_a_step_runs_the_chunks_of_its_loops(loops, exits, places):
    roles = ring_chunks(ModelConfig(layout="2+2R3+2", exit_gate=True))
    assert running(roles, range(8), loops, exits) == places
