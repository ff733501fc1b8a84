"""Preprocessing: the bytes megatron.core writes, for any workers and shards; interrupted, resumed, with bad input."""

import base64
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mesh_megatron.config.data import DataConfig
from mesh_megatron.config.tokenizer import TokenizerConfig
from mesh_megatron.data.check import read_description
from mesh_megatron.data.datasets import SampleCounts, build_datasets
from mesh_megatron.data.indexed import read_indexed, verify
from mesh_megatron.data.preprocessing import readers, writer
from mesh_megatron.data.preprocessing.preprocess import PreprocessOptions, preprocess
from mesh_megatron.data.preprocessing.readers import SplitOptions
from mesh_megatron.data.preprocessing.sources import list_sources
from mesh_megatron.data.tokenizers import build_tokenizer
from mesh_megatron.data.tokenizers.cover import Proof
from mesh_megatron.util.hashing import hash_file_64

BYTES = {"tokenizer_type": "ByteLevelTokenizer"}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 200)


def write_jsonl(path, texts):
    data = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def run(inputs, prefix, tokenizer=BYTES, split_options=None, **options):
    sources = list_sources([inputs] if isinstance(inputs, str) else inputs)
    chosen = PreprocessOptions(show_progress=False, **options)
    return preprocess(sources, str(prefix), TokenizerConfig(**tokenizer), split_options or SplitOptions(), chosen)


def documents(prefix, key="text"):
    file = read_indexed(f"{prefix}_{key}_document")
    verify(file)
    return [file.document(number).tolist() for number in range(file.documents)]


def megatron(texts, tokenizer, prefix, append_eod):
    """Do what Megatron-LM's tools/preprocess_data.py does for each text, with megatron.core's builder."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        ids, lengths = [], []
        for sentence in text if isinstance(text, list) else [text]:
            sentence_ids = tokenizer.tokenize(sentence)
            if sentence_ids:
                ids += sentence_ids
                lengths.append(len(sentence_ids))
        if ids and append_eod:
            ids.append(tokenizer.eod)
            lengths[-1] += 1
        builder.add_document(torch.tensor(ids), lengths)
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("kind", ["hf", "bytes", "wide"])
def test_bytes_are_megatrons(tmp_path, small_blocks, tokenizer_json, kind, append_eod):
    arguments = {
        "hf": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer_json},
        "bytes": BYTES,
        "wide": {"tokenizer_type": "NullTokenizer", "vocab_size": 70_000},
    }[kind]
    texts = ["", "one document", "ünï", ["a list", "", "of parts"], [], ["", ""], "x" * 500, "last", ""]
    if kind == "wide":
        texts = ["1 2 69999", "", ["0", "5 5"], "65500 3"]
    summary = run(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "ours", arguments, append_eod=append_eod)
    megatron(texts, build_tokenizer(**arguments), tmp_path / "theirs", append_eod)
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours_text_document{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()
    empty = sum(1 for text in texts if not "".join(text))
    assert summary.progress.empty == empty
    assert f"{empty} of them without tokens" in str(summary)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(
        st.lists(st.lists(st.integers(0, 99_999), min_size=1, max_size=30), max_size=8), min_size=1, max_size=4
    ),
    vocab_size=st.sampled_from([100, 65_498, 65_499, 65_500, 100_000]),
    block_bytes=st.sampled_from([20, 300, 1 << 22]),
)
def test_any_documents_come_back(tmp_path_factory, shards, vocab_size, block_bytes):
    """Round trip: any ids, any dtype, any number of shards, any block size."""
    folder = tmp_path_factory.mktemp("trip")
    shards = [[[token % vocab_size for token in document] for document in shard] for shard in shards if shard]
    if not shards:
        return
    inputs = [
        write_jsonl(folder / f"{number}.jsonl{'.gz' if number % 2 else ''}", [" ".join(map(str, d)) for d in shard])
        for number, shard in enumerate(shards)
    ]
    before, readers.BLOCK_BYTES = readers.BLOCK_BYTES, block_bytes
    try:
        run(inputs, folder / "out", {"tokenizer_type": "NullTokenizer", "vocab_size": vocab_size})
    finally:
        readers.BLOCK_BYTES = before
    assert documents(folder / "out") == [document for shard in shards for document in shard]
    dtype = np.uint16 if vocab_size + 1 < 65_500 else np.int32
    assert read_indexed(f"{folder}/out_text_document").tokens.dtype == dtype


def test_workers_change_nothing(tmp_path, small_blocks):
    inputs = [write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" * i for i in range(1, 40)]) for name in "abc"]
    run(inputs, tmp_path / "one", workers=1)
    run(inputs, tmp_path / "three", workers=3)
    for suffix in (".bin", ".idx"):
        one, three = (Path(f"{tmp_path}/{name}_text_document{suffix}").read_bytes() for name in ("one", "three"))
        assert one == three


def test_description_and_several_keys(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc", "title": "T"}\n{"text": "de", "title": "UV"}\n')
    summary = run(str(path), tmp_path / "out", split_options=SplitOptions(json_keys=("text", "title")), append_eod=True)
    assert summary.prefixes == [f"{tmp_path}/out_text_document", f"{tmp_path}/out_title_document"]
    note = read_description(f"{tmp_path}/out_title_document")
    assert (note["documents"], note["tokens"], note["append_eod"]) == (2, 5, True)
    assert note["bin_xxh3_64"] == hash_file_64(Path(f"{tmp_path}/out_title_document.bin"))
    assert documents(tmp_path / "out") == [[97, 98, 99, 256], [100, 101, 256]]
    assert not (tmp_path / "out.partial").exists()


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): the n-th append of a run breaks off in the middle."""

    def arm(number):
        count = iter(range(number))
        append = writer.DatasetWriter.append

        def failing(self, key, tokens, lengths, counts):
            if next(count, None) is None:
                self.files[key, "tokens"].write(b"half")
                raise Interrupted
            append(self, key, tokens, lengths, counts)

        monkeypatch.setattr(writer.DatasetWriter, "append", failing)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("names", [["a.jsonl", "b.jsonl"], ["a.jsonl.gz", "b.jsonl"]])
