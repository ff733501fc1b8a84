"""``generate.py --interactive``: history, speed, and what it refuses."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import pytest
from hf_checkpoints import tiny, write_checkpoint

from mesh_megatron.commands.export_hf import Export, export
from mesh_megatron.commands.generate import Generate, generate
from mesh_megatron.config.data import DataConfig


@pytest.fixture
def args(tmp_path) -> Generate:
    """An exported model of bytes, and greedy answers of four tokens."""
    data = DataConfig(tokenizer_type="ByteLevelTokenizer")
    write_checkpoint(tmp_path / "run", tiny(), data=data, padded_vocab_size=384, tokenizer_vocab_size=257, eod_id=256)
    export(Export(load=tmp_path / "run", output=tmp_path / "export"))
    return Generate(load=tmp_path / "export", greedy=True, max_new_tokens=4, interactive=True)


def told(args: Generate, lines: list[str], monkeypatch) -> list[list[int]]:
    """The ids that the model is given for each line, and after them its answers."""
    given = []
    from mesh_megatron.commands import generate as command

    real = command.continue_text

    def listening(loaded, args, ids, show_prompt):
        made = real(loaded, args, ids, show_prompt)
        given.append((list(ids), made))
        return made

    monkeypatch.setattr(command, "continue_text", listening)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    generate(args)
    return given


def test_a_conversation_keeps_its_history_and_shows_its_speed(args, monkeypatch, capsys):
    turns = told(args, ["ab", "c", "/reset", "ab"], monkeypatch)
    (first, answer), (second, _), (again, repeated) = turns
    assert first == again == list(b"ab") and answer == repeated
    assert second == first + answer + list(b"\nc")
    out, err = capsys.readouterr()
    assert re.findall(r"\[(\d+) tokens, [\d.]+ tokens/s\]", err) == [str(len(made)) for _, made in turns]
    assert "ab" not in out.splitlines()[0]  # the terminal shows what was typed already


def test_the_oldest_tokens_make_room(args, monkeypatch):
    turns = told(args, ["a" * 20, "b" * 20], monkeypatch)
    assert turns[1][0] == [*turns[0][0], *turns[0][1], *b"\n", *b"b" * 20][-(32 - 4) :]


def test_what_a_conversation_cannot_be(args):
    with pytest.raises(ValueError, match="--prompt hello: --interactive asks for prompts; drop one of them"):
        generate(replace(args, prompt="hello"))
    with pytest.raises(ValueError, match="--max-new-tokens 32: leaves no room for a prompt in the model's 32 tokens"):
        generate(replace(args, max_new_tokens=32))
