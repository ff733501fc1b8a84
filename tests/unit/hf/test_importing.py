"""Foreign and own models as checkpoints, and back, bit for bit; plain models made recursive."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from hf_checkpoints import VOCABULARY, tiny, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.config.layout import Layout
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.hf.export import Exporter
from mesh_megatron.hf.import_options import ImportOptions
from mesh_megatron.hf.importing import HubModel, Importer, write_import
from mesh_megatron.hf.uptrain import layer_sources, recursive_config

SIX_LAYERS = tiny(layout="6", recurrence="vanilla")


def save_neox(folder, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6,
        "intermediate_size": 128, "max_position_embeddings": 32, "initializer_range": 0.1, "eos_token_id": 5,
    }  # fmt: skip
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**options, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model.eval()


def import_(source, output, target=None, init="average"):
    hub = HubModel(source)
    output.mkdir()
    Importer(hub, target or hub.model, init).write(output)
    return hub


def export(save, output):
    output.mkdir()
    Exporter(CheckpointReader(save)).write(output)


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("changes", [{}, {"use_parallel_residual": False}, {"dtype": torch.bfloat16}])
def test_gpt_neox_and_back_bit_for_bit(tmp_path, changes):
    save_neox(tmp_path / "hub", **changes)
    import_(tmp_path / "hub", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "export")
    before, after = tensors_of(tmp_path / "hub"), tensors_of(tmp_path / "export")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["model_type"] == "gpt_neox" and config["eos_token_id"] == 5


@pytest.mark.parametrize("recurrence", ["mesh", "dynamic", "anchor+anchor_emb", "vanilla+mesh"])
def test_our_export_and_back_bit_for_bit(tmp_path, recurrence):
    tensors = write_checkpoint(tmp_path / "run", tiny(recurrence=recurrence))
    export(tmp_path / "run", tmp_path / "export")
    import_(tmp_path / "export", tmp_path / "again")
    reader = CheckpointReader(tmp_path / "again")
    assert reader.shapes.keys() == tensors.keys()
    assert all(torch.equal(reader.read([key])[key], tensor) for key, tensor in tensors.items())
    assert reader.resolved["iteration"] == 0
    settings = yaml.safe_load((tmp_path / "again" / "model.yaml").read_text())
    assert settings["model"].get("recurrence", "mesh") == recurrence


def test_weights_are_read_one_by_one(tmp_path, monkeypatch):
    """While a checkpoint is written, at most a few of the model's tensors are alive."""
    import weakref

    save_neox(tmp_path / "hub")
    alive: list[weakref.ref] = []
    most = 0
    read = HubModel.read

    def counting(hub, key):
        nonlocal most
        tensor = read(hub, key)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(HubModel, "read", counting)
    hub = import_(tmp_path / "hub", tmp_path / "run")
    assert len(alive) == len(hub.adapter.shapes) and most <= 3


def test_which_layers_become_the_core():
    layout = Layout.parse("1+2R3+1")
    assert layer_sources(8, layout, "first") | {} == {
        ("prelude", 0): [0], ("core", 0): [1], ("core", 1): [2], ("coda", 0): [7]
    }  # fmt: skip
    assert layer_sources(8, layout, "select")["core", 1] == [6]
    averages = layer_sources(8, layout, "average")
    assert (averages["core", 0], averages["core", 1]) == ([1, 3, 5], [2, 4, 6])
    unshared = layer_sources(6, Layout.parse("1+2+2+1"), "first")
    assert [unshared["core", i] for i in range(4)] == [[1], [2], [3], [4]]
    with pytest.raises(ValueError, match="--init average needs a multiple of 2"):
        layer_sources(7, layout, "average")
    with pytest.raises(ValueError, match="leaves 1 between.*its core needs at least 2"):
        layer_sources(3, layout, "first")
    with pytest.raises(ValueError, match="unshared loops need exactly 4"):
        layer_sources(7, Layout.parse("1+2+2+1"), "first")