@pytest.mark.parametrize("appends", [0, 1, 7, 11])
def test_interrupted_runs_resume_to_the_same_bytes(tmp_path, monkeypatch, interrupt, names, appends):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 200)
    texts = [f"text number {i}" for i in range(40)]
    inputs = [write_jsonl(tmp_path / name, texts) for name in names]
    run(inputs, tmp_path / "whole")
    interrupt(appends)
    with pytest.raises(Interrupted):
        run(inputs, tmp_path / "out", commit_seconds=0)
    assert not list(tmp_path.glob("out_*"))
    monkeypatch.undo()
    monkeypatch.setattr(readers, "BLOCK_BYTES", 200)
    encoded = []
    original = writer.DatasetWriter.append
    monkeypatch.setattr(writer.DatasetWriter, "append", lambda *args: encoded.append(1) or original(*args))
    summary = run(inputs, tmp_path / "out", commit_seconds=0, resume=True)
    for suffix in (".bin", ".idx", ".json"):
        whole, resumed = (Path(f"{tmp_path}/{name}_text_document{suffix}").read_bytes() for name in ("whole", "out"))
        assert whole == resumed
    assert summary.progress.documents == 80
    assert len(encoded) + appends == total_appends(inputs)  # nothing was done twice


def test_a_run_that_writes_into_its_input_resumes_and_starts_over(tmp_path, interrupt, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(40)])
    for resume in (True, False):
        monkeypatch.setattr(readers, "BLOCK_BYTES", 200)
        interrupt(2)
        with pytest.raises(Interrupted):
            run(str(tmp_path), tmp_path / "out", commit_seconds=0, overwrite=True)
        monkeypatch.undo()
        monkeypatch.setattr(readers, "BLOCK_BYTES", 200)
        summary = run(str(tmp_path), tmp_path / "out", resume=resume, overwrite=True)
        assert summary.progress.documents == 40
    assert run(str(tmp_path), tmp_path / "out", resume=True).already_there


def total_appends(inputs):
    from mesh_megatron.data.preprocessing.readers import read_blocks

    return sum(1 for source in list_sources(inputs) for _ in read_blocks(source, SplitOptions()))


