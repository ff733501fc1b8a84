"""Requirements of other projects' servers, quantisers and trainers on a model and its configuration."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import make_config, randomize
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from mesh_megatron.hf.configuration_mesh import MeshConfig
from mesh_megatron.hf.modeling_mesh import (
    ComputedAttention,
    MeshForCausalLM,
    MeshForSequenceClassification,
    MeshForTokenClassification,
)

LOOPED = [{}, {"num_loops": 3}, {"share_core": False}, {"num_key_value_heads": 2}, {"recurrence": "anchor_emb"}]
SHARING = {"share_kv_across_loops": True, "num_loops": 3}
LOOPED.append(SHARING)


@pytest.mark.parametrize("changes", LOOPED)
def test_each_computed_layer_has_a_module_that_attends(make_model, changes):
    """One per cache entry, numbered in order, one number in its name, and without weights (vLLM asks for all of it)."""
    model = make_model(**changes)
    found = {name: part for name, part in model.named_modules() if isinstance(part, ComputedAttention)}
    assert [part.layer_idx for part in found.values()] == list(range(model.config.num_hidden_layers))
    assert all(re.findall(r"\d+", name) == [str(part.layer_idx)] for name, part in found.items())
    assert not any(list(part.parameters()) for part in found.values())


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{"num_loops": 3}, SHARING, pytest.param({"share_core": False}, marks=pytest.mark.full)]
)
def test_continuous_batching_generates_what_generate_does(make_model, changes):
    model = make_model(**changes)
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12], list(range(20, 50))]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = [model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in prompts]
    config = GenerationConfig(**settings, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else it takes most of the machine's memory
    found = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=pages)
    assert [found[key].generated_tokens for key in sorted(found)] == expected


def test_linear_layers_are_plain_and_routers_are_none(make_model):
    """Who quantises or adapts ``nn.Linear`` gets every projection and no router."""
    for recurrence in ("mesh", "dynamic"):
        parts = dict(make_model(recurrence=recurrence).named_modules())
        linear = {name for name, part in parts.items() if isinstance(part, nn.Linear)}
        assert all(type(parts[name]) is nn.Linear for name in linear)
        assert {name.rpartition(".")[2] for name in linear} == {
            "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head",
        }  # fmt: skip


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("recurrence", ["mesh", "static"])
def test_routers_stay_float32_whatever_a_client_does(make_model, ids, recurrence, convert):
    model = make_model(recurrence=recurrence)
    before = [parameter.clone() for parameter in model.model.recurrence.parameters()]
    getattr(model, convert)()
    assert model.lm_head.weight.dtype != torch.float32
    for old, new in zip(before, model.model.recurrence.parameters(), strict=True):
        assert new.dtype == torch.float32 and torch.equal(old, new)
    assert model(ids).logits.isfinite().all()


def test_number_of_cache_entries_is_written_and_cannot_be_set(tmp_path: Path):
    make_config(num_loops=3).save_pretrained(tmp_path)
    assert '"num_hidden_layers": 8' in (tmp_path / "config.json").read_text()
    assert MeshConfig.from_pretrained(tmp_path).num_hidden_layers == 8
    refusal = r"num_hidden_layers 2 cannot be set: it counts .* cache entries, 8 .*num_loops 3.*leave it out"
    with pytest.raises(ValueError, match=refusal):
        MeshConfig.from_pretrained(tmp_path, num_hidden_layers=2)
    with pytest.raises(ValueError, match=refusal):
        make_config(num_loops=3, num_hidden_layers=2)


def test_rotary_parameters_work_or_are_refused(tmp_path: Path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    make_config().save_pretrained(tmp_path)
    config = MeshConfig.from_pretrained(tmp_path, rope_parameters=yarn)
    assert config.rope_parameters == yarn | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config.save_pretrained(tmp_path)
    assert MeshConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    assert (config.rotary_base, config.rotary_percent, config.rotary_scaling) == (500.0, 0.5, None)
    with pytest.raises(ValueError, match="rope_type 'dynamic' is not one of default, linear, llama3, yarn"):
        make_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0})


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        (MeshForCausalLM, AutoModelForCausalLM),
        (MeshForSequenceClassification, AutoModelForSequenceClassification),
        (MeshForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_what_the_package_saves_loads_without_it(tmp_path: Path, ids, kind, auto):
    model = kind(make_config(num_labels=3, pad_token_id=0)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_mesh.py", "modeling_mesh.py"}
    loaded = auto.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(loaded).__module__.startswith("transformers_modules")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    if kind is MeshForSequenceClassification:
        assert model(ids).logits.shape == (3, 3)
    assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=True)).__name__ == "MeshModel"  # as vLLM loads it
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert config.num_hidden_layers == model.config.num_hidden_layers


@pytest.mark.full
def test_flex_attention_is_exact():
    """In a process of its own: this one calls the CPU a GPU, which torch's compiler takes for one."""
    code = """if True:
        import torch
        from hf_models import make_config, randomize
        from mesh_megatron.hf.modeling_mesh import MeshForCausalLM
        model = MeshForCausalLM(make_config(num_key_value_heads=2)).eval()
        randomize(model)
        ids, mask = torch.arange(36).view(3, 12), (torch.arange(12) >= torch.tensor([[0], [3], [7]])).long()
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits
            model.set_attn_implementation("flex_attention")
            found = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
        print("equal")
    """
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[3])])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.stdout.endswith("equal\n"), run.stderr


