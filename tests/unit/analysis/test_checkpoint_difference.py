"""Differences of tensors, against numbers worked out by hand."""

import math

import torch

from mesh_megatron.analysis.checkpoint_difference import tensor_difference


def test_equal_tensors_have_none():
    x = torch.tensor([1.0, math.nan, math.inf])
    assert tensor_difference("x", x, x.clone()) is None
    assert tensor_difference("x", torch.zeros(2), -torch.zeros(2)) is None


def test_largest_and_relative():
    found = tensor_difference("x", torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([1.5, 2.0, 0.25, 4.0]))
    assert found is not None
    assert (found.elements, found.differing, found.largest, found.relative) == (4, 3, 1.0, 1.0)


def test_numbers_that_are_not_finite():
    found = tensor_difference("x", torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    assert found is not None and (found.differing, found.largest, found.relative) == (1, math.inf, math.inf)


def test_bytes():
    found = tensor_difference("x", torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([0, 5], dtype=torch.uint8))
    assert found is not None and found.largest == 250
