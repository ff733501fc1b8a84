"""Tokenizer settings: declared once, the same in training, preprocessing and inspection."""

import ast
import dataclasses
import importlib
import pickle
from pathlib import Path

import pytest

from mesh_megatron.config.data import DataConfig
from mesh_megatron.config.tokenizer import TokenizerConfig

ROOT = Path(__file__).parents[3]
NAMES = {field.name for field in dataclasses.fields(TokenizerConfig)}
# Fields with these names elsewhere mean something else, or make the flag required.
ELSEWHERE = {"tokenizer_type", "tokenizer_model", "vocab_size"}


def test_no_other_dataclass_declares_these_flags():
    found = []
    for path in [*ROOT.glob("mesh_megatron/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name != "TokenizerConfig":
                fields = [ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign)]
                wrong = [text for text in fields if (name := text.split(":")[0]) in NAMES and name not in ELSEWHERE]
                wrong += [text for text in fields if text.startswith("tokenizer_type:") and "= field()" not in text]
                found += [f"{path.name}: {text}" for text in wrong]
    assert found == []


@pytest.mark.parametrize("tool", ["preprocess_data", "inspect_data"])
def test_tools_take_all_of_them(tool):
    arguments = importlib.import_module(f"mesh_megatron.commands.{tool}").Arguments
    assert issubclass(arguments, TokenizerConfig)
    assert {field.name for field in dataclasses.fields(arguments)} >= NAMES


def test_worker_processes_get_the_tokenizer_alone():
    data = DataConfig(tokenizer_type="TikTokenizer", tokenizer_model=Path("x"), tiktoken_pattern="v1", split="1")
    alone = data.tokenizer()
    assert type(alone) is TokenizerConfig and pickle.loads(pickle.dumps(alone)) == alone
    assert {name: getattr(alone, name) for name in NAMES} == {name: getattr(data, name) for name in NAMES}
