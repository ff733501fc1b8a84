"""The data tools as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mesh_megatron.data.indexed import read_indexed

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
BYTES = ["--tokenizer-type", "ByteLevelTokenizer"]


def command(tool, *args):
    return [sys.executable, str(ROOT / "tools" / tool), *map(str, args)]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(tool, *args, code=0, stdin=None):
    done = subprocess.run(command(tool, *args), env=environment(), input=stdin, capture_output=True, timeout=300)
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode() if code == 0 else done.stderr.decode()


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("argparse", "ast", "bdb", "calendar", "cmd"):
        source = Path(sys.modules["os"].__file__).with_name(f"{name}.py")
        (folder / f"{name}.py").write_bytes(source.read_bytes())
    return folder


def test_from_files_to_an_inspected_dataset(tmp_path, corpus):
    shared = ["--input", corpus, "--text-suffixes", ".py", "--document-separator", "file"]
    trained = run("train_tokenizer.py", *shared, "--vocab-size", 1000, "--byte-fallback", "--output", tmp_path / "tok")
    flags = trained.splitlines()[-1].split()
    assert flags == ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{tmp_path}/tok.model"]
    args = [*shared, *flags, "--append-eod", "--workers", 2]
    written = run("preprocess_data.py", *args, "--output-prefix", tmp_path / "code")
    prefix = tmp_path / "code_text_document"
    assert written.startswith("5 documents, ") and written.splitlines()[-1] == f"--data-path {prefix}"
    merged = run("merge_datasets.py", "--input", prefix, tmp_path / "copy", "--output-prefix", tmp_path / "x", code=2)
    assert "copy.idx: no such file" in merged and "Traceback" not in merged
    for suffix in (".bin", ".idx"):
        (tmp_path / f"copy{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    run("merge_datasets.py", "--input", prefix, tmp_path / "copy", "--output-prefix", tmp_path / "both")
    seen = run("inspect_data.py", "--input", tmp_path / "both", *flags, "--json", tmp_path / "seen.json")
    assert "10 documents" in seen and "every offset is right" in seen
    (found,) = json.loads((tmp_path / "seen.json").read_text())
    assert found["documents"] == 10
    assert (corpus / "argparse.py").read_text().startswith(found["samples"]["0"])
    with open(tmp_path / "both.bin", "ab") as stream:
        stream.write(b"xx")
    assert "both.bin holds" in run("inspect_data.py", "--input", tmp_path / "both", code=2)


def test_names_that_are_not_utf_8_are_read_and_named(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(folder)
    for name, content in ((b"a\xe9.txt", b"good"), (b"b\xe9.jsonl", b'{"x": 1}\n'), (b"c.\xe9", b"")):
        with open(folder + b"/" + name, "wb") as stream:
            stream.write(content)
    prefix = folder + b"/out"
    args = ["preprocess_data.py", "--input", tmp_path, *BYTES, "--workers", 2, "--no-progress"]
    args += ["--output-prefix", os.fsdecode(prefix)]
    stopped = run(*args, code=2)
    assert r"b\udce9.jsonl, line 1: missing key" in stopped and "Traceback" not in stopped
    written = run(*args, "--on-error", "skip", "--resume").splitlines()
    assert written[0].startswith("1 documents, 4 tokens")
    assert r"b\udce9.jsonl, line 1: missing key" in written[2] and r"files passed over: 1 x .\udce9" in written[3]
    assert read_indexed(os.fsdecode(prefix) + "_text_document").document(0).tolist() == list(b"good")


def test_every_pair_is_inspected_though_some_are_damaged(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    for name in "abc":
        run("preprocess_data.py", "--input", tmp_path / "a.txt", *BYTES, "--output-prefix", tmp_path / "out" / name)
    for name in "ac":
        with open(tmp_path / "out" / f"{name}_text_document.bin", "ab") as stream:
            stream.write(b"xx")
    done = subprocess.run(
        command("inspect_data.py", "--input", tmp_path / "out", "--json", tmp_path / "new" / "seen.json"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "b_text_document\n  2 documents" in done.stdout
    *errors, last = done.stderr.splitlines()
    assert [error.split("_text_document.bin holds")[0][-1] for error in errors] == ["a", "c"]
    assert last == "inspect_data.py: error: 2 of 3 pairs are wrong"
    seen = json.loads((tmp_path / "new" / "seen.json").read_text())
    assert [sorted(pair) == ["error", "prefix"] for pair in seen] == [True, False, True]
    assert "a_text_document.bin holds" in seen[0]["error"] and seen[1]["documents"] == 2


@pytest.mark.parametrize(
    "tool, args",
    [
        ("preprocess_data.py", [*BYTES, "--output-prefix"]),
        ("train_tokenizer.py", ["--vocab-size", 300, "--output"]),
        ("train_tokenizer.py", ["--vocab-size", 300, "--model-type", "byte-level-bpe", "--output"]),
        ("inspect_data.py", ["--json"]),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, tool, args):
    bad = tmp_path / "bad.jsonl"  # which is what would be told if work began
    bad.write_text("{")
    error = run(tool, "--input", bad, *args, bad / "out", code=2)
    assert error.count("\n") == 1 and "Not a directory" in error
    assert f"{args[-1]} {bad}/out" in error


def test_standard_input(tmp_path):
    args = ["--input", "-", *BYTES, "--workers", 1, "--output-prefix", tmp_path / "out"]
    run("preprocess_data.py", *args, stdin=b'{"text": "ab"}\n{"text": "c"}\n')
    assert read_indexed(f"{tmp_path}/out_text_document").tokens.tolist() == [97, 98, 99]
    args = ["--input", "-", *BYTES, "--workers", 1, "--output-prefix", tmp_path / "text"]
    run("preprocess_data.py", *args, "--stdin-format", "text", "--append-eod", stdin=b"ab\n\nc\n")
    assert read_indexed(f"{tmp_path}/text_text_document").tokens.tolist() == [97, 98, 256, 99, 256]


def test_errors_are_one_line_with_file_and_fix(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "fine"}\n{"text": \n')
    args = ["--input", bad, *BYTES, "--output-prefix", tmp_path / "out", "--no-progress"]
    error = run("preprocess_data.py", *args, code=2)
    assert error.count("\n") == 1
    assert "bad.jsonl, line 2: broken JSON" in error and "--on-error skip" in error
    args = ["--input", bad, "--tokenizer-type", "SentencePieceTokenizer", "--output-prefix", tmp_path / "out"]
    assert "needs --tokenizer-model" in run("preprocess_data.py", *args, code=2)
    assert "no such file" in run("train_tokenizer.py", "--input", tmp_path / "x", "--output", "x", code=2)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed(tmp_path, how):
    """Wherever the signal strikes, no valid-looking output is there, and --resume gives the same bytes."""
    source = tmp_path / "a.jsonl"
    line = json.dumps({"text": "some words of a document " * 40}) + "\n"
    source.write_text(line * 60_000)  # about 60 MB
    args = ["--input", source, *BYTES, "--append-eod", "--workers", 2, "--output-prefix", tmp_path / "out"]
    process = subprocess.Popen(
        command("preprocess_data.py", *args),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    tokens = tmp_path / "out.partial" / "text.tokens"
    while process.poll() is None and not (tokens.exists() and tokens.stat().st_size > 10_000_000):
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), errors.decode()
    assert not (tmp_path / "out_text_document.idx").exists()
    if how == signal.SIGINT:
        assert "with --resume to continue" in errors.decode() and b"Traceback" not in errors
        assert (tmp_path / "out.partial" / "journal.jsonl").read_text()
    run("preprocess_data.py", *args, "--resume")
    file = read_indexed(f"{tmp_path}/out_text_document")
    assert file.documents == 60_000 and len(file.tokens) == 60_000 * 1001
    assert (file.tokens.reshape(60_000, 1001) == file.tokens[:1001]).all()
    assert "already complete, unchanged" in run("preprocess_data.py", *args, "--resume")
