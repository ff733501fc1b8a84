"""The commands of docs/huggingface.md, run literally on a model that the trainer has just trained."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
SEQUENCE, SAMPLES = 32, 24
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def run(command: str, folder: Path) -> str:
    """Run ``command`` in ``folder`` by a shell and return what it prints."""
    environment = ENVIRONMENT | {"HF_HOME": str(folder / "hf_home")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_tool(command: str, folder: Path) -> tuple[int, str, str]:
    """Exit status, output and errors of ``python tools/...``, in this process: the libraries are imported already."""
    _, tool, *flags = shlex.split(command)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [tool, *flags])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(tool, run_name="__main__")
    return exit.value.code, out.getvalue(), err.getvalue()


def run_as_written(command: str, folder: Path) -> str:
    """Tools in this process where that is the same; by a shell what has a pipe or reads caches of its own."""
    if command.startswith("python tools/") and "--tasks" not in command:
        status, out, err = run_tool(command, folder)
        assert status == 0, f"{command}\n{out[-2000:]}\n{err[-4000:]}"
        return out
    return run(command, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as the page imagines it: a trained run, data, a task, a plain model to import."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("hf")
    for name in ("tools", "pretrain_mesh.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "tasks").symlink_to(ROOT / "tests/integration/lm_eval_tasks")
    (folder / "data").mkdir()
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    (folder / "data/valid.txt").write_text(text[-4000:], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines(keepends=True)), model_prefix=str(folder / "spm"), model_type="bpe",
        vocab_size=600, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    ids = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model")).encode(text)
    for name, tokens in {"train": ids, "valid": ids[: SAMPLES * SEQUENCE + 1]}.items():
        prefix = str(folder / "data" / f"{name}_text_document")
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
        builder.add_document(torch.tensor(tokens), [len(tokens)])
        builder.finalize(prefix + ".idx")
    run(
        "python pretrain_mesh.py --layout 1+1R3+1 --hidden-size 32 --num-attention-heads 4 --lr 1e-2 "
        f"--seq-length {SEQUENCE} --micro-batch-size 8 --train-iters 20 --save runs/mesh --num-workers 0 "
        "--train-data-path data/train_text_document --valid-data-path data/valid_text_document "
        f"--eval-iters {SAMPLES // 8} --eval-interval 20 "
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model spm.model",
        folder,
    )
    torch.manual_seed(0)
    plain = GPTNeoXConfig(
        vocab_size=640, hidden_size=32, num_attention_heads=4, num_hidden_layers=6, intermediate_size=128,
        max_position_embeddings=SEQUENCE,
    )  # fmt: skip
    GPTNeoXForCausalLM(plain).save_pretrained(folder / "hub/plain")
    return folder


@pytest.fixture(scope="module")
def outputs(place) -> dict[str, str]:
    """Each command of the page -> what it printed."""
    commands = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert len(commands) == 13
    printed = {command: run_as_written(command, place) for command in commands}
    python = "\n".join(blocks("python"))
    printed["python"] = run(f"python - <<'EOF'\n{python}\nEOF", place)
    return printed


def output_of(outputs: dict[str, str], *words: str) -> str:
    return next(text for command, text in outputs.items() if all(word in command for word in words))


def validation_loss(place: Path) -> float:
    rows = [json.loads(line) for line in (place / "runs/mesh/metrics.jsonl").read_text().splitlines()]
    return next(row["lm loss validation"] for row in rows if "lm loss validation" in row)


def test_evaluation_is_the_trainers_validation_loss(place, outputs):
    on_checkpoint = json.loads(output_of(outputs, "evaluate.py --load runs/mesh", "--data-path"))
    numbers = on_checkpoint["data/valid_text_document"]
    assert numbers["tokens"] == SAMPLES * SEQUENCE
    assert numbers["loss"] == pytest.approx(validation_loss(place), abs=1e-4)
    more = run_as_written("python tools/evaluate.py --load exports/mesh --data-path data/valid_text_document", place)
    assert json.loads(more)["data/valid_text_document"]["loss"] == pytest.approx(numbers["loss"], abs=1e-6)


def test_a_tokenizer_that_has_moved(place, outputs, tmp_path):
    command = f"python {ROOT}/tools/evaluate.py --data-path {place}/data/valid_text_document"
    status, _, err = run_tool(f"{command} --load {place}/runs/mesh", tmp_path)
    assert status == 2 and "--tokenizer-model spm.model: no such file" in err
    moved = f"--tokenizer-model {place}/spm.model"
    status, out, err = run_tool(f"{command} --load {place}/runs/mesh {moved}", tmp_path)
    assert status == 0, err
    assert next(iter(json.loads(out).values()))["loss"] == pytest.approx(validation_loss(place), abs=1e-4)
    status, _, err = run_tool(f"{command} --load {place}/exports/mesh {moved}", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "is an exported model, which has its own" in err


def test_strided_evaluation(place, outputs):
    results = json.loads(output_of(outputs, "--stride 16"))
    assert results == json.loads((place / "results.json").read_text())
    text, tokens = results["data/valid.txt"], results["data/valid_text_document"]
    content = (place / "data/valid.txt").read_text()
    assert text["bytes"] == len(content.encode()) and text["words"] == len(content.split())
    assert tokens["tokens"] == SAMPLES * SEQUENCE
    difference = abs(tokens["loss"] - validation_loss(place))
    assert 1e-6 < difference < 0.1, (
        "a difference is expected: tokens at the start of a window attend to more than in training"
    )


def test_export_in_both_precisions(place, outputs):
    exact, half = (load_file(place / f"exports/{name}/model.safetensors") for name in ("mesh", "mesh-bf16"))
    for name, tensor in exact.items():
        expected = tensor if ".recurrence." in name else tensor.bfloat16()
        assert torch.equal(half[name], expected), name
    card = (place / "exports/mesh/README.md").read_text()
    assert "| iterations | 20 |" in card and f"{validation_loss(place):.4f}" in card and str(place) not in card


@pytest.mark.parametrize("trusted", [True, False])
def test_exported_tokenizer_is_the_trained_one(place, outputs, monkeypatch, trusted):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks whether to run the export's code"))
    tokenizer = AutoTokenizer.from_pretrained(place / "exports/mesh", trust_remote_code=trusted)
    trained = sentencepiece.SentencePieceProcessor(model_file=str(place / "spm.model"))
    text = (place / "data/valid.txt").read_text()
    assert tokenizer(text, verbose=False)["input_ids"] == trained.encode(text)
    assert tokenizer.decode(trained.encode(text)) == text


def test_python_of_the_page(outputs):
    printed = outputs["python"]
    assert "def main(" in printed and re.search(r"^6 torch.Size\(\[2, ", printed, re.MULTILINE)
    loops = torch.tensor(json.loads(printed[printed.index("tensor(") + 7 : printed.rindex(")")]))
    assert loops.dtype == torch.int64 and loops.min() >= 2, "loops of each token, with exits"


def test_tasks_through_both_commands(outputs):
    ours = json.loads(output_of(outputs, "evaluate.py", "--tasks"))["local_code"]
    table = output_of(outputs, "lm_eval --model hf")
    theirs = {metric: float(value) for metric, value in re.findall(r"\|(acc\w*)\s*\|[^|]*\|\s*(\d\.\d+)\|", table)}
    assert theirs == {name: pytest.approx(ours[f"{name},none"], abs=1e-4) for name in ("acc", "acc_norm")}


def test_generation(place, outputs):
    made = output_of(outputs, "generate.py", "--seed 1")
    assert made.startswith("def main(") and len(made) > len("def main(\n")
    assert run_as_written(next(command for command in outputs if "--seed 1" in command), place) == made
    assert output_of(outputs, "generate.py", "--greedy").startswith("import")


def test_an_import_trains_on_and_exports_the_same(place, outputs):
    assert "train it: pretrain_mesh.py --config runs/imported/model.yaml" in output_of(
        outputs, "import_hf.py", "exports"
    )
    assert (place / "runs/tuned/iter_0000002").is_dir()
    run_as_written("python tools/checkpoint.py rollback runs/imported 0", place)
    run_as_written("python tools/export_hf.py --load runs/imported --output exports/again", place)
    first, again = (load_file(place / f"exports/{name}/model.safetensors") for name in ("mesh", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    first, again = (json.loads((place / f"exports/{name}/tokenizer.json").read_text()) for name in ("mesh", "again"))
    assert first == again


def test_an_uptrained_model_is_recursive(place, outputs):
    settings = yaml.safe_load((place / "runs/uptrained/model.yaml").read_text())["model"]
    assert settings["layout"] == "1+2R2+1" and settings["embedding_scaling"] is False


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("export_hf.py --load runs/mesh --output exports/mesh", "exists; name another folder or add --force"),
        ("export_hf.py --load runs/nowhere --output exports/x", "--load runs/nowhere: no such folder"),
        ("import_hf.py --model data --output runs/x", "data: cannot read config.json"),
        ("import_hf.py --model hub/plain --output runs/x --layout 4+8R2+4", "leaves nothing between"),
        ("evaluate.py --load exports/mesh", "nothing to evaluate: give --data-path or --tasks"),
        ("evaluate.py --load exports/mesh --data-path data/none", "neither data/none.idx nor a text file"),
        ("generate.py --load exports/mesh --temperature 0", "--greedy takes the likeliest"),
        ("generate.py --load exports/mesh --iteration 5", "--iteration 5: --load exports/mesh is an exported model"),
        ("evaluate.py --load exports/mesh --data-path x --output data/valid.txt/x", "cannot be written to"),
        ("export_hf.py --load runs/nowhere --output data/valid.txt/x", "cannot be written to"),
        ("import_hf.py --model hub/plain --output runs/x --init select", "--init select is for --layout"),
        ("import_hf.py --model hub/plain --output runs/x --exit-gate", "--exit-gate is for --layout"),
        ("import_hf.py --model hub/plain --output runs/x --num-memory-slots 9", "--num-memory-slots 9 is for --layout"),
    ],
)
def test_mistakes_are_one_line(place, outputs, command, complaint):
    before = sorted(place.rglob("exports/*")) + sorted(place.rglob("runs/*"))
    status, _, err = run_tool(f"python tools/{command}", place)
    assert status == 2
    [line] = err.splitlines()
    assert line.startswith(f"{command.split()[0]}: ") and complaint in line
    assert sorted(place.rglob("exports/*")) + sorted(place.rglob("runs/*")) == before
