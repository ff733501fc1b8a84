"""A new scheme needs only what docs/architecture.md lists: a toy one, added here, works everywhere."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest
import torch
from test_mesh_model import VOCABULARY, build, shake

import mesh_megatron
from mesh_megatron.config import recurrence as described
from mesh_megatron.config.model import ModelConfig, Recurrence
from mesh_megatron.config.recurrence import SCHEMES, Parameter, SchemeSpec, scheme_spec
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig

pytestmark = pytest.mark.usefixtures("one_rank")
AROUND = {"recurrence": "residual", "loop_norm": True, "loop_embedding": True}
TOKENS = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))


class ToySpec(SchemeSpec):
    """h(t+1) = g * f_core(h(t)) + W h_emb, with a gain per channel."""

    def parameters(self):
        hidden = self.model.hidden_size
        return {
            "gain": Parameter((hidden,), start=(2.0,), at_base=(1.0,)),
            "mixers.0.weight": Parameter((hidden, hidden), at_base=1.0),
        }

    def routing_macs(self):
        return self.loops * self.model.hidden_size**2

    def boundary_traffic(self, cycle, value_bytes):
        return 3, 5

    def history(self, chunk, size):
        return 2 * size.state

    def deferred(self, size):
        return size.state


def test_nothing_else_asks_for_a_scheme_by_name():
    """Only ``base``, which passes no state, may be asked for; the rest asks the scheme's description."""
    asked = []
    for path in Path(mesh_megatron.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith((".scheme", ".recurrence")):
                names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                asked += [f"{path.name}:{node.lineno}"] if names - {"base"} else []
    assert asked == []


def test_the_architecture_lists_every_file_that_names_schemes():
    package = Path(mesh_megatron.__file__).parent
    naming = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == "anchor_emb" and path.name != "presets.py"
    }
    text = (package.parent / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.split("## Adding a recurrence scheme")[1].split("\n## ")[0]
    listed = {row.split("`")[1] for row in section.splitlines() if row.startswith("| `")}
    assert naming == {name for name in listed if not name.startswith("tests/")}


@pytest.fixture
def toy(monkeypatch):
    """Add the scheme: the same rows as in the four files."""
    from mesh_megatron.hf import configuration_mesh, modeling_mesh
    from mesh_megatron.model import recurrence

    class Toy(recurrence.Scheme):
        def begin(self, embedding_SBD):
            return {"embedding": embedding_SBD}

        def leave(self, cycle, output_SBD, memory):
            if cycle == 0:
                return output_SBD, memory
            (gain,), (weight,) = self.weights(), self.weights("mixers.0")
            return gain * output_SBD + memory["embedding"] @ weight.T, memory

    class ToyRecurrence(modeling_mesh.Recurrence):
        def __init__(self, config):
            super().__init__(config)
            self.gain = torch.nn.Parameter(torch.empty(config.hidden_size))
            self.mixers = torch.nn.ModuleList([torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False)])

        def next_state(self, output, state, first, embedding):
            return self.gain * output + self.mixers[0](embedding)

    monkeypatch.setitem(described.SCHEMES, "toy", ToySpec)
    monkeypatch.setitem(recurrence.EQUATIONS, ToySpec, Toy)
    monkeypatch.setattr(configuration_mesh, "SCHEMES", (*configuration_mesh.SCHEMES, "toy"))
    monkeypatch.setitem(modeling_mesh.RECURRENCES, "toy", ToyRecurrence)


def test_every_scheme_is_in_every_table():
    from mesh_megatron.hf import configuration_mesh, modeling_mesh
    from mesh_megatron.model.recurrence import EQUATIONS

    names = [name for name in get_args(Recurrence) if not name.startswith("vanilla")]
    assert list(SCHEMES) == names == list(configuration_mesh.SCHEMES) == list(modeling_mesh.RECURRENCES)
    assert set(SCHEMES.values()) == set(EQUATIONS)


