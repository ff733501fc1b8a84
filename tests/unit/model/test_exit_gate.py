"""Losses after every loop: the objective and its gradients are those of the equation, written out in float64."""

from __future__ import annotations

import pytest
import torch
from test_mesh_model import VOCABULARY, build, shake

pytestmark = pytest.mark.usefixtures("one_rank")
TOKENS = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
LABELS = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
MASK = (torch.rand(2, 16, generator=torch.Generator().manual_seed(4)) > 0.3).float()
SCHEMES = ["base", "residual+anchor+anchor_emb", "static", "dynamic", "adapter", "decay", "mesh", "mesh slots"]
SCHEMES += ["hyper", "hyper-dynamic", "attend"]


def built(scheme: str = "mesh", **fields):
    scheme, _, slots = scheme.partition(" ")
    model = build(recurrence=scheme, **({"memory_kernel": "slots"} if slots else {}), **fields).double()
    shake(model)
    return model


def exits_of(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x_t [S, B, D], a token's loss [B, S]) for t = 1..K: each from a model that runs t loops, and no more."""
    loops, found = model.loops, []
    seen: list[torch.Tensor] = []
    hook = model.coda.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for count in range(1, loops + 1):
        model.set_loops(count)
        log_probabilities = model(TOKENS).log_softmax(-1)
        found.append((seen.pop(), -log_probabilities.gather(-1, LABELS[..., None]).squeeze(-1)))
    hook.remove()
    model.set_loops(loops)
    return found


def gate_of(model, state: torch.Tensor) -> torch.Tensor:
    gate = model.recurrence.exit_gate
    return torch.sigmoid((state * gate.weight[0]).sum(-1) + gate.bias).T


def literal_stage_one(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum over tokens of sum_t p_t CE_t - beta H(p), and what the log shows."""
    exits = exits_of(model)
    still_there, shares = torch.ones(2, 16, dtype=torch.float64), []
    for state, _ in exits[:-1]:
        leave = gate_of(model, state)
        shares.append(still_there * leave)
        still_there = still_there * (1 - leave)
    shares.append(still_there)
    expected = sum(share * loss for share, (_, loss) in zip(shares, exits, strict=True))
    entropy = -sum(share * share.log() for share in shares)
    shown = {
        "loop loss": torch.stack([loss for _, loss in exits]),
        "share": torch.stack(shares),
        "entropy": entropy,
        "expected": expected,
    }
    objective = ((expected - model.model.exit_entropy_coeff * entropy) * MASK).sum()
    return objective, {name: (value * MASK).sum((-1, -2)) for name, value in shown.items()}


def gradients(model, objective: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    objective.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_expected_loss_is_its_equation(scheme):
    model = built(scheme, exit_gate=True, exit_entropy_coeff=0.7)
    outcome = model(TOKENS, None, LABELS, MASK)
    objective, shown = literal_stage_one(model)
    torch.testing.assert_close(outcome[0].double(), objective, rtol=1e-5, atol=0)
    expected, entropy, gate_loss, *of_loops = outcome[1:].double()
    torch.testing.assert_close(expected, shown["expected"], rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy, shown["entropy"], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack(of_loops[:3]), shown["share"], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack(of_loops[3:]), shown["loop loss"], rtol=1e-5, atol=0)
    assert gate_loss == 0
    wanted = gradients(model, objective)
    for name, found in gradients(model, model(TOKENS, None, LABELS, MASK)[0]).items():
        assert (found - wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name
    assert all(wanted[f"recurrence.exit_gate.{part}"].any() for part in ("weight", "bias"))


@pytest.mark.parametrize("scheme", ["anchor", "mesh"])
def test_weights_of_loops_are_their_proportions(scheme):
    model = built(scheme, loop_loss_weights=(1.0, 0.0, 3.0))
    exits = exits_of(model)
    objective = ((0.25 * exits[0][1] + 0.75 * exits[2][1]) * MASK).sum()
    outcome = model(TOKENS, None, LABELS, MASK)
    torch.testing.assert_close(outcome[:2].double(), objective.expand(2), rtol=1e-5, atol=0)
    wanted = gradients(model, objective)
    for name, found in gradients(model, outcome[0]).items():
        assert (found - wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name


@pytest.mark.parametrize("scheme", ["base", "mesh"])
def test_the_gate_alone_learns_where_loops_stop_improving(scheme):
    settings = {"exit_improvement_slope": 3.0, "exit_improvement_threshold": 0.1}
    model = built(scheme, exit_gate=True, exit_gate_only=True, **settings)
    exits = exits_of(model)
    objective = torch.zeros((), dtype=torch.float64)
    for (_, before), (state, after) in zip(exits, exits[1:], strict=False):
        go_on = torch.sigmoid(3 * (torch.relu(before - after) - 0.1)).detach()
        leave = gate_of(model, state.detach())
        bits = -(go_on * (1 - leave).log() + (1 - go_on) * leave.log())
        objective = objective + (bits * MASK).sum() / 3
    outcome = model(TOKENS, None, LABELS, MASK)
    torch.testing.assert_close(outcome[[0, 3]].double(), objective.detach().expand(2), rtol=1e-5, atol=0)
    _, shown = literal_stage_one(model)
    torch.testing.assert_close(outcome[1].double(), shown["expected"], rtol=1e-5, atol=0)
    wanted = gradients(model, objective)
    found = gradients(model, outcome[0])
    assert {name for name, gradient in found.items() if gradient.any()} == {
        "recurrence.exit_gate.weight", "recurrence.exit_gate.bias",
    }  # fmt: skip
    for name in found:
        assert (found[name] - wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["residual", "mesh", "hyper-dynamic", "attend"])
def test_an_export_has_the_gate(scheme):
    """Its shares of exits are those that training sees."""
    from mesh_megatron.hf.convert import StateDictAdapter, from_hf_config, to_hf_config
    from mesh_megatron.hf.modeling_mesh import MeshForCausalLM

    model = built(scheme, exit_gate=True).float()
    adapter = StateDictAdapter(model.model, VOCABULARY, native=False)
    config = to_hf_config(model.model, VOCABULARY, None, native=False)
    assert from_hf_config(config.to_dict(), "")[0].exit_gate
    stored = {entry.key: entry.data for entry in model.sharded_state_dict().values() if hasattr(entry, "data")}
    exported = MeshForCausalLM(config).eval()
    exported.load_state_dict(dict(adapter.to_hf(key, stored[key]) for key in adapter.names))
    still_there, shares, losses = torch.ones(2, 16), [], []
    for loops in range(1, 4):
        exported.set_num_loops(loops)
        out = exported(TOKENS, output_hidden_states=True)
        leave = exported.model.recurrence.exit_gate(out.loop_states[-2]).squeeze(-1).sigmoid()
        shares.append(still_there * (leave if loops < 3 else 1))
        still_there = still_there * (1 - leave)
        losses.append(-out.logits.log_softmax(-1).gather(-1, LABELS[..., None]).squeeze(-1))
    expected = (torch.stack([*shares, *losses]) * MASK).sum((1, 2))
    torch.testing.assert_close(model(TOKENS, None, LABELS, MASK)[4:], expected, rtol=1e-5, atol=0)