def test_resume_refuses_another_plan_and_leaves_a_finished_run(tmp_path, small_blocks, interrupt, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ["text"] * 40)
    interrupt(2)
    with pytest.raises(Interrupted):
        run(path, tmp_path / "out", commit_seconds=0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--resume: append_eod changed since"):
        run(path, tmp_path / "out", append_eod=True, resume=True)
    run(path, tmp_path / "out", resume=True)
    stamp = os.stat(f"{tmp_path}/out_text_document.bin").st_mtime_ns
    assert run(path, tmp_path / "out", resume=True).already_there
    assert os.stat(f"{tmp_path}/out_text_document.bin").st_mtime_ns == stamp


def test_a_full_disk_keeps_what_is_done(tmp_path, small_blocks, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(60)])
    run(path, tmp_path / "whole")
    count, append = iter(range(3)), writer.DatasetWriter.append

    def full(*args):
        if next(count, None) is None:
            raise OSError(28, "No space left on device")
        append(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.DatasetWriter, "append", full)
        with pytest.raises(OSError, match=f"^--output-prefix {tmp_path}/out: No space left .* with --resume$"):
            run(path, tmp_path / "out")
    run(path, tmp_path / "out", resume=True)
    assert documents(tmp_path / "out") == documents(tmp_path / "whole")


def test_files_are_on_disk_before_they_get_their_names(tmp_path, monkeypatch):
    """A computer that loses power afterwards must not keep an .idx that is empty."""
    path, synced, moved = write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), set(), []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (synced.add(os.fstat(number).st_ino), sync(number)))

    def moving(source, target):
        moved.append((Path(target).name, os.stat(source).st_ino in synced))
        replace(source, target)

    monkeypatch.setattr(os, "replace", moving)
    run(path, tmp_path / "out")
    wanted = [("text.note", True), *((f"out_text_document{end}", True) for end in (".bin", ".json", ".idx"))]
    assert moved == wanted