@pytest.mark.parametrize("init", ["first", "average", "select"])
def test_a_plain_model_becomes_recursive(tmp_path, init):
    save_neox(tmp_path / "hub")
    plain = HubModel(tmp_path / "hub")
    import_(tmp_path / "hub", tmp_path / "run", recursive_config(plain.model, "1+2R2+1", "mesh"), init)
    made, source = CheckpointReader(tmp_path / "run"), tensors_of(tmp_path / "hub")
    weight = "mlp.dense_4h_to_h.weight"
    layers = [source[f"gpt_neox.layers.{i}.{weight}"] for i in range(6)]
    expected = {
        "first": (layers[1], layers[2]),
        "average": ((layers[1] + layers[3]) / 2, (layers[2] + layers[4]) / 2),
        "select": (layers[1], layers[4]),
    }[init]
    for index, tensor in enumerate(expected):
        key = f"core.layers.{index}.mlp.linear_fc2.weight"
        assert torch.equal(made.read([key])[key], tensor)
    last = made.read(["coda.layers.0.mlp.linear_fc2.weight"])["coda.layers.0.mlp.linear_fc2.weight"]
    assert torch.equal(last, layers[5])
    assert made.config.model.embedding_scaling is False and made.config.model.padded_vocab_size == VOCABULARY


@torch.no_grad()
def test_uptraining_starts_near_the_base_recursion(tmp_path):
    save_neox(tmp_path / "hub")
    plain = HubModel(tmp_path / "hub").model
    ids = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    logits = {}
    options = {
        "mesh, sigmoid": {"router_gate": "sigmoid", "router_input": "rmsnorm"},
        "base, differences": {"loop_lora_rank": 4},
    }
    near = ("mesh", "mesh, sigmoid", "decay", "attend")
    same = ("static", "dynamic", "adapter", "hyper", "hyper-dynamic", "base, differences")
    for recurrence in ("base", *same, *near, "residual"):
        run, output = tmp_path / recurrence, tmp_path / f"{recurrence}-export"
        scheme = recurrence.partition(",")[0]
        target = recursive_config(plain, "1+2R3+1", scheme, **options.get(recurrence, {}))
        import_(tmp_path / "hub", run, target, "select")
        export(run, output)
        logits[recurrence] = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)(ids).logits
    for recurrence in same:
        torch.testing.assert_close(logits[recurrence], logits["base"], msg=recurrence)
    spread = logits["base"].std()
    for recurrence in near:
        assert 0 < (logits[recurrence] - logits["base"]).std() < 0.05 * spread, recurrence
    assert (logits["residual"] - logits["base"]).std() > 0.1 * spread, "the measure can tell schemes apart"


def test_differences_of_loops_start_in_the_dtype_of_their_matrix(tmp_path):
    save_neox(tmp_path / "hub", dtype=torch.bfloat16)
    plain = HubModel(tmp_path / "hub").model
    import_(tmp_path / "hub", tmp_path / "run", recursive_config(plain, "1+2R3+1", "mesh", loop_lora_rank=8), "select")
    reader = CheckpointReader(tmp_path / "run")
    for index in range(2):
        down, up = (f"core.layers.{index}.mlp.linear_fc1.loop_{part}" for part in ("down", "up"))
        tensors = reader.read([down, up])
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
        assert tensors[down].shape == (3, 8, 32) and tensors[up].shape == (3, 128, 8) and not tensors[up].any()
        assert tensors[down].float().std().item() == pytest.approx(0.1, rel=0.1)
    export(tmp_path / "run", tmp_path / "export")
    import_(tmp_path / "export", tmp_path / "again")
    again = CheckpointReader(tmp_path / "again")
    assert reader.shapes == again.shapes
    assert torch.equal(again.read([down])[down], reader.read([down])[down])


