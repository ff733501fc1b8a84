"""Flat slices of tensors as boxes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mesh_megatron.checkpoint.flat_shards import boxes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_hold_the_slice_in_its_order(shape, data):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    held = [
        tensor[tuple(slice(first, first + count) for first, count in zip(offset, size, strict=True))].flatten()
        for offset, size in boxes(tuple(shape), start, stop)
    ]
    assert torch.cat([torch.arange(0), *held]).tolist() == list(range(start, stop))
    assert len(held) <= 2 * len(shape) - 1


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 12, [((0, 0), (3, 4))]),
        (5, 7, [((1, 1), (1, 2))]),
        (2, 10, [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 2))]),
        (4, 8, [((1, 0), (1, 4))]),
        (3, 5, [((0, 3), (1, 1)), ((1, 0), (1, 1))]),
        (7, 7, []),
    ],
)
def test_of_a_matrix_three_at_most(start, stop, expected):
    assert list(boxes((3, 4), start, stop)) == expected