def test_it_starts_as_described_and_trains(toy):
    model = build(recurrence="toy")
    assert dict(model.recurrence.named_parameters()).keys() == {"gain", "mixers.0.weight"}
    assert model.recurrence.gain.eq(2).all()
    assert model.recurrence.mixers[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(TOKENS, None, TOKENS).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not model.recurrence.gain.eq(2).any()


@pytest.mark.parametrize("fields", [*({"recurrence": scheme} for scheme in (*SCHEMES, "toy")), AROUND], ids=str)
def test_every_parameter_is_taken_by_a_call(toy, fields):
    """A distributed optimizer that overlaps waits for a gathered parameter in the hooks of its module's call."""
    model = build(**fields)
    taken = []
    for module in model.recurrence.modules():
        module.register_forward_pre_hook(lambda module, args: taken.extend(module.parameters(recurse=False)))
    model(TOKENS)
    assert {id(parameter) for parameter in model.recurrence.parameters()} == {id(parameter) for parameter in taken}


def test_it_runs_on_the_chunks_of_a_ring(toy):
    from mesh_megatron.model.initialize import initialize_weights
    from mesh_megatron.model.layer import layer_specs
    from mesh_megatron.model.transformer_config import transformer_config
    from mesh_megatron.parallel.ring import PipelineRank, build_ring

    model = build(recurrence="toy")
    chunks = build_ring(
        model.model, transformer_config(model.model), VOCABULARY, layer_specs(model.model), PipelineRank(0, 1)
    )
    state = None
    for chunk in chunks:
        initialize_weights(chunk, model.model, seed=1)
        chunk.set_input_tensor(state)
        state = chunk(TOKENS)
    torch.testing.assert_close(state, model(TOKENS))


def test_it_is_planned(toy):
    from mesh_megatron.planning.activations import activation_sizes
    from mesh_megatron.planning.compute import Compute
    from mesh_megatron.planning.flops import training_flops_per_token
    from mesh_megatron.planning.hardware import Assumptions, Links, known_gpus
    from mesh_megatron.planning.parameters import count_parameters
    from mesh_megatron.planning.rank_memory import memory_of_ranks

    model = build(recurrence="toy")
    assert count_parameters(model.model, VOCABULARY).total == sum(p.numel() for p in model.parameters())
    assert training_flops_per_token(model.model, VOCABULARY).state_passing == 6 * 3 * 32**2
    run = RunConfig(model=model.model, training=TrainingConfig(micro_batch_size=2, global_batch_size=2))
    sizes = activation_sizes(run, VOCABULARY)
    assert (sizes.history, sizes.deferred) == ((2 * sizes.state,) * 5, sizes.state)
    assert memory_of_ranks(run, VOCABULARY, 1, 1)[0].history == 10 * sizes.state
    boundary = Compute(run, VOCABULARY, Links(next(iter(known_gpus().values())), Assumptions(), 8)).boundary(1)
    assert boundary.backward.total / boundary.forward.total == pytest.approx(5 / 3)


def test_it_saves_and_loads(toy, tmp_path: Path):
    from megatron.core import dist_checkpointing

    model, other = build(recurrence="toy"), build(recurrence="toy", seed=2)
    shake(model)
    dist_checkpointing.save(model.sharded_state_dict(), str(tmp_path))
    other.load_state_dict(dist_checkpointing.load(other.sharded_state_dict(), str(tmp_path)))
    assert torch.equal(other(TOKENS), model(TOKENS))


@torch.no_grad()
def test_it_is_exported_and_imported(toy):
    from mesh_megatron.hf.convert import StateDictAdapter, from_hf_config, to_hf_config
    from mesh_megatron.hf.modeling_mesh import MeshForCausalLM

    model = build(recurrence="toy")
    shake(model)
    adapter = StateDictAdapter(model.model, VOCABULARY, native=False)
    stored = {entry.key: entry.data for entry in model.sharded_state_dict().values() if hasattr(entry, "data")}
    stored = {
        key: tensor for key, tensor in stored.items() if isinstance(tensor, torch.Tensor) and key in adapter.names
    }
    config = to_hf_config(model.model, VOCABULARY, None, native=False)
    exported = MeshForCausalLM(config).eval()
    exported.load_state_dict(dict(adapter.to_hf(key, tensor) for key, tensor in stored.items()))
    torch.testing.assert_close(exported(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-5)
    assert from_hf_config(config.to_dict(), "here")[0].recurrence == "toy"


def test_an_uptrained_model_starts_at_the_base_recursion(toy):
    from mesh_megatron.hf.uptrain import start_at_base

    model = ModelConfig(recurrence="toy", hidden_size=4, num_attention_heads=1)  # type: ignore[arg-type]
    assert start_at_base("recurrence.gain", model).tolist() == [1, 1, 1, 1]
    assert torch.equal(start_at_base("recurrence.mixers.0.weight", model), torch.eye(4))


@pytest.mark.parametrize(
    "fields", [*({"recurrence": scheme} for scheme in SCHEMES), {"router_scale": 0.25}, AROUND], ids=str
)
def test_an_exported_class_starts_as_described(fields):
    """modeling_mesh.py travels with weights and cannot import the description, so it has its own initial values."""
    from mesh_megatron.hf.convert import to_hf_config
    from mesh_megatron.hf.modeling_mesh import MeshForCausalLM
    from mesh_megatron.model.initialize import initial_value

    config = ModelConfig(layout="1+2R3+1", hidden_size=32, num_attention_heads=4, **fields)
    parameters = scheme_spec(config).all_parameters()
    torch.manual_seed(1)
    exported = MeshForCausalLM(to_hf_config(config, VOCABULARY, None, native=False)).model.recurrence
    assert {name: tuple(tensor.shape) for name, tensor in exported.named_parameters()} == {
        name: parameter.shape for name, parameter in parameters.items()
    }
    for name, tensor in exported.named_parameters():
        ours = initial_value(f"recurrence.{name}", tuple(tensor.shape), config, seed=1)
        if parameters[name].start == "normal":
            assert tensor.std().item() == pytest.approx(ours.std().item(), rel=0.2)
        else:
            assert torch.equal(tensor, ours), name
