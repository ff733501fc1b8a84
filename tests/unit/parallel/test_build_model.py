"""Wrapping a model for data parallelism changes where its gradients are stored, and nothing else."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from mesh_megatron.config.fp8 import Fp8Config
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig

pytestmark = pytest.mark.usefixtures("one_rank")
MODEL = ModelConfig(layout="1+1R3+1", hidden_size=32, num_attention_heads=4, seq_length=16, padded_vocab_size=128)


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-6), (True, 1e-2)])
def test_products_add_gradients_to_their_buffers(bf16: bool, tolerance: float) -> None:
    """Over two micro-batches and three loops, as adding up autograd's gradients would."""
    from mesh_megatron.model.initialize import initialize_weights
    from mesh_megatron.parallel.build_model import build_model

    run = RunConfig(model=MODEL, training=TrainingConfig(bf16=bf16))
    (chunk,) = build_model(run, 128).chunks
    model = chunk.module
    initialize_weights(model, MODEL, seed=3)
    linear = model.block(1).layers[0].mlp.linear_fc1
    assert linear.gradient_accumulation_fusion
    batches = [torch.randint(128, (2, 2, 16), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    chunk.zero_grad_buffer()
    for tokens, labels in batches:
        chunk(tokens, None, labels).backward()
    assert linear.weight.grad_added_to_main_grad
    for module in model.modules():
        if getattr(module, "gradient_accumulation_fusion", False):
            module.gradient_accumulation_fusion = False
    added = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    chunk.zero_grad_buffer()
    for tokens, labels in batches:
        chunk(tokens, None, labels).backward()
    for name, parameter in model.named_parameters():
        difference = (added[name] - parameter.main_grad).norm()
        assert difference <= tolerance * parameter.main_grad.norm(), name


def test_fused_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh_megatron.model.transformer_config import transformer_config
    from mesh_megatron.parallel import build_model as build_model_module

    for extension in (True, False):
        monkeypatch.setattr(build_model_module, "has_gradient_extension", lambda found=extension: found)
        for implementation, engine in (("transformer_engine", True), ("local", False)):
            config = transformer_config(MODEL)
            build_model_module.use_fused_parts(config, implementation)
            assert config.apply_rope_fusion == engine and not config.fused_rotary
            assert config.gradient_accumulation_fusion == (engine or extension)
    monkeypatch.setattr(build_model_module, "fused_kernels_run", lambda device: True)
    for implementation, engine in (("transformer_engine", True), ("local", False)):
        for fusion in (True, False):
            config = transformer_config(MODEL)
            build_model_module.use_fused_parts(config, implementation, rope_fusion=fusion)
            assert (config.apply_rope_fusion, config.fused_rotary) == (engine and fusion, fusion and not engine)


@pytest.mark.parametrize(
    ("ranks", "precision", "masks", "own"),
    [(1, {}, False, False), (2, {}, False, True), (2, {"bf16": True}, False, False), (1, {"bf16": True}, True, True)],
)
def test_where_transformer_engines_attention_cannot_serve(ranks: int, precision: dict, masks: bool, own: bool) -> None:
    """It ignores masks, and has nothing that shares a float32 sequence over ranks."""
    from mesh_megatron.config.data import DataConfig
    from mesh_megatron.config.training import TrainingConfig
    from mesh_megatron.parallel import build_model as build_model_module

    run = RunConfig(
        parallel=ParallelConfig(context_parallel_size=ranks),
        training=TrainingConfig(**precision),
        data=DataConfig(reset_attention_mask=masks),
    )
    assert build_model_module._needs_own_attention(run) == own
    chosen = replace(run, parallel=replace(run.parallel, attention_backend="local"))
    assert build_model_module._needs_own_attention(chosen)


@pytest.mark.parametrize("imports", [True, False])
@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        ({}, False),
        ({"fp8": Fp8Config(fp8_format="hybrid")}, True),
        ({"parallel": ParallelConfig(tensor_model_parallel_size=2)}, True),
        ({"parallel": ParallelConfig(pipeline_model_parallel_size=2, context_parallel_size=2)}, False),
    ],
)
def test_transformer_engine_where_it_pays(monkeypatch, flags: dict, engine: bool, imports: bool) -> None:
    from mesh_megatron.parallel import build_model as module

    monkeypatch.setattr(module, "transformer_engine_imports", lambda: imports)
    run = RunConfig(**flags)
    assert module.resolve_implementation(run) == "local"  # without a GPU
    monkeypatch.setattr(module.device, "has_gpu", lambda: True)
    assert module.resolve_implementation(run) == ("transformer_engine" if engine and imports else "local")
    for named in ("local", "transformer_engine"):
        chosen = replace(run, parallel=replace(run.parallel, transformer_impl=named))
        assert module.resolve_implementation(chosen) == named


def test_an_attention_is_chosen_by_transformer_engines_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh_megatron.parallel.build_model import choose_attention

    names = [f"NVTE_{name}_ATTN" for name in ("FLASH", "FUSED", "UNFUSED")]
    for name in names:
        monkeypatch.setenv(name, "")  # so that the values set below end with the test
        monkeypatch.delenv(name)
    for untouched in ("auto", "local"):
        choose_attention(untouched)
        assert not any(name in os.environ for name in names)
    choose_attention("fused")
    assert [os.environ[name] for name in names] == ["0", "1", "0"]
    choose_attention("fused")
    with pytest.raises(ValueError, match=r"--attention-backend unfused and NVTE_FUSED_ATTN=1 differ: unset it"):
        monkeypatch.delenv(names[0])
        choose_attention("unfused")
