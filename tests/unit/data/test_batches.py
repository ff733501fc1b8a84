"""Micro-batches depend on the samples consumed and on nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_megatron.data.batches import BatchShard, MicroBatches


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"tokens": torch.full((4,), index), "sample_ids": torch.tensor(index)}


def loader(size=1000, mbs=2, rank=0, dp=1, **options):
    shard = BatchShard(micro_batch_size=mbs, data_parallel_rank=rank, data_parallel_size=dp)
    return MicroBatches(Numbers(size), shard, **options)


def ids(batches):
    return [batch["sample_ids"].tolist() for batch in batches]


@settings(max_examples=50, deadline=None)
@given(mbs=st.integers(1, 4), dp=st.integers(1, 4), micro=st.integers(1, 4), consumed=st.integers(0, 100))
def test_deals_each_sample_of_a_step_once_as_documented(mbs, dp, micro, consumed):
    dealt = []
    for rank in range(dp):
        for m, batch in enumerate(ids(loader(mbs=mbs, rank=rank, dp=dp).micro_batches(consumed, micro))):
            first = consumed + (m * dp + rank) * mbs
            assert batch == list(range(first, first + mbs))
            dealt += batch
    assert sorted(dealt) == list(range(consumed, consumed + mbs * dp * micro))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_anywhere_and_growing_batches_change_nothing(workers):
    steps = [(0, 1), (4, 2), (12, 3)]  # (consumed, micro-batches) of a batch size that grows
    running = loader(rank=1, dp=2, num_workers=workers)
    seen = [ids(running.micro_batches(*step)) for step in steps]
    for step, expected in zip(steps, seen, strict=True):
        assert ids(loader(rank=1, dp=2).micro_batches(*step)) == expected
    assert ids(running.micro_batches(4, 2)) == seen[1]  # back again
    running.close()


def test_batches_are_stacked():
    batch = next(loader().micro_batches(0, 1))
    assert batch["tokens"].tolist() == [[0] * 4, [1] * 4]


def test_the_end_is_an_error_or_the_beginning():
    short = loader(size=5)
    with pytest.raises(ValueError, match="4 of its 5 samples are consumed and the next 2 do not exist"):
        list(short.micro_batches(0, 3))
    assert ids(loader(size=5, wrap=True).micro_batches(0, 4)) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_reading_does_not_touch_the_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(num_workers=1).micro_batches(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_refuses_an_empty_dataset_and_a_rank_out_of_range():
    with pytest.raises(ValueError, match="no samples"):
        loader(size=0)
    with pytest.raises(ValueError, match="not below 2"):
        loader(rank=2, dp=2)
