"""Common uses of a transformers model: save, load in other precisions, spread over devices, fine-tune."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hf_checkpoints import tiny, write_checkpoint
from hf_models import VOCABULARY
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.hf.export import Exporter
from mesh_megatron.hf.loading import load_model

CPU = torch.device("cpu")


def export(folder, model=None, **resolved):
    write_checkpoint(folder / "run", model or tiny(), **resolved)
    (folder / "export").mkdir()
    Exporter(CheckpointReader(folder / "run")).write(folder / "export")
    return folder / "export"


@pytest.fixture
def exported(tmp_path):
    return export(tmp_path)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@torch.no_grad()
def test_saved_and_loaded_again(exported, tmp_path, ids):
    model = load(exported)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    assert torch.equal(again(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    hidden = base(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(ids).logits)


@torch.no_grad()
def test_tied_embeddings_stay_tied(tmp_path, ids):
    folder = export(tmp_path, tiny(untie_embeddings_and_output_weights=False))
    model = load(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_in.weight.data_ptr()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recurrence", ["mesh", "dynamic", "static"])
def test_half_precision(tmp_path, ids, dtype, recurrence):
    folder = export(tmp_path, tiny(recurrence=recurrence))
    model, exact = load(folder, dtype=dtype), load(folder)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {kinds.pop(name) for name in list(kinds) if "recurrence" in name} == {torch.float32}
    assert set(kinds.values()) == {dtype}
    logits, expected = model(ids).logits, exact(ids).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).std() < (0.05 if dtype == torch.bfloat16 else 0.01) * expected.std()
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False)[:, :12], ids)
    model.to(dtype)
    assert {x.dtype for name, x in model.named_parameters() if "recurrence" in name} == {torch.float32}
    assert torch.equal(model(ids).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("recurrence", ["mesh", "static", "dynamic"])
def test_layers_kept_on_disk(tmp_path, ids, recurrence):
    folder = export(tmp_path, tiny(recurrence=recurrence))
    places = {"model.embed_in": "cpu", "model.prelude": "cpu", "model.core": "disk", "model.coda": "cpu"}
    places |= {"model.recurrence": "disk", "model.final_layer_norm": "cpu", "model.rotary": "cpu", "lm_head": "disk"}
    model = load(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert model.model.core[0].mlp.dense_h_to_4h.weight.device.type == "meta"
    expected = load(folder)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))


def test_fine_tuning_with_the_trainer(exported, tmp_path):
    model = load(exported)
    rows = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    router = model.model.recurrence.routers[1].weight.clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "tuned"), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2,
        gradient_checkpointing=True, report_to=[], logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    assert not torch.equal(model.model.recurrence.routers[1].weight, router)
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = load(tmp_path / "tuned")
    assert torch.equal(tuned.lm_head.weight, model.lm_head.weight)


@torch.no_grad()
@pytest.mark.parametrize("model", [tiny(), tiny(layout="4", recurrence="vanilla")], ids=["mesh", "plain"])
def test_checkpoint_and_export_load_alike(tmp_path, ids, model):
    folder = export(tmp_path, model, eod_id=4)
    loaded = [load_model(path, None, None, CPU, lambda data: None) for path in (tmp_path / "run", folder)]
    first, second = (entry.model(ids).logits for entry in loaded)
    assert torch.equal(first, second)
    assert [entry.eod for entry in loaded] == [4, 4] and [entry.tokenizer for entry in loaded] == [None, None]
    half = load_model(tmp_path / "run", 100, torch.bfloat16, CPU, lambda data: None)
    assert half.model.lm_head.weight.dtype == torch.bfloat16


def test_loading_runs_no_code_of_the_folder(exported):
    (exported / "modeling_mesh.py").write_text("raise SystemExit('ran')")
    (exported / "configuration_mesh.py").write_text("raise SystemExit('ran')")
    loaded = load_model(exported, None, None, CPU, lambda data: None)
    assert type(loaded.model).__module__ == "mesh_megatron.hf.modeling_mesh"


def test_a_folder_that_is_neither(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint there"):
        load_model(tmp_path, None, None, CPU, lambda data: None)


def test_gradients_reach_every_parameter(tmp_path, ids):
    for recurrence in ("mesh", "dynamic", "static"):
        folder = tmp_path / recurrence
        folder.mkdir()
        model = load(export(folder, dataclasses.replace(tiny(), recurrence=recurrence))).train()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
