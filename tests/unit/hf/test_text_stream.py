"""The text that ``generate.py`` shows is the text of all its tokens together, spaces of SentencePiece included."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mesh_megatron.commands.generate import Generate, continue_text, line_ids, token_ids

PROMPT = "class A:\n    def"
CONTINUATION = " f(self):\n        return 'é 中 🙂'  # two spaces\n\n    x = 1 "


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters and bytes, with SentencePiece's space before a first word."""
    pieces = ["<unk>", "</s>", "▁", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


class ScriptedModel:
    """Generates the given ids."""

    device = torch.device("cpu")

    def __init__(self, made: list[int]):
        self.made = made

    def generate(self, ids, streamer, **settings):
        streamer.put(ids)
        for token in self.made:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([ids, torch.tensor([self.made])], dim=1)


@pytest.mark.parametrize("show_prompt", [False, True])
def test_streamed_text_is_the_text_of_all_tokens(tmp_path, capsys, tokenizer, show_prompt):
    prompt = tokenizer(PROMPT).input_ids
    made = tokenizer(PROMPT + CONTINUATION).input_ids[len(prompt) :] + [tokenizer.eos_token_id]
    loaded = SimpleNamespace(model=ScriptedModel(made), tokenizer=tokenizer)
    assert continue_text(loaded, Generate(load=tmp_path), prompt, show_prompt) == made
    assert capsys.readouterr().out == (PROMPT if show_prompt else "") + CONTINUATION + "\n"


def test_a_character_that_stays_incomplete_is_shown_at_the_end(tmp_path, capsys, tokenizer):
    made = tokenizer("a中").input_ids[1:-1]
    continue_text(SimpleNamespace(model=ScriptedModel(made), tokenizer=tokenizer), Generate(load=tmp_path), [5], False)
    assert capsys.readouterr().out.rstrip("\N{REPLACEMENT CHARACTER}\n") == "a"


def test_a_line_after_others_has_no_space_before_it(tokenizer):
    loaded = SimpleNamespace(tokenizer=tokenizer, eod=tokenizer.eos_token_id)
    lines = token_ids(loaded, "a = 1") + line_ids(loaded, "b = 2") + line_ids(loaded, "")
    assert lines == tokenizer("a = 1\nb = 2\n").input_ids
