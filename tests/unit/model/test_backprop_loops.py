"""Gradients through the last loops only: those of the equation in which the first loops are constants."""

from __future__ import annotations

import pytest
import torch
from test_mesh_model import VOCABULARY, build, shake

pytestmark = pytest.mark.usefixtures("one_rank")
TOKENS = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
WEIGHTS = torch.randn(2, 16, VOCABULARY, generator=torch.Generator().manual_seed(3))
SCHEMES = ["anchor", "residual+anchor+anchor_emb", "static", "dynamic", "decay", "attend", "mesh"]


def literal(model, cut: int) -> torch.Tensor:
    """Logits; what cycles 1..cut compute is detached."""
    scheme, recurrence = model.model.scheme, model.recurrence
    h_emb = model.embed(TOKENS)
    rotations = model.rotations(h_emb)
    state = first = h_emb
    outputs, writes = [], []
    for cycle in range(recurrence.loops + 1):
        constant = 1 <= cycle <= cut
        entering = state.detach() if cut and 1 <= cycle <= cut + 1 else state
        output = model.block(cycle)(entering, None, rotary_pos_emb=rotations)
        if scheme == "mesh":
            router = recurrence.routers[recurrence.spec.own_cycle(cycle, recurrence.loops)]
            write, read = ((entering @ router.weight.T + router.bias).chunk(2, -1)[half].softmax(-1) for half in (0, 1))
            outputs.append(output.detach() if constant else output)
            writes.append(write.detach() if constant else write)
            state = read[..., :1] * h_emb
            for written, earlier in zip(writes, outputs, strict=True):
                state = state + (read * written).sum(-1, keepdim=True) * earlier
        elif scheme == "attend":
            outputs.append(output.detach() if constant else output)
            history = torch.stack([h_emb, *outputs])
            own = [recurrence.spec.own_cycle(c, recurrence.loops) for c in range(cycle + 1)]
            query = recurrence.queries[own[-1]]
            bias = query.bias[[0, *(c + 1 for c in own)]]
            keys = history / (history.square().mean(-1, keepdim=True) + model.model.norm_epsilon).sqrt()
            weights = (keys @ query.weight + bias[:, None, None]).softmax(0)
            state = (weights[..., None] * history).sum(0)
        elif cycle == 0:
            state = first = output
        elif scheme == "decay":
            decay, injected = recurrence.decay.logit.sigmoid(), recurrence.injection.weight * first
            state = decay * output + injected
        elif scheme in ("static", "dynamic"):
            if scheme == "static":
                a1, a2, a3 = recurrence.coefficients
            else:
                a1, a2, a3 = (entering @ recurrence.router.weight.T + recurrence.router.bias).unsqueeze(-2).unbind(-1)
            state = a1 * output + a2 * first + a3 * h_emb
        else:
            sources = {"residual": entering, "anchor": first, "anchor_emb": h_emb}
            state = output + sum(sources[term] for term in scheme.split("+"))
    return model.head(model.coda(state, None, rotary_pos_emb=rotations))


def gradients(model, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logits * WEIGHTS).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("loops", "learned"), [(4, 1), (4, 3), (3, 2)])
@pytest.mark.parametrize("scheme", [*SCHEMES, "mesh slots"])
def test_gradients_are_those_of_the_equation(scheme, loops, learned):
    scheme, _, slots = scheme.partition(" ")
    model = build(recurrence=scheme, layout="1+2R4+1", **({"memory_kernel": "slots"} if slots else {}))
    shake(model)
    model.set_loops(loops)
    as_usual = model(TOKENS)
    complete = gradients(model, as_usual)
    model.config.backprop_loops = learned
    logits = model(TOKENS)
    assert torch.equal(logits, as_usual)
    found = gradients(model, logits)
    expected = gradients(model, literal(model, loops - learned))
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 2e-4 * gradient.norm(), name
    core = "core.0.layers.0.mlp.linear_fc1.weight"
    assert (found[core] - complete[core]).norm() > 1e-2 * complete[core].norm()
    assert all(found[name].any() for name in found if name.startswith(("prelude", "embedding")) and "weight" in name)


def test_the_first_loops_keep_nothing():
    def kept(learned: int | None) -> int:
        model = build(recurrence="anchor", layout="1+4R6+1")
        model.config.backprop_loops = learned
        held: list[torch.Tensor] = []  # alive until the end, so that no storage is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            held.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(TOKENS, None, TOKENS)
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    everything, five, one = kept(None), kept(5), kept(1)
    assert everything - five == pytest.approx((everything - one) / 5, rel=0.02)
    assert everything - five > 0.1 * everything


def test_plans_leave_out_what_is_not_computed():
    from mesh_megatron.config.loops import LoopsConfig
    from mesh_megatron.config.model import ModelConfig
    from mesh_megatron.config.run import RunConfig
    from mesh_megatron.config.training import TrainingConfig
    from mesh_megatron.planning.plan import plan_run

    def plan(loops: int, learned: int | None):
        model = ModelConfig(layout=f"1+4R{loops}+1", recurrence="anchor", padded_vocab_size=128)
        training = TrainingConfig(train_iters=1)
        return plan_run(RunConfig(model=model, loops=LoopsConfig(backprop_loops=learned), training=training), 1)

    complete, cut, two = plan(6, None), plan(6, 2), plan(2, None)
    layers = complete.summary.flops_per_token.total - two.summary.flops_per_token.total  # of four loops
    assert cut.summary.flops_per_token.total == complete.summary.flops_per_token.total - layers * 2 // 3
    assert cut.fullest.activations == two.fullest.activations