@torch.no_grad()
def test_an_import_may_share_keys_and_values(tmp_path):
    """With the weights of one that does not; by its command, which hands the flag on to the export."""
    save_neox(tmp_path / "hub")
    ids = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    models = []
    for share in (False, True):
        run, output = tmp_path / f"run-{share}", tmp_path / f"export-{share}"
        options = {"layout": "1+2R3+1", "recurrence": "base", "share_kv_across_loops": share}
        write_import(HubModel(tmp_path / "hub"), ImportOptions(output=run, **options))
        export(run, output)
        models.append(AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True))
    apart, sharing = models
    assert sharing.config.share_kv_across_loops and sharing.config.num_hidden_layers == 4
    assert not torch.allclose(sharing(ids).logits, apart(ids).logits, atol=1e-3)
    sharing.load_state_dict(apart.state_dict())
    for model in models:
        model.set_num_loops(1)
    assert torch.equal(sharing(ids).logits, apart(ids).logits)
    with pytest.raises(ValueError, match="--share-kv-across-loops is for --layout"):
        ImportOptions(output=tmp_path / "new", share_kv_across_loops=True).validate()


@torch.no_grad()
def test_an_uptrained_model_may_have_an_exit_gate(one_rank, tmp_path):
    """It starts as in training from scratch: its first loss is that of the base recursion, weighted by its exits."""
    from mesh_megatron.model.initialize import initial_value
    from mesh_megatron.model.layer import layer_specs
    from mesh_megatron.model.mesh_model import MeshModel
    from mesh_megatron.model.transformer_config import transformer_config

    save_neox(tmp_path / "hub")
    plain = HubModel(tmp_path / "hub").model
    target = recursive_config(plain, "1+2R3+1", "base", exit_gate=True)
    import_(tmp_path / "hub", tmp_path / "run", target, "select")
    reader = CheckpointReader(tmp_path / "run")
    assert reader.config.model == target
    gate = reader.read(["recurrence.exit_gate.weight", "recurrence.exit_gate.bias"])
    for name, tensor in gate.items():
        assert torch.equal(tensor, initial_value(name, tuple(tensor.shape), target, TrainingConfig().seed)), name
    weight, bias = gate.values()
    assert weight.std().item() == pytest.approx(target.init_method_std, rel=0.5) and not bias.any()
    export(tmp_path / "run", tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    ids = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    expected, left = torch.zeros(4, 15), torch.zeros(4, 16)
    for loops in (1, 2, 3):
        model.set_num_loops(loops)
        out = model(ids, output_hidden_states=True)
        leave = (out.loop_states[-2] @ weight[0] + bias).sigmoid() if loops < 3 else torch.ones(4, 16)
        share = (1 - left) * leave
        left = left + share
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        expected += share[:, :-1] * loss
    trained = MeshModel(target, transformer_config(target), VOCABULARY, layer_specs(target))
    for entry in trained.sharded_state_dict().values():
        if isinstance(getattr(entry, "data", None), torch.Tensor):
            entry.data.copy_(reader.read([entry.key])[entry.key])
    outcome = trained(ids[:, :-1], None, ids[:, 1:])
    assert outcome[1].item() == pytest.approx(expected.sum().item(), rel=1e-5)


def test_only_plain_models_become_recursive():
    with pytest.raises(ValueError, match="already recursive .*drop --layout"):
        recursive_config(tiny(recurrence="base"), "1+2R2+1", "mesh")
    with pytest.raises(ValueError, match="already passes state .*drop --layout"):
        recursive_config(tiny(recurrence="vanilla+mesh"), "1+2R2+1", "mesh")
    with pytest.raises(ValueError, match="--num-memory-slots 3.*at least 4"):
        recursive_config(SIX_LAYERS, "1+2R2+1", "mesh", num_memory_slots=3)
    with pytest.raises(ValueError, match="does not parse"):
        recursive_config(SIX_LAYERS, "1+2x2+1", "mesh")


def overwrite(path, content):
    path.write_bytes(content)


def shard(hub, number):
    """One of the several weight files of a folder."""
    return sorted(hub.glob("model-*.safetensors"))[number]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda hub: (hub / "config.json").unlink(), "cannot read config.json"),
        (lambda hub: overwrite(hub / "config.json", b"{"), "config.json is not JSON"),
        (lambda hub: overwrite(hub / "config.json", b"[]"), "config.json holds no settings"),
        (lambda hub: overwrite(hub / "config.json", b'{"model_type": "bert"}'), "'bert' cannot be imported"),
        (
            lambda hub: overwrite(hub / "config.json", b'{"model_type": "gpt_neox", "hidden_size": "wide"}'),
            "does not describe a gpt_neox: .*'hidden_size'.*'wide'",
        ),
        (lambda hub: overwrite(shard(hub, 0), b"junk"), "model-00001-of-.*.safetensors: not a safe"),
        (lambda hub: shard(hub, 1).unlink(), "model-00002-of-.*.safetensors: not a safe"),
        (lambda hub: overwrite(hub / "model.safetensors.index.json", b"{}"), "not an index"),
        (
            lambda hub: overwrite(hub / "model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}'),
            "../x.safetensors lies outside",
        ),
    ],
)
def test_damaged_folders(tmp_path, damage, complaint):
    save_neox(tmp_path / "hub")
    damage(tmp_path / "hub")
    with pytest.raises(ValueError, match=complaint):
        HubModel(tmp_path / "hub")


