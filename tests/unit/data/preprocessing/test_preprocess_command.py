"""tools/preprocess_data.py with the command lines of Megatron-LM."""

import pytest

from mesh_megatron.commands import preprocess_data
from mesh_megatron.data.indexed import read_indexed


def call(monkeypatch, tmp_path, *words):
    (tmp_path / "a.json").write_text('{"text": "ab"}\n{"text": "c"}\n')
    fixed = ["--input", f"{tmp_path}/a.json", "--output-prefix", f"{tmp_path}/out", "--workers", "1", "--no-progress"]
    monkeypatch.setattr("sys.argv", ["preprocess_data.py", *fixed, "--tokenizer-type", "ByteLevelTokenizer", *words])
    return preprocess_data.main()


def test_flags_of_megatron_lm_that_ask_for_what_always_holds(monkeypatch, tmp_path):
    words = "--append-eod --partitions 2 --keep-sequential-samples --log_interval=100 --keep-newlines --lang english"
    assert call(monkeypatch, tmp_path, *words.split()) == 0
    assert read_indexed(f"{tmp_path}/out_text_document").tokens.tolist() == [97, 98, 256, 99, 256]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--split-sentences", "--split-sentences: texts are not cut into sentences here: put a list of sentences"),
        ("--find_optimal_num_workers", "--find-optimal-num-workers: not needed here: --workers is the number of cores"),
        ("--max-documents 5", "--max-documents: not needed here"),
    ],
)
def test_flags_of_megatron_lm_that_are_refused_by_name(monkeypatch, tmp_path, capsys, words, reason):
    assert call(monkeypatch, tmp_path, *words.split()) == 2
    error = capsys.readouterr().err
    assert f"error: {reason}" in error and error.count("\n") == 1 and not list(tmp_path.glob("out*"))
