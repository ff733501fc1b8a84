"""The content of an export folder; only one shard of it is in memory at a time."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hf_checkpoints import VOCABULARY, tiny, write_checkpoint
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mesh_megatron.analysis.curves import read_curves
from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.commands.export_hf import Export
from mesh_megatron.commands.export_hf import export as export_command
from mesh_megatron.hf.export import Exporter
from mesh_megatron.util.staged_folder import staged_folder

PLAIN = tiny(layout="4", recurrence="vanilla")


def export(folder, model, dtype=None, shard_bytes=10**9, **resolved):
    tensors = write_checkpoint(folder / "run", model, **resolved)
    (folder / "export").mkdir()
    exporter = Exporter(CheckpointReader(folder / "run"), dtype, shard_bytes)
    exporter.write(folder / "export")
    return tensors, exporter, folder / "export"


def test_shards_are_bounded_and_complete(tmp_path, monkeypatch):
    read_at_once = []
    read = CheckpointReader.read

    def counting(reader, keys):
        tensors = read(reader, keys)
        read_at_once.append(sum(tensor.nbytes for tensor in tensors.values()))
        return tensors

    monkeypatch.setattr(CheckpointReader, "read", counting)
    tensors, exporter, folder = export(tmp_path, tiny(), shard_bytes=40_000)
    assert len(read_at_once) > 5 and max(read_at_once) <= 40_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for key, tensor in tensors.items():
        name = exporter.adapter.names[key]
        assert torch.equal(load_file(folder / index["weight_map"][name])[name], tensor)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model.lm_head.weight, tensors["output_layer.weight"])


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_every_file_has_the_mode_of_a_new_file(tmp_path, shard_bytes):
    _, _, folder = export(tmp_path, tiny(), shard_bytes=shard_bytes)
    (tmp_path / "new").touch()
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}, modes


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own(tmp_path):
    _, exporter, _ = export(tmp_path, tiny(), shard_bytes=10)
    assert [len(keys) for keys in exporter.shards()] == [1] * len(exporter.adapter.names)


def test_bfloat16_export_keeps_routers_in_float32(tmp_path):
    tensors, exporter, folder = export(tmp_path, tiny(), torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    assert stored["model.recurrence.routers.0.weight"].dtype == torch.float32
    assert stored["model.core.1.mlp.dense_4h_to_h.weight"].dtype == torch.bfloat16
    assert "--dtype" not in (folder / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.dtype == torch.bfloat16 and model.model.recurrence.routers[0].weight.dtype == torch.float32
    router = tensors["recurrence.routers.0.weight"]
    assert torch.equal(model.model.recurrence.routers[0].weight, router)


@torch.no_grad()
def test_a_plain_model_needs_no_remote_code(tmp_path):
    tensors, _, folder = export(tmp_path, PLAIN, eod_id=7)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    expected = tensors["embedding.word_embeddings.weight"] * 32**0.5
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert model.config.eos_token_id == 7


def test_ids_that_only_pad_the_embedding_are_never_sampled(tmp_path):
    _, _, folder = export(tmp_path, tiny(), tokenizer_vocab_size=120, eod_id=3)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.generation_config.suppress_tokens == list(range(120, VOCABULARY))
    assert model.generation_config.eos_token_id == 3
    made = model.generate(torch.tensor([[1, 2]] * 8), max_new_tokens=20, do_sample=True, top_k=0)
    assert made.max() < 120


def test_model_card_tells_how_it_was_trained(tmp_path):
    run = tmp_path / "run"
    write_checkpoint(run, tiny(), consumed_tokens=12345)
    rows = [
        {"iteration": 50, "lm loss": 9.0, "lm loss validation": 8.5},
        {"iteration": 100, "lm loss": 3.25},
        {"iteration": 110, "lm loss": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 1')
    (tmp_path / "export").mkdir()
    Exporter(CheckpointReader(run)).write(tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    for text in (
        "trust_remote_code=True",
        "| lm loss | 3.2500 |",
        "| lm loss validation | 8.5000 |",
        "12,345",
        "1+2R2+1",
    ):
        assert text in card
    assert str(tmp_path) not in card
    assert "bytes per token in float32" in card and str(2 * 6 * 32 * 4) in card.replace(",", "")


@pytest.mark.parametrize(
    ("optimizer", "row"), [("adam", "AdamW, betas"), ("sgd", "SGD, momentum 0.9,"), ("muon", "Muon, momentum 0.95,")]
)
def test_model_card_names_the_optimizer(tmp_path, optimizer, row):
    write_checkpoint(tmp_path / "run", tiny())
    record = next(tmp_path.glob("run/*/run_config.json"))
    config = json.loads(record.read_text())
    config["training"]["optimizer"] = optimizer
    record.write_text(json.dumps(config))
    (tmp_path / "export").mkdir()
    Exporter(CheckpointReader(tmp_path / "run")).write(tmp_path / "export")
    assert f"| optimizer | {row}" in (tmp_path / "export" / "README.md").read_text()


def test_model_card_names_whose_scheme_it_is(tmp_path):
    for scheme, origin in {"adapter": " of [Huginn](", "mesh": " of [MeSH](", "base": ".\n"}.items():
        write_checkpoint(tmp_path / scheme, tiny(recurrence=scheme))
        (tmp_path / "export" / scheme).mkdir(parents=True)
        Exporter(CheckpointReader(tmp_path / scheme)).write(tmp_path / "export" / scheme)
        assert f"by the scheme `{scheme}`{origin}" in (tmp_path / "export" / scheme / "README.md").read_text()


@pytest.mark.parametrize("model", [tiny(), PLAIN], ids=["mesh", "plain"])
def test_model_card_is_what_the_hub_reads(tmp_path, model):
    """Front matter, a licence, how to serve, and the figure of losses up to the exported iteration."""
    write_checkpoint(tmp_path / "run", model, iteration=100)
    rows = [{"iteration": step, "lm loss": 9.0 - step / 100} for step in (50, 100, 150)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export_command(Export(load=tmp_path / "run", output=tmp_path / "export", license="apache-2.0"))
    card = ModelCard.load(tmp_path / "export/README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and "vllm serve PATH" in card.text
    assert ("--trust-remote-code" in card.text) == (model is not PLAIN)
    assert "--dtype float32" in card.text  # else vLLM rounds it to bfloat16
    figure = re.search(r"!\[.*\]\((.*)\)", card.text).group(1)
    assert (tmp_path / "export" / figure).read_bytes().startswith(b"\x89PNG")
    assert read_curves(tmp_path / "run/metrics.jsonl", 100) == {"lm loss": ([50, 100], [8.5, 8.0])}


def test_model_card_counts_one_layer_as_one(tmp_path):
    _, _, folder = export(tmp_path, tiny(layout="1+1R2+1"))
    card = " ".join((folder / "README.md").read_text().split())
    assert "1 core layer runs 2 times between a prelude of 1 layer and a coda of 1 layer (layout" in card


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    tensors = write_checkpoint(tmp_path / "source", tiny())
    del tensors["final_norm.bias"]
    write_checkpoint(tmp_path / "run", tiny(), tensors=tensors)
    with pytest.raises(ValueError, match="missing final_norm.bias"):
        Exporter(CheckpointReader(tmp_path / "run"))


def test_a_core_of_experts_is_refused(tmp_path):
    write_checkpoint(tmp_path, tiny(num_experts=4), tensors={"final_norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match="--num-experts 4: a core of experts has no Hugging Face form"):
        Exporter(CheckpointReader(tmp_path))


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(RuntimeError), staged_folder(output, force=False, mark="config.json") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    output.mkdir()
    (output / "config.json").write_text("old")
    with pytest.raises(ValueError, match="exists.*--force"), staged_folder(output, force=False, mark="config.json"):
        pass
    with pytest.raises(RuntimeError), staged_folder(output, force=True, mark="config.json"):
        raise RuntimeError
    assert (output / "config.json").read_text() == "old"
    with staged_folder(output, force=True, mark="config.json") as folder:
        (folder / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "new" and list(tmp_path.iterdir()) == [output]
    (output / "config.json").rename(output / "thesis.tex")
    with pytest.raises(ValueError, match="no config.json, so --force does not"):
        staged_folder(output, force=True, mark="config.json").__enter__()
