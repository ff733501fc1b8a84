"""What a data-parallel rank gathers of the optimizer's state for a checkpoint."""

from __future__ import annotations

import pytest
import rank_preload  # noqa: F401  (before megatron.core)
import torch
import torch.distributed as dist
from rank_pool import RankPool

from mesh_megatron.training import optimizer_state


def gathered(owner: int, length: int, at_a_time: int) -> tuple[list[float] | None, int]:
    """What this rank has of all ranks' pieces, and how many collectives it took."""
    optimizer_state.GATHERED_AT_A_TIME = at_a_time
    calls, gather = [0], dist.all_gather_into_tensor

    def counting(*args: object, **kwargs: object) -> None:
        calls[0] += 1
        gather(*args, **kwargs)

    dist.all_gather_into_tensor = counting
    piece = torch.arange(length, dtype=torch.float32) + 100 * dist.get_rank()
    whole = optimizer_state._gather_to(owner, piece, dist.group.WORLD)
    return None if whole is None else whole.tolist(), calls[0]


@pytest.mark.parametrize(("at_a_time", "calls"), [(1000, 1), (6, 4), (1, 10)])
def test_pieces_lie_in_the_order_of_ranks(ranks: RankPool, at_a_time: int, calls: int) -> None:
    nothing, everything = ranks.run(2, gathered, 1, 10, at_a_time)
    assert nothing == (None, calls)
    assert everything == ([*map(float, range(10)), *map(float, range(100, 110))], calls)


def test_buckets_are_spread_over_all_ranks() -> None:
    assert [optimizer_state.owner_of(number, 2, 1024) for number in range(2)] == [0, 512]
    assert [optimizer_state.owner_of(number, 6, 4) for number in range(6)] == [0, 0, 1, 2, 2, 3]
