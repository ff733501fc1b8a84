"""The ring's chunks of all ranks in one process, called in the order of the schedule: losses and gradients as alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.parallel import ParallelConfig

pytestmark = pytest.mark.usefixtures("one_rank")
VOCABULARY, MICRO_BATCHES = 48, 4


@dataclass(frozen=True)
class Pass:
    """Results of a forward and a backward pass over all micro-batches."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    """By checkpoint name, of all ranks."""


def settings(**fields) -> ModelConfig:
    defaults = {"layout": "1+2R3+1", "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
    return ModelConfig(**{**defaults, **fields})


def configuration(model: ModelConfig, ranks: int, precision: str):
    from mesh_megatron.model.transformer_config import transformer_config

    return transformer_config(model, ParallelConfig(pipeline_model_parallel_size=ranks), precision)


def prepared(module):
    """Give a module its weights, the same wherever a layer is, and freeze what does not learn."""
    from mesh_megatron.config.exits import EXIT_GATE
    from mesh_megatron.model.initialize import initialize_weights

    initialize_weights(module, module.model, seed=1)
    for name, parameter in module.named_parameters():
        if name.startswith("recurrence."):  # away from where single terms cancel
            draw = torch.Generator().manual_seed(int.from_bytes(name[-6:].encode(), "big"))
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=draw)
        parameter.requires_grad = name.startswith(EXIT_GATE) or not module.model.exit_gate_only
    return module.train()


def batch(model: ModelConfig, number: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(100 + number)
    tokens, labels = torch.randint(VOCABULARY, (2, 2, model.seq_length), generator=draw)
    weights = (torch.rand(tokens.shape, generator=draw) > 0.2).float()
    return tokens, None, labels, weights, torch.arange(tokens.numel()).view(tokens.shape) + 1000 * number


def objective(output: torch.Tensor) -> torch.Tensor:
    return output if output.dim() == 0 else output[0]


def gradients_of(modules: Sequence) -> dict[str, torch.Tensor]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    found: dict[str, torch.Tensor] = {}
    for module in modules:
        held = {id(parameter): parameter for parameter in module.parameters() if parameter.requires_grad}
        for entry in nested_values(module.sharded_state_dict()):
            if (parameter := held.get(id(getattr(entry, "data", None)))) is not None:
                key = f"{entry.key} {getattr(entry, 'global_offset', '')}"  # experts share a key
                assert parameter.grad is not None, key
                found[key] = found.get(key, 0) + parameter.grad  # of a tied matrix the ends have a part each
    return found


def alone(model: ModelConfig, count: int) -> Pass:
    from mesh_megatron.model.layer import layer_specs
    from mesh_megatron.model.mesh_model import MeshModel

    module = prepared(MeshModel(model, configuration(model, 1, "fp32"), VOCABULARY, layer_specs(model)))
    module.set_loops(count)
    outputs = []
    for number in range(MICRO_BATCHES):
        outputs.append(module(*batch(model, number)))
        objective(outputs[-1]).backward()
    return Pass([output.detach() for output in outputs], gradients_of([module]))


def on_ring(model: ModelConfig, count: int, ranks: int, precision: str) -> Pass:
    """Run all micro-batches through one chunk of all ranks after the other, then backwards."""
    config = configuration(model, ranks, precision)
    chunks = [running_chunks(model, config, count, rank, ranks) for rank in range(ranks)]
    last = len(chunks[0]) - 1, ranks - 1
    places = [(v, n, r) for v in range(len(chunks[0])) for n in range(MICRO_BATCHES) for r in range(ranks)]
    sent: dict[int, torch.Tensor] = {}
    kept = {}
    for v, number, r in places:
        received = sent[number].detach().clone().requires_grad_() if (v, r) != (0, 0) else None
        chunks[r][v].set_input_tensor(received)
        sent[number] = chunks[r][v](*batch(model, number))
        kept[v, number, r] = received, sent[number]
    gradients: dict[int, torch.Tensor | None] = dict.fromkeys(range(MICRO_BATCHES))
    for v, number, r in reversed(places):
        received, output = kept.pop((v, number, r))
        if (v, r) == last:
            objective(output).backward()
        elif output.requires_grad:
            output.backward(gradients[number])
        if received is not None:
            gradients[number] = received.grad
            assert received.grad is not None, "the rank before waits for a gradient"
    assert not any(chunk.outbox or chunk.keys for of_rank in chunks for chunk in of_rank), "kept for nobody"
    outputs = [sent[number].detach() for number in range(MICRO_BATCHES)]
    return Pass(outputs, gradients_of([chunk for of_rank in chunks for chunk in of_rank]))


def running_chunks(model: ModelConfig, config, count: int, rank: int, ranks: int) -> list:
    from mesh_megatron.config.ring import running
    from mesh_megatron.model.layer import layer_specs
    from mesh_megatron.parallel.ring import PipelineRank, arrange, build_ring

    built = build_ring(model, config, VOCABULARY, layer_specs(model), PipelineRank(rank, ranks))
    chunks = [prepared(chunk) for chunk in built]
    arrange(chunks, count, model.losses_after_loops)
    return running([chunk.role for chunk in chunks], chunks, count, model.losses_after_loops)


EXITS = {"exit_gate": True, "exit_entropy_coeff": 0.5}
TIED = {"untie_embeddings_and_output_weights": False}
EXPERTS = {"num_experts": 2, "moe_router_topk": 1, "loop_loss_weights": (1.0, 0.0, 2.0), "disable_bias_linear": True}
CASES = {
    "weights of losses and experts": (EXPERTS, 3, 2),
    "tied gate over more ranks than layers, one loop of three": (EXITS | TIED, 1, 3),
    "frozen gate with shared keys": (EXITS | {"exit_gate_only": True, "share_kv_across_loops": True}, 3, 3),
    "gate of lanes, two loops of three": (EXITS | {"recurrence": "hyper-dynamic", "layout": "2+3R3+0"}, 2, 4),
    "no prelude, no coda": ({"layout": "0+3R2+0", "recurrence": "attend", "loop_norm": True}, 2, 2),
}


@pytest.mark.parametrize(("fields", "count", "ranks"), CASES.values(), ids=list(CASES))
def test_a_ring_computes_what_one_process_does(fields, count, ranks):
    model = settings(**fields)
    expected, found = alone(model, count), on_ring(model, count, ranks, "fp32")
    for here, there in zip(found.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(here, there)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("only", [False, True], ids=["all learn", "the gate learns"])
def test_gradients_of_the_gate_come_back_to_the_bit(only, monkeypatch):
    """Halves of float32 numbers that look like NaN in 16 bits do not survive an addition."""
    from mesh_megatron.parallel import ring

    left: list[torch.Tensor] = []
    arrived: list[torch.Tensor] = []

    def numbers_of(state, count):
        numbers = read(state, count)
        numbers.register_hook(left.append)
        return numbers

    def as_state(numbers, width, dtype):
        numbers.register_hook(arrived.append)
        return write(numbers, width, dtype)

    read, write = ring.numbers_of, ring.as_state
    monkeypatch.setattr(ring, "numbers_of", numbers_of)
    monkeypatch.setattr(ring, "as_state", as_state)
    on_ring(settings(exit_gate=True, exit_gate_only=only), 3, 3, "fp16")
    assert len(left) == len(arrived) == MICRO_BATCHES
    sent, found = torch.stack(left), torch.stack(arrived)
    assert sent.view(torch.float16).isnan().any()
    assert torch.equal(sent.view(torch.int32), found.view(torch.int32))