@pytest.mark.parametrize("at", [".bin", ".json", ".idx"])
def test_a_run_of_several_keys_killed_between_them_is_resumed(tmp_path, monkeypatch, at):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"plan": "one", "text": "two"}) + "\n")  # plan: also a name in PREFIX.partial
    replace = os.replace

    def killed(source, target):
        if str(target) == f"{tmp_path}/out_text_document{at}":
            raise Interrupted
        replace(source, target)

    path, options = str(path), SplitOptions(json_keys=("plan", "text"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(writer.os, "replace", killed)
        run(path, tmp_path / "out", split_options=options)
    assert (tmp_path / "out_plan_document.idx").exists() and not (tmp_path / "out_text_document.idx").exists()
    with pytest.raises(ValueError, match="out_plan_document.idx exists"):
        run(path, tmp_path / "out", split_options=options)
    run(path, tmp_path / "out", split_options=options, resume=True)
    assert documents(tmp_path / "out", "plan") == [list(b"one")] and documents(tmp_path / "out") == [list(b"two")]
    assert run(path, tmp_path / "out", split_options=options, resume=True).already_there


def test_a_text_that_is_longer_than_the_format_can_say(tmp_path):
    output = writer.DatasetWriter(str(tmp_path / "out"), {"text": str(tmp_path / "out")}, np.dtype(np.uint16), {})
    output.open(resume=False, overwrite=False)
    one = np.ones(1, np.int64)
    with pytest.raises(ValueError, match="a text of 2,147,483,648 tokens: an .idx holds lengths below"), output.block():
        output.append("text", np.empty(0, np.uint16), one << 31, one)
    with output.block():
        output.append("text", np.empty(0, np.uint16), (one << 31) - 1, one)
    output.close()


def test_a_run_killed_while_it_moves_its_files_starts_over(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".idx"):
            raise Interrupted
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(writer.os, "replace", killed)
        run(path, tmp_path / "out")
    assert not (tmp_path / "out_text_document.idx").exists()
    run(path, tmp_path / "out", resume=True)
    assert documents(tmp_path / "out") == [list(b"one"), list(b"two")]


def test_existing_output_and_a_running_writer_are_safe(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["text"])
    run(path, tmp_path / "out")
    with pytest.raises(ValueError, match="out_text_document.idx exists: .*--overwrite"):
        run(path, tmp_path / "out")
    other = writer.DatasetWriter(str(tmp_path / "out"), {"text": str(tmp_path / "x")}, np.dtype(np.uint16), {})
    other.open(resume=False, overwrite=True)
    with pytest.raises(ValueError, match="another run is writing it"):
        run(path, tmp_path / "out", overwrite=True)
    other.close()
    run(write_jsonl(tmp_path / "b.jsonl", ["new"]), tmp_path / "out", overwrite=True)
    assert documents(tmp_path / "out") == [list(b"new")]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "\xff\xfe"}', "line 3: invalid UTF-8"),
        (b'{"text": ', "line 3: broken JSON"),
        (b'{"content": "x"}', r"line 3: missing key \(no 'text', there is 'content'\)"),
        (b'{"text": "' + b"x" * 5000 + b'"}', "line 3: document too long"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_documents_stop_or_are_counted(tmp_path, small_blocks, line, message, workers):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\n' + line + b'\n{"text": "four"}\n')
    split_options = SplitOptions(max_document_bytes=2000)
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        run(str(path), tmp_path / "out", split_options=split_options, workers=workers)
    assert not list(tmp_path.glob("out_*"))
    summary = run(str(path), tmp_path / "out", split_options=split_options, workers=workers, on_error="skip")
    assert documents(tmp_path / "out") == [list(b"one"), list(b"two"), list(b"four")]
    assert list(summary.progress.problems.values()) == [1]
    assert "left out: 1 x" in str(summary) and "a.jsonl, line 3" in str(summary)


def test_a_text_may_be_empty_under_one_key(tmp_path):
    """The files of all keys have the same documents."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "", "title": "T"}\n{"text": "ab", "title": ""}\n{"text": "c", "title": "U"}\n')
    summary = run(str(path), tmp_path / "out", split_options=SplitOptions(json_keys=("text", "title")), append_eod=True)
    assert documents(tmp_path / "out") == [[], [97, 98, 256], [99, 256]]
    title = read_indexed(f"{tmp_path}/out_title_document")
    assert [title.document(number).tolist() for number in range(3)] == [[84, 256], [], [85, 256]]
    assert summary.progress.empty == 2 and not summary.progress.problems


def test_training_passes_over_empty_documents(tmp_path):
    texts = ["ab", "cde", "f"]
    data = {}
    for name, some in {"with": ["", *texts[:2], "", texts[2], ""], "without": texts}.items():
        run(write_jsonl(tmp_path / f"{name}.jsonl", some), tmp_path / name, append_eod=True)
        config = DataConfig(
            data_path=(f"{tmp_path}/{name}_text_document",), split="1,0,0", data_cache_path=tmp_path / "cache"
        )
        counts = SampleCounts(train=4, valid=0, test=0)
        train = build_datasets(config, counts, seq_length=3, seed=1, tokenizer=None, vocab_size=257).train
        data[name] = [train[number]["tokens"].tolist() for number in range(4)]
    assert data["with"] == data["without"]


@pytest.mark.parametrize(
    "keys, message",
    [
        (("text", "text"), "--json-keys text text: text is listed twice"),
        (("a/b",), "--json-keys a/b: the output is named .*out_a/b_document.*rename"),
        (("k" * 300,), "--json-keys kk.*at most 128 bytes"),
    ],
)
def test_keys_that_name_no_file(tmp_path, keys, message):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(ValueError, match=message):
        run(path, tmp_path / "out", split_options=SplitOptions(json_keys=keys))


def write_ranks(path, ranks):
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % number for number, token in enumerate(ranks)))
    return {"tokenizer_type": "TikTokenizer", "tokenizer_model": path, "tiktoken_pattern": "cl100k"}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["bare Exception", "panic"])
def test_a_library_that_fails_in_its_own_way(tmp_path, kind, workers):
    if kind == "panic":  # Rust's, no Exception: a byte that has no rank
        tokenizer, fails, good = write_ranks(tmp_path / "t.tiktoken", [bytes([i]) for i in range(128)]), "é", [97, 98]
    else:
        words = Tokenizer(models.WordLevel({"ab": 7}))  # no unknown token
        words.save(str(tmp_path / "w.json"))
        tokenizer, fails, good = (
            {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tmp_path / "w.json"},
            "c",
            [7],
        )
    path = write_jsonl(tmp_path / "a.jsonl", ["ab", fails, "ab"])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not tokenizable \("):
        run(path, tmp_path / "out", tokenizer, workers=workers)
    summary = run(path, tmp_path / "out", tokenizer, workers=workers, on_error="skip")
    assert documents(tmp_path / "out") == [good, good]
    assert summary.progress.problems == {"not tokenizable": 1}


def test_gigatoken_that_panics_gives_way_to_the_vendor(tmp_path):
    tokenizer = write_ranks(tmp_path / "t.tiktoken", [*(bytes([i]) for i in range(256)), b"xyz"])
    summary = run(write_jsonl(tmp_path / "a.jsonl", ["xyz a"]), tmp_path / "out", tokenizer)
    assert documents(tmp_path / "out") == [[256, 32, 97]]
    assert summary.progress.by_gigatoken == 0 and "gigatoken cannot load it" in summary.reason


def test_bad_files_stop_or_are_counted(tmp_path, small_blocks):
    good = write_jsonl(tmp_path / "a.jsonl", ["good"])
    (tmp_path / "b.jsonl").write_bytes(b"")
    cut = Path(write_jsonl(tmp_path / "c.jsonl.gz", [f"{i * 7919 % 10007}" for i in range(2000)]))
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: empty file"):
        run([good, str(tmp_path / "b.jsonl")], tmp_path / "out")
    with pytest.raises(ValueError, match=r"c\.jsonl\.gz, line \d+: damaged file"):
        run([good, str(cut)], tmp_path / "out")
    summary = run([good, str(tmp_path / "b.jsonl"), str(cut)], tmp_path / "out", on_error="skip")
    assert summary.progress.problems == {"empty file": 1, "damaged file": 1}
    assert documents(tmp_path / "out")[0] == list(b"good")


def test_bytes_after_compressed_data_are_reported_and_stop_nothing(tmp_path):
    path = Path(write_jsonl(tmp_path / "a.jsonl.gz", ["one", "two"]))
    path.write_bytes(path.read_bytes() + b"junk")
    summary = run(str(path), tmp_path / "out", workers=2)
    assert documents(tmp_path / "out") == [list(b"one"), list(b"two")]
    assert "left out: 1 x trailing bytes" in str(summary) and "a.jsonl.gz, line 3: trailing bytes (4 " in str(summary)


@pytest.mark.parametrize("text, message", [("5 100 3", "id 101"), ("7 -1", "id -1"), ("1 x", "'x'"), ("9" * 30, "")])
def test_ids_that_do_not_fit_are_caught(tmp_path, text, message):
    path = write_jsonl(tmp_path / "a.jsonl", ["1 2", text.replace("100", "101"), "3"])
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 100}
    with pytest.raises(ValueError, match=f"line 2: (id out of range|not tokenizable) .*{message}"):
        run(path, tmp_path / "out", null)
    run(path, tmp_path / "out", null, on_error="skip")
    assert documents(tmp_path / "out") == [[1, 2], [3]]


def test_a_tokenizer_without_end_of_document(tmp_path, monkeypatch):
    from mesh_megatron.data.tokenizers import vendors

    monkeypatch.setattr(vendors.ByteLevel, "eod", None, raising=False)
    original = vendors.ByteLevel.__init__
    monkeypatch.setattr(
        vendors.ByteLevel, "__init__", lambda self, kind: (original(self, kind), delattr(self, "eod"))[0]
    )
    with pytest.raises(ValueError, match="--append-eod"):
        run(write_jsonl(tmp_path / "a.jsonl", ["x"]), tmp_path / "out", append_eod=True)


def test_gigatoken_is_watched_while_it_works(tmp_path, small_blocks, tokenizer_json, monkeypatch):
    from mesh_megatron.data.tokenizers import fast_backend

    arguments = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer_json}
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])
    encode = fast_backend.Gigatoken.encode
    monkeypatch.setattr(
        fast_backend.Gigatoken,
        "encode",
        lambda self, texts: encode(self, [text.replace("text 3", "text 4") for text in texts]),
    )
    proofs = {"auto": Proof(ranges=((0, 127),)), "vendor": Proof(refusal="asked for")}
    monkeypatch.setattr("mesh_megatron.data.preprocessing.preprocess.choose", lambda tokenizer, choice: proofs[choice])
    with pytest.raises(ValueError, match="gigatoken gives other ids .*--tokenizer-backend vendor"):
        run(path, tmp_path / "out", arguments)
    run(path, tmp_path / "out", arguments, backend="vendor")
    assert len(documents(tmp_path / "out")) == 50
