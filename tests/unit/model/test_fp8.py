"""FP8 around a recursion: what enters which context, and what delayed scaling's history sees.

Transformer Engine needs a GPU. ``Engine`` stands in for its state manager, as its source has it: a module inside an
enabled context notes its input's largest value in the newest entry of its history, and when the outermost context
ends in training, every history gets a new entry and every scale is set. Of the backward pass every history gets one
where a module runs backwards that was the first of its context: a mark says that none has run yet, and a context puts
it back as it leaves.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from test_mesh_model import VOCABULARY, shake

from mesh_megatron.config.fp8 import Fp8Config
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.model import fp8
from mesh_megatron.model.initialize import initialize_weights
from mesh_megatron.model.layer import layer_specs
from mesh_megatron.model.mesh_model import MeshModel
from mesh_megatron.model.transformer_config import transformer_config

pytestmark = pytest.mark.usefixtures("one_rank")
LOOPS = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Engine:
    def __init__(self) -> None:
        self.enabled, self.depth, self.updates = False, 0, 0
        self.history: dict[str, list[float]] = {}
        self.newest: dict[str, float] = {}
        self.seen: list[tuple[str, float, int]] = []
        """One entry per product in FP8: module, largest value of its input, updates of scales so far."""
        self.none_has_run = False
        self.first: list[str] = []
        """Modules whose backward passes end an entry of the backward history."""

    @contextmanager
    def autocast(self, enabled: bool) -> Iterator[None]:
        before, self.enabled = (self.enabled, self.none_has_run), enabled
        if self.depth == 0:
            self.none_has_run = True
        self.depth += 1
        yield
        self.depth -= 1
        self.enabled, self.none_has_run = before
        if enabled and self.depth == 0 and torch.is_grad_enabled():
            self.updates += 1
            for name in self.newest:
                self.history.setdefault(name, []).append(self.newest[name])
                self.newest[name] = 0.0

    def watch(self, model: MeshModel) -> None:
        for name, module in model.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear) and ".layers." in name:
                module.register_forward_pre_hook(lambda _, args, name=name: self.note(name, args[0]))

    def note(self, name: str, tensor: torch.Tensor) -> None:
        if self.enabled:
            largest = tensor.abs().max().item()
            self.newest[name] = max(self.newest.get(name, 0.0), largest)
            self.seen.append((name, largest, self.updates))

            if self.is_first_fp8_module():
                self.first.append(name)

    def is_first_fp8_module(self) -> bool:
        first, self.none_has_run = self.none_has_run, False
        return first

    def values(self, name: str) -> list[float]:
        return [largest for module, largest, _ in self.seen if module == name]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()

    def get_fp8_context(config, layer_no=-1, is_init=False):  # type: ignore[no-untyped-def]
        return nullcontext() if is_init or not config.fp8 else engine.autocast(True)

    for module in (fp8, transformer_block):
        monkeypatch.setattr(module, "get_fp8_context", get_fp8_context)
    monkeypatch.setattr(fp8, "HAVE_TE", True)
    package, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    pytorch.fp8_autocast = engine.autocast  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    manager = ModuleType("transformer_engine.pytorch.fp8")
    manager.FP8GlobalStateManager = engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.fp8", manager)
    return engine


def build(engine: Engine, recipe: str, core_only: bool = False) -> MeshModel:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "init_method_std": 0.3}
    model = ModelConfig(layout=f"1+2R{LOOPS}+1", **sizes)
    settings = Fp8Config(fp8_format="hybrid", fp8_recipe=recipe, fp8_core_only=core_only)  # type: ignore[arg-type]
    config = transformer_config(model, precision="bf16", fp8=settings)
    module = MeshModel(model, config, VOCABULARY, layer_specs(model))
    module.to(DEVICE)
    initialize_weights(module, model, 1)
    shake(module)
    engine.watch(module)
    return module


def run(model: MeshModel) -> None:
    tokens, labels = (torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    loss = model(tokens.to(DEVICE), None, labels.to(DEVICE))
    if loss.requires_grad:
        loss.backward()


def segments(engine: Engine) -> set[str]:
    return {name.split(".")[0] for name, _, _ in engine.seen}


def test_delayed_history_sees_every_loop(engine: Engine) -> None:
    model = build(engine, "delayed")
    run(model)
    cores = [name for name in engine.history if name.startswith("core.")]
    assert len(cores) == 2 * 4  # layers times products
    for name in cores:
        values = engine.values(name)
        assert len(values) == LOOPS
        assert engine.history[name] == [max(values)], "one entry a forward pass: the largest of all loops"
    assert any(max(engine.values(name)) > engine.values(name)[-1] for name in cores), "the last loop would do"
    assert {updates for _, _, updates in engine.seen} == {0}, "all loops share one scale"
    run(model)
    assert engine.updates == 2 and all(len(engine.history[name]) == 2 for name in cores)


def test_a_context_for_each_block_would_not_do(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in can tell: this is what Megatron-Core's blocks do by themselves."""
    monkeypatch.setattr("mesh_megatron.model.mesh_model.forward_fp8_context", lambda config: nullcontext())
    run(build(engine, "delayed"))
    assert engine.updates == LOOPS + 2
    assert len({updates for name, _, updates in engine.seen if name.startswith("core.")}) == LOOPS