def test_operations_count_each_computed_layer(make_model, ids):
    """A shared core has the operations of an unshared one: as many layers run, and the other's weights count them."""
    shared, unshared = (make_model(num_loops=3, share_core=share) for share in (True, False))
    assert shared.num_parameters() < unshared.num_parameters()
    counted = shared.floating_point_ops({"input_ids": ids})
    assert counted == 6 * ids.numel() * unshared.num_parameters(exclude_embeddings=True)
    assert counted == unshared.floating_point_ops({"input_ids": ids})
    plain = make_model(num_loops=0, num_core_layers=0, recurrence="base")
    weights = plain.num_parameters(exclude_embeddings=True)
    assert plain.floating_point_ops({"input_ids": ids}) == 6 * ids.numel() * weights


def test_no_pipeline_plan_is_claimed(make_model):
    """Several lists of layers, by which vLLM refuses pipeline stages instead of running a shared core once."""
    model = make_model()
    lists = [name for name in model.model._pp_plan if isinstance(getattr(model.model, name), nn.ModuleList)]
    assert len(lists) > 1


@pytest.mark.full
@torch.no_grad()
@pytest.mark.parametrize("share", [False, True])
def test_compiled_generation_with_a_static_cache_compiles_once_for_each_length(make_model, share):
    from torch._dynamo.utils import counters

    model = make_model(
        num_loops=4, share_kv_across_loops=share
    )  # more computed layers than the compiler permits versions of one function
    prompts = [torch.arange(5, 13)[None], torch.arange(5, 10)[None], torch.arange(5, 12)[None]]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = [model.generate(prompt, **settings) for prompt in prompts]
    torch._dynamo.reset()
    counters.clear()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    found = [model.generate(prompt, cache_implementation="static", **settings) for prompt in prompts]
    assert all(torch.equal(new, old) for new, old in zip(found, expected, strict=True))
    assert counters["stats"]["unique_graphs"] <= 3  # a prompt of one length, of any length, a token


def test_an_old_transformers_is_named(monkeypatch):
    path = Path(transformers.__file__)
    code = Path("mesh_megatron/hf/configuration_mesh.py")
    source = (Path(__file__).parents[3] / code).read_text()
    monkeypatch.setattr(transformers, "__version__", "5.3.0")
    with pytest.raises(ImportError, match=r"needs transformers 5\.4 or newer, and 5\.3\.0 is installed"):
        exec(compile(source, str(path), "exec"), {"__name__": "configuration_mesh"})


@torch.no_grad()
def test_differences_of_loops_are_not_split_over_ranks(make_model, ids):
    """transformers runs such a core on every rank; vLLM's attention would take half of the heads of a split one."""
    from types import SimpleNamespace

    model = make_model(loop_lora_rank=2)
    assert {name.split(".")[0] for name in model.config.base_model_tp_plan} == {"prelude", "coda"}
    entries = range(model.config.num_hidden_layers)
    complete, halves = ({entry: SimpleNamespace(num_heads=heads) for entry in entries} for heads in (4, 2))
    assert torch.equal(model(ids, attention_instances=complete).logits, model(ids).logits)
    with pytest.raises(ValueError, match="vLLM cannot split the core"):
        model(ids, attention_instances=halves)


def test_operations_of_weights_of_a_loop_count_once_in_it(make_model, ids):
    differing, plain = make_model(loop_lora_rank=2, num_loops=3), make_model(num_loops=3)
    differences = sum(weight.numel() for name, weight in differing.named_parameters() if "_difference" in name)
    counts = [model.floating_point_ops({"input_ids": ids}) for model in (differing, plain)]
    assert counts[0] - counts[1] == 6 * ids.numel() * differences


def test_operations_of_embeddings_as_input(make_model, ids):
    model = make_model()
    embeds = model.get_input_embeddings()(ids)
    assert model.floating_point_ops({"inputs_embeds": embeds}) == model.floating_point_ops({"input_ids": ids})


@torch.no_grad()
def test_an_evaluation_takes_logits_alone(make_model, ids):
    """Trainer takes all that an output holds and the configuration does not tell it to ignore; not the cache."""
    model = make_model(num_loops=3)
    model.config.exit_criterion, model.config.exit_threshold = "change", 0.1
    out = model(ids, use_cache=True)
    assert out.exit_loops is not None
    assert set(out) - set(model.config.keys_to_ignore_at_inference) == {"logits"}
    assert {"cache", "past_key_values"} <= set(model.config.keys_to_ignore_at_inference)  # its name depends on versions