def test_a_truncated_safetensors_file(tmp_path):
    save_neox(tmp_path / "hub")
    path = shard(tmp_path / "hub", 2)
    overwrite(path, path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model-00003-of-.*.safetensors: not a safetensors file, or a damaged one"):
        HubModel(tmp_path / "hub")


def test_pickled_weights_are_not_read(tmp_path):
    save_neox(tmp_path / "hub")
    (tmp_path / "pickled").mkdir()
    shutil.copyfile(tmp_path / "hub/config.json", tmp_path / "pickled/config.json")
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is pickled and not read"):
        HubModel(tmp_path / "pickled")


def test_missing_and_misshapen_tensors(tmp_path):
    export_folder = tmp_path / "export"
    write_checkpoint(tmp_path / "run", tiny())
    export(tmp_path / "run", export_folder)
    tensors = load_file(export_folder / "model.safetensors")
    router = tensors.pop("model.recurrence.routers.2.bias")
    save_file(tensors, export_folder / "model.safetensors")
    with pytest.raises(ValueError, match="missing model.recurrence.routers.2.bias"):
        HubModel(export_folder)
    save_file({**tensors, "model.recurrence.routers.2.bias": router[:4]}, export_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"routers.2.bias is \[4\], the model it describes needs \[10\]"):
        HubModel(export_folder)


@torch.no_grad()
def test_a_folder_saved_twice_is_read_as_transformers_reads_it(tmp_path):
    """A single file before an index, which saving leaves where it once wrote several files."""
    hub = tmp_path / "hub"
    save_neox(hub)
    again = GPTNeoXForCausalLM.from_pretrained(hub)
    again.get_output_embeddings().weight.mul_(2)
    again.save_pretrained(hub)
    assert (hub / "model.safetensors.index.json").exists() and not list(hub.glob("model-*"))
    expected = again.get_output_embeddings().weight
    assert torch.equal(GPTNeoXForCausalLM.from_pretrained(hub).get_output_embeddings().weight, expected)
    assert torch.equal(HubModel(hub).read("output_layer.weight"), expected)


@pytest.mark.parametrize("kind", ["mesh", "gpt_neox"])
def test_a_rotary_base_with_a_fraction_is_refused(tmp_path, kind):
    """It would be trained with another base than the model's."""
    if kind == "mesh":
        write_checkpoint(tmp_path / "run", tiny())
        export(tmp_path / "run", tmp_path / "hub")
    else:
        save_neox(tmp_path / "hub")
    path = tmp_path / "hub/config.json"
    content = json.loads(path.read_text())
    content.get("rope_parameters", {}).pop("rope_theta", None)
    path.write_text(json.dumps(content | {"rotary_base" if kind == "mesh" else "rotary_emb_base": 10000.5}))
    with pytest.raises(ValueError, match=r"hub: rotary base 10000.5 cannot be trained here: --rotary-base is a whole"):
        HubModel(tmp_path / "hub")


def test_a_model_of_the_hub_must_be_here_first(tmp_path):
    with pytest.raises(ValueError, match="pythia-70m: no such folder; .* hf download ID --local-dir"):
        HubModel(tmp_path / "EleutherAI" / "pythia-70m")


def test_an_end_of_document_may_be_an_empty_list(tmp_path):
    save_neox(tmp_path / "hub", eos_token_id=[])
    assert HubModel(tmp_path / "hub").eod is None
