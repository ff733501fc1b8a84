"""Models whose core runs another number of times than their layout says."""

from __future__ import annotations

import pytest
import torch
from test_mesh_model import SCHEMES, VOCABULARY, build, shake

pytestmark = pytest.mark.usefixtures("one_rank")
TOKENS = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
AROUND = {
    "recurrence": "residual",
    "loop_norm": True,
    "loop_embedding": True,
    "per_loop_norms": True,
    "sandwich_norm": True,
}
DIFFERENCES = {"loop_lora_rank": 3, "swiglu": True}
WITH_PARAMETERS_OF_A_LOOP = ("mesh", "hyper", "hyper-dynamic", "attend")
# Router of each cycle by number of loops, of a model with routers 0..3 (trained with three loops).
ROUTERS = {1: [0, 3], 2: [0, 1, 3], 3: [0, 1, 2, 3], 4: [0, 1, 2, 2, 3], 6: [0, 1, 2, 2, 2, 2, 3]}
ROUTERS_OF_ONE = {1: [0, 1], 2: [0, 1, 1], 4: [0, 1, 1, 1, 1]}


def literal(model, routers: list[int]) -> torch.Tensor:
    """Logits of mesh with slots; a router that writes again replaces what it wrote before."""
    h_emb = state = model.embed(TOKENS)
    rotations = model.rotations(h_emb)
    slots = [h_emb] + [torch.zeros_like(h_emb) for _ in range(model.model.memory_slots - 1)]
    written: dict[int, list[torch.Tensor]] = {}
    for cycle, number in enumerate(routers):
        router = model.recurrence.routers[number]
        write, read = ((state @ router.weight.T + router.bias).chunk(2, -1)[half].softmax(-1) for half in (0, 1))
        output = model.block(min(cycle, 1))(state, None, rotary_pos_emb=rotations)
        before = written.get(number, [torch.zeros_like(h_emb)] * len(slots))
        written[number] = [write[..., b : b + 1] * output for b in range(len(slots))]
        slots = [slot - old + new for slot, old, new in zip(slots, before, written[number], strict=True)]
        state = sum(read[..., b : b + 1] * slot for b, slot in enumerate(slots))
    return model.head(model.coda(state, None, rotary_pos_emb=rotations))


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"memory_kernel": "slots"}], ids=["torch", "slots"])
@pytest.mark.parametrize(("trained", "table"), [(3, ROUTERS), (1, ROUTERS_OF_ONE)])
def test_mesh_takes_the_routers_of_the_rule(trained, table, fields):
    model = build(recurrence="mesh", layout=f"1+2R{trained}+1", **fields)
    shake(model)
    as_trained = model(TOKENS)
    for loops, routers in table.items():
        model.set_loops(loops)
        torch.testing.assert_close(model(TOKENS), literal(model, routers), rtol=1e-4, atol=2e-6)
        assert torch.equal(model(TOKENS), as_trained) == (loops == trained)


@torch.no_grad()
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in WITH_PARAMETERS_OF_A_LOOP])
def test_schemes_without_parameters_of_a_loop_just_run_more_often(scheme):
    model = build(recurrence=scheme)
    shake(model)
    for loops in (1, 2, 5):
        other = build(recurrence=scheme, layout=f"1+2R{loops}+1")
        other.load_state_dict(model.state_dict())
        model.set_loops(loops)
        assert torch.equal(model(TOKENS), other(TOKENS))


@pytest.mark.parametrize("recurrence", WITH_PARAMETERS_OF_A_LOOP)
def test_parameters_that_fewer_loops_leave_out_get_a_gradient_of_zero(recurrence):
    model = build(recurrence=recurrence)
    shake(model)
    model.set_loops(1)
    taken = []
    for module in model.recurrence.modules():
        module.register_forward_pre_hook(lambda module, args: taken.extend(module.parameters(recurse=False)))
    model(TOKENS, None, TOKENS).mean().backward()
    assert {id(parameter) for parameter in model.recurrence.parameters()} == {id(parameter) for parameter in taken}
    zero = {name: not parameter.grad.any() for name, parameter in model.named_parameters()}
    assert {name.split(".")[2] for name, empty in zero.items() if empty} == {"1", "2"}


def test_gradients_of_fewer_loops_are_those_of_the_equation():
    model = build(recurrence="mesh")
    shake(model)
    model.set_loops(2)
    weights = torch.randn(2, 16, VOCABULARY, generator=torch.Generator().manual_seed(3))
    (model(TOKENS) * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    (literal(model, ROUTERS[2]) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found[name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_what_cannot_loop_otherwise_is_refused():
    with pytest.raises(ValueError, match=r"--layout 1\+2\+2\+1 cannot run its core 3 times"):
        build(layout="1+2+2+1").set_loops(3)
    model = build()
    with pytest.raises(ValueError, match="cannot run its core 0 times"):
        model.set_loops(0)
    model.set_loops(4)
    with pytest.raises(ValueError, match="at most the 3 loops of --layout, not 4"):
        model(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("loops", [1, 2, 3, 5])
@pytest.mark.parametrize("fields", [*({"recurrence": name} for name in SCHEMES), AROUND, DIFFERENCES], ids=str)
def test_an_export_follows(fields, loops):
    from mesh_megatron.hf.convert import StateDictAdapter, to_hf_config
    from mesh_megatron.hf.modeling_mesh import MeshForCausalLM

    model = build(**fields)
    shake(model)
    model.set_loops(loops)
    adapter = StateDictAdapter(model.model, VOCABULARY, native=False)
    stored = {entry.key: entry.data for entry in model.sharded_state_dict().values() if hasattr(entry, "data")}
    exported = MeshForCausalLM(to_hf_config(model.model, VOCABULARY, None, native=False)).eval()
    exported.load_state_dict(
        dict(adapter.to_hf(key, stored[key]) for key in adapter.names if isinstance(stored.get(key), torch.Tensor))
    )
    exported.set_num_loops(loops)
    torch.testing.assert_close(exported(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-5)
