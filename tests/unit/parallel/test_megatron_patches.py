"""Norms and scales of all gradients at once are those that Megatron-Core computes one by one."""

import logging

import megatron.core.utils as upstream
import pytest
import torch
from megatron.core.optimizer import clip_grads, optimizer

from mesh_megatron.parallel.megatron_patches import norm_of_all, scale_all, treat_gradients_all_at_once


def some_gradients(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(3,), (5, 7), (), (64, 128), (1, 1, 2)]
    return [torch.randn(shape, generator=draw).to(dtype) * 10**i for i, shape in enumerate(shapes)]


def test_norm_is_the_same():
    ours, _ = norm_of_all(0, torch.zeros(1), [some_gradients()], False)
    theirs, _ = upstream.local_multi_tensor_l2_norm(0, torch.zeros(1), [some_gradients()], False)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_norm_of_what_is_not_finite(number):
    gradients = some_gradients()
    gradients[1][2, 3] = number
    norm, _ = norm_of_all(0, torch.zeros(1), [gradients], False)
    assert not norm.isfinite().all()


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1.0), (torch.float32, 0.3), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("in_place", [True, False])
def test_scaled_gradients_are_the_same(dtype, scale, in_place):
    results = []
    for scale_them in (scale_all, upstream.local_multi_tensor_scale):
        sources = some_gradients(dtype)
        targets = sources if in_place else [torch.zeros_like(source) for source in sources]
        scale_them(0, torch.zeros(1), [sources, targets], scale)
        results.append(targets)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_weights_are_copied_from_float32_to_bf16():
    targets = some_gradients(torch.bfloat16)
    scale_all(0, torch.zeros(1), [[target.float() + 1 for target in targets], targets], 1.0)
    assert all(torch.equal(a, b + 1) for a, b in zip(targets, some_gradients(torch.bfloat16), strict=True))


def test_both_stand_in_for_what_is_there_without_apex(monkeypatch):
    for module in (clip_grads, optimizer):
        monkeypatch.setattr(module, "multi_tensor_scale_impl", upstream.local_multi_tensor_scale)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", upstream.local_multi_tensor_l2_norm)
    treat_gradients_all_at_once()
    assert clip_grads.l2_norm_impl is norm_of_all
    assert clip_grads.multi_tensor_scale_impl is optimizer.multi_tensor_scale_impl is scale_all


def test_those_of_apex_stay(monkeypatch):
    monkeypatch.setattr(clip_grads, "l2_norm_impl", sum)
    treat_gradients_all_at_once()
    assert clip_grads.l2_norm_impl is sum


def test_only_the_advice_that_does_not_apply_is_dropped(caplog):
    from mesh_megatron.parallel.megatron_patches import _ADVICE, apply_patches

    apply_patches()
    for module, start in _ADVICE.items():
        for message in (f"{start}. Do so.", f"{module} failed"):
            logging.getLogger(f"megatron.core.{module}").warning(message)
    assert [record.message for record in caplog.records] == [f"{module} failed" for module in _ADVICE]
