"""A model whose Hugging Face tokenizer has padding of its own, a chat template, and settings that change texts."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_checkpoints import tiny, write_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.commands.evaluate import without_overflow
from mesh_megatron.commands.export_hf import Export, export
from mesh_megatron.commands.generate import Generate, continue_text, generate
from mesh_megatron.config.data import DataConfig
from mesh_megatron.data.tokenizers import from_config
from mesh_megatron.hf.evaluation import data_perplexity
from mesh_megatron.hf.import_options import ImportOptions
from mesh_megatron.hf.importing import HubModel, write_import
from mesh_megatron.hf.loading import load_model
from mesh_megatron.hf.token_streams import read_stream

END, PADDING, WORDS = 256, 257, 258
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes with an end of document and padding."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(letters))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<end>", "<pad>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", bos_token="<end>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    odd = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "clean_up_tokenization_spaces": True}
    config.write_text(json.dumps(json.loads(config.read_text()) | odd))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own_tokenizer")
    save_tokenizer(folder / "tokenizer")
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder / "tokenizer")
    sizes = {"padded_vocab_size": WORDS, "tokenizer_vocab_size": WORDS, "eod_id": END}
    write_checkpoint(folder / "run", tiny(), data=data, **sizes)
    export(Export(load=folder / "run", output=folder / "export"))
    return folder / "export"


@pytest.fixture
def loaded(exported):
    return load_model(exported, None, None, torch.device("cpu"), from_config)


@torch.no_grad()
def test_batches_of_texts_can_be_classified(exported):
    """The padding of the tokenizer is the configuration's, so that a head finds the last token of each text."""
    settings = json.loads((exported / "generation_config.json").read_text())
    assert (settings["pad_token_id"], settings["eos_token_id"]) == (PADDING, END)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(exported, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    texts = ["short", "a longer text"]
    together = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    for text, logits in zip(texts, together, strict=True):
        alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


def test_a_tokenizer_gives_what_the_model_takes(exported, loaded):
    """A stored list of other inputs would have ``generate`` refuse what the tokenizer returns."""
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    inputs = tokenizer(["ab", "c"], return_tensors="pt", padding=True, padding_side="left")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False).shape == (2, 4)


def test_a_chat_template_survives_an_import(exported, tmp_path):
    (tmp_path / "hub").mkdir()
    for path in exported.iterdir():
        (tmp_path / "hub" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "hub/additional_chat_templates").mkdir()
    (tmp_path / "hub/additional_chat_templates/tool.jinja").write_text("tools: " + TEMPLATE)
    write_import(HubModel(tmp_path / "hub"), ImportOptions(output=tmp_path / "run"), tokenizer=tmp_path / "hub")
    export(Export(load=tmp_path / "run", output=tmp_path / "again"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[user] hi\n"
    assert tokenizer.apply_chat_template(chat, chat_template="tool", tokenize=False) == "tools: [user] hi\n"
    assert CheckpointReader(tmp_path / "run").resolved["eod_id"] == END


@torch.no_grad()
def test_a_prompt_may_hold_the_padding(loaded, capsys):
    """It is text there, which the model sees."""
    ids = torch.tensor([[*b"ab", PADDING, PADDING, PADDING, *b"cd"]])
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    assert not torch.equal(loaded.model.generate(ids, **options)[0, ids.shape[1] :], expected)
    args = Generate(load=Path("-"), greedy=True, max_new_tokens=8)
    assert continue_text(loaded, args, ids[0].tolist(), show_prompt=False) == expected.tolist()


def test_a_text_longer_than_the_model_was_made_for_warns(exported, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stdin", StringIO("a" * 30))
    generate(Generate(load=exported, greedy=True, max_new_tokens=2))
    assert not caplog.records
    generate(Generate(load=exported, greedy=True, prompt="a" * 30, max_new_tokens=3))
    assert "--prompt of 30 tokens and --max-new-tokens 3: the model's longest sequence is 32" in caplog.text


def test_words_and_bytes_are_those_of_the_documents(loaded):
    """Words of two documents in .bin/.idx data are not one, and no white space is tidied away."""
    texts = ["It is n't here , is it ?", "No .\r\n"]
    ids = np.array([END, *(byte for text in texts for byte in (*loaded.tokenizer(text)["input_ids"], END))])
    numbers = data_perplexity(loaded, "data", ids, window=16, stride=16, batch_size=4)
    assert numbers.words == 8 + 2
    assert numbers.bytes == sum(len(text.encode()) for text in texts)


def test_line_ends_of_a_text_stay(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"a\r\nb\n")
    assert read_stream(str(tmp_path / "text.txt")) == "a\r\nb\n"


def test_results_are_json_also_where_numbers_overflow():
    numbers = {"loss": 5.0, "word_perplexity": float("inf"), "task": {"score": float("nan"), "n": 3}}
    assert without_overflow(numbers) == {"loss": 5.0, "word_perplexity": None, "task": {"score": None, "n": 3}}
