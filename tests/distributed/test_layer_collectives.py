"""A layer with parallel residual sums both of its branches over ranks at once; one after the other cannot."""

from __future__ import annotations

import pytest
from cases import SP, TP2, run_config
from collective_runs import collectives_of_a_layer
from rank_pool import RankPool


@pytest.mark.parametrize("layout, kind", [(TP2, "allreduce_"), (f"{TP2} {SP}", "reduce_scatter")])
def test_one_sum_over_ranks(ranks: RankPool, layout: str, kind: str) -> None:
    for model, expected in (("", 1), ("--no-parallel-residual", 2)):
        for counts in ranks.run(2, collectives_of_a_layer, run_config(model, layout)):
            assert sum(count for name, count in counts.items() if kind in name) == expected, counts