@pytest.mark.parametrize("core_only", [False, True])
def test_the_backward_history_gets_one_entry_a_pass(engine: Engine, core_only: bool) -> None:
    model = build(engine, "delayed", core_only)
    run(model)
    first_segment = "core" if core_only else "prelude"
    assert len(engine.first) == 1 and engine.first[0].startswith(first_segment)


def test_a_segments_context_would_end_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in can tell: each segment's context is left as if nothing had run."""
    monkeypatch.setattr("mesh_megatron.model.segment.after_segment", lambda config: None)
    run(build(engine, "delayed"))
    assert len(engine.first) == LOOPS + 2


def test_evaluation_sets_no_scales(engine: Engine) -> None:
    model = build(engine, "delayed")
    with torch.no_grad():
        run(model)
    assert engine.updates == 0 and engine.seen


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("core_only", [False, True])
def test_which_segments_are_in_fp8(engine: Engine, recipe: str, core_only: bool) -> None:
    run(build(engine, recipe, core_only))
    assert segments(engine) == ({"core"} if core_only else {"prelude", "core", "coda"})
    layers = 2 * LOOPS + (0 if core_only else 2)
    assert len(engine.seen) == 4 * layers
    assert engine.depth == 0 and not engine.enabled
    if recipe != "delayed":
        assert engine.updates == layers, "a context for each layer, none around them"


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_routers_stay_in_float32(engine: Engine, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(engine, recipe)
    assert {parameter.dtype for parameter in model.recurrence.parameters()} == {torch.float32}
    assert model.block(1).layers[0].mlp.linear_fc1.weight.dtype == torch.bfloat16
    leave, routings = model.recurrence.leave, []

    def spy(cycle, output, memory):  # type: ignore[no-untyped-def]
        routings.append(memory[f"routing{cycle}"])
        return leave(cycle, output, memory)

    monkeypatch.setattr(model.recurrence, "leave", spy)
    run(model)
    assert [routing.dtype for routing in routings] == [torch.float32] * (LOOPS + 1)


def test_settings_reach_megatron_core() -> None:
    settings = Fp8Config(
        fp8_format="e4m3", fp8_recipe="delayed", fp8_margin=2, fp8_amax_history_len=16, fp8_amax_compute_algo="max"
    )
    config = transformer_config(ModelConfig(), precision="bf16", fp8=settings)
    assert (config.fp8, config.fp8_recipe, config.fp8_margin) == ("e4m3", "delayed", 2)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (16, "max")
    assert transformer_config(ModelConfig()).fp8 is None


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a GPU and Transformer Engine",
)
def test_transformer_engine_does_as_the_stand_in() -> None:
    """The real history after one forward pass: the largest input over all loops, in every product of the core."""
    model = ModelConfig(layout=f"1+2R{LOOPS}+1", hidden_size=64, num_attention_heads=4, seq_length=16)
    settings = Fp8Config(fp8_format="hybrid", fp8_recipe="delayed", fp8_amax_history_len=8)
    config = transformer_config(model, precision="bf16", fp8=settings)
    module = MeshModel(model, config, VOCABULARY, layer_specs(model, "transformer_engine")).cuda()
    initialize_weights(module, model, 1)
    layer = module.block(1).layers[0]
    projection, inputs = layer.self_attention.linear_proj, []
    projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0].abs().max().item()))
    tokens = torch.randint(VOCABULARY, (2, 16), device="cuda")
    module(tokens, None, tokens).backward()
    history = projection.fp8_meta["scaling_fwd"].amax_history[:, 0]
    assert len(inputs) == LOOPS
    assert history.max().item() == pytest.approx(max(inputs), rel=1e-2)
    assert int((history > 0).sum()) == 1
    assert int((projection.fp8_meta["scaling_bwd"].amax_history[:, 0] > 0).sum()) == 1
