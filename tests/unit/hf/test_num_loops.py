"""Exported models whose core runs another number of times than in training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hf_models import make_config
from transformers import DynamicCache

from mesh_megatron.hf.configuration_mesh import MeshConfig
from mesh_megatron.hf.modeling_mesh import (
    MeshForCausalLM,
    MeshForSequenceClassification,
    MeshForTokenClassification,
)

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["all", "last"])
@pytest.mark.parametrize("loops", [1, 4])
def test_the_cache_follows(make_model, ids, left_padding, loops, kind):
    model = make_model(num_loops=2, kv_cache_loops=kind)
    model.set_num_loops(loops)
    options = {"attention_mask": left_padding, **GREEDY}
    cached = model.generate(ids, **options)
    if kind == "all" or loops == 1:
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
        assert torch.equal(cached, model.generate(ids, cache_implementation="static", **options))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert len(cache.layers) == model.config.num_hidden_layers
    assert all(layer.get_seq_length() == 12 for layer in cache.layers)
    model.set_num_loops(3)
    if kind == "all":
        with pytest.raises(ValueError, match="entries, and the model needs"):
            model(ids, past_key_values=cache)


def test_one_call_of_generate(make_model, ids):
    model = make_model(num_loops=2)
    usual = model.generate(ids, **GREEDY)
    more = model.generate(ids, num_loops=4, **GREEDY)
    assert not torch.equal(more, usual)
    assert torch.equal(model.generate(ids, **GREEDY), usual)
    model.set_num_loops(4)
    assert torch.equal(model.generate(ids, **GREEDY), more)


@torch.no_grad()
def test_saved_and_loaded_again(make_model, ids, tmp_path):
    model = make_model(num_loops=2)
    model.save_pretrained(tmp_path)
    model.set_num_loops(4)
    expected = model(ids).logits
    loaded = MeshForCausalLM.from_pretrained(tmp_path, num_loops=4).eval()
    assert torch.equal(loaded(ids).logits, expected)
    model.save_pretrained(tmp_path / "more")
    again = MeshForCausalLM.from_pretrained(tmp_path / "more").eval()
    assert (again.config.num_loops, again.config.num_trained_loops) == (4, 2)
    assert torch.equal(again(ids).logits, expected)


def test_what_cannot_loop_otherwise_is_refused(make_model, ids):
    with pytest.raises(ValueError, match="num_loops 3: the model was made for 2; only a shared core"):
        make_model(num_loops=2, share_core=False).set_num_loops(3)
    model = make_model(num_loops=2)
    with pytest.raises(ValueError, match="num_loops 0"):
        model.generate(ids, num_loops=0, **GREEDY)
    for wrong in (4.0, "4", [4]):
        with pytest.raises(ValueError, match="num_loops .* must be an integer"):
            model.generate(ids, num_loops=wrong, **GREEDY)
        model(ids)  # it still works
    assert model.config.num_loops == 2
    model.set_num_loops(np.int64(2))
    assert type(model.config.num_loops) is int  # which JSON can hold
    model.config.num_loops = 3
    with pytest.raises(ValueError, match="use model.set_num_loops"):
        model(ids)


def test_an_import_is_the_trained_model():
    from mesh_megatron.hf.convert import from_hf_config

    config = MeshConfig(num_loops=8, num_trained_loops=2, num_memory_slots=5)
    assert from_hf_config(config.to_dict(), "here")[0].layout == "2+4R2+2"


@pytest.fixture
def evaluation(make_model, tmp_path, capsys):
    """Run tools/evaluate.py on a small export and on random tokens; returns the exit code, output and errors."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    make_model(num_loops=2).save_pretrained(tmp_path / "export")
    make_model(num_loops=2, share_core=False).save_pretrained(tmp_path / "unshared")
    builder = IndexedDatasetBuilder(f"{tmp_path}/data.bin", dtype=np.uint16)
    builder.add_document(np.random.default_rng(0).integers(0, 101, 200), [200])
    builder.finalize(f"{tmp_path}/data.idx")

    def evaluate(flags: str) -> tuple[int, str, str]:
        from mesh_megatron.commands.evaluate import main

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["evaluate.py", "--data-path", f"{tmp_path}/data", *flags.split()])
            code = main()
        return code, *capsys.readouterr()

    return evaluate


def test_windows_longer_than_the_model_was_made_for_warn(one_rank, evaluation, tmp_path, caplog):
    longest = json.loads((tmp_path / "export/config.json").read_text())["max_position_embeddings"]
    assert evaluation(f"--load {tmp_path}/export --seq-length {longest}")[0] == 0 and not caplog.messages
    assert evaluation(f"--load {tmp_path}/export --seq-length {longest + 1}")[0] == 0
    assert [text for text in caplog.messages if f"--seq-length {longest + 1}: the model's longest" in text]


def test_the_curve_of_loss_over_loops(one_rank, evaluation, tmp_path):
    code, out, _ = evaluation(f"--load {tmp_path}/export --loops 1 2 4 --figure {tmp_path}/curve.svg")
    assert code == 0
    curve = {loops: numbers["loss"] for loops, numbers in json.loads(out)[f"{tmp_path}/data"].items()}
    assert list(curve) == ["1", "2", "4"] and len(set(curve.values())) == 3
    _, out, _ = evaluation(f"--load {tmp_path}/export")
    assert json.loads(out)[f"{tmp_path}/data"]["loss"] == curve["2"]
    assert "as trained" in (tmp_path / "curve.svg").read_text()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--load PLACE/unshared --loops 3", "--loops 3: the model has no shared core; drop the flag"),
        ("--load PLACE/export --figure x.svg", "--figure x.svg: draws the loss of --data-path over --loops: give both"),
        ("--load PLACE/export --loops 2 --figure x.txt", "--figure x.txt: not a figure format"),
    ],
)
def test_curves_that_cannot_be_drawn(one_rank, evaluation, tmp_path, flags, complaint):
    code, _, error = evaluation(flags.replace("PLACE", str(tmp_path)))
    assert code == 2 and complaint in error


@torch.no_grad()
@pytest.mark.parametrize("head", [MeshForCausalLM, MeshForSequenceClassification, MeshForTokenClassification])
def test_a_model_with_any_head_loops_otherwise(ids, head):
    model = head(make_config(num_loops=2)).eval()
    before = model(ids[:1]).logits
    model.set_num_loops(4)
    assert model.config.num_loops == 4 and len(model.model.attentions) == model.config.num_computed_layers
    assert not torch.equal(model(ids[:1]).logits, before)
