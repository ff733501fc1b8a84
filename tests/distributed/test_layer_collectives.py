"""The branches of a parallel residual communicate together; one after the other they cannot."""

from __future__ import annotations

import pytest
from cases import SP, TP2, run_config
from collective_runs import collectives_of_a_layer
from rank_pool import RankPool

pytestmark = pytest.mark.full

# Of one layer, forward and backward: without sequence parallelism the sum of outputs and each branch's input gradient;
# with it, gathered: inputs (twice, as the backward pass needs them again) and the output's gradient; scattered: the
# outputs and the inputs' gradients.
TOGETHER = {"allreduce_": 1 + 2, "_allgather_base_": 0, "_reduce_scatter_base_": 0}
APART = {"allreduce_": 2 + 2, "_allgather_base_": 0, "_reduce_scatter_base_": 0}
TOGETHER_SP = {"allreduce_": 0, "_allgather_base_": 2 + 1, "_reduce_scatter_base_": 1 + 1}
APART_SP = {"allreduce_": 0, "_allgather_base_": 4 + 2, "_reduce_scatter_base_": 2 + 2}


@pytest.mark.parametrize("layout, model, expected", [
    (TP2, "", TOGETHER),
    (TP2, "--no-parallel-residual", APART),
    (f"{TP2} {SP}", "", TOGETHER_SP),
    (f"{TP2} {SP}", "--no-parallel-residual", APART_SP),
], ids=["together", "apart", "together-sp", "apart-sp"])  # fmt: skip
def test_collectives(ranks: RankPool, layout: str, model: str, expected: dict[str, int]) -> None:
    for counts in ranks.run(2, collectives_of_a_layer, run_config(model, layout)):
        for name, count in expected.items():
            assert sum(times for call, times in counts.items() if name in call) == count, counts
