"""A launch script of Megatron-LM with pretrain_gpt.py replaced, and made small by flags alone."""

import json
import shlex
from pathlib import Path

import pytest
from integration_runs import ROOT, losses, small_corpus, torchrun

EXAMPLES = ROOT / "tests/unit/config/megatron_examples.txt"
SMALLER = """--hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 --global-batch-size 8
    --step-batch-size-schedule 0:4 512:8
    --train-iters 8 --lr-decay-iters 8 --lr 3e-3 --min-lr 3e-4 --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 2 --split 60,20,20 --log-interval 1 --save-interval 4
    --eval-iters 1 --initial-loss-scale 256 --num-workers 0 --hidden-dropout 0.1 --attention-dropout 0.1"""


def script(name: str) -> list[str]:
    """The words of one of Megatron-LM's examples."""
    (section,) = [part for part in EXAMPLES.read_text().split("# ") if part.startswith(name)]
    return shlex.split(" ".join(section.splitlines()[1:]))


def gpt2_files(folder: Path) -> str:
    """The flags of GPT-2's two files, for bytes without any merge."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    (folder / "vocab.json").write_text(json.dumps(letters | {"<|endoftext|>": 256}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return f"--vocab-file {folder}/vocab.json --merge-file {folder}/merges.txt"


@pytest.mark.full
@pytest.mark.parametrize(
    ("layers", "recursion"),
    [
        pytest.param("--num-layers 4", "", marks=pytest.mark.long, id="plain"),
        pytest.param("--num-layers 6", "--layout 2+2R2+2 --recurrence mesh", id="recursive"),
    ],
)
def test_the_script_of_gpt3_trains_stops_and_continues(tmp_path, layers, recursion):
    """--load and --save name one folder, which is empty at the first start; dropout goes on as if not interrupted."""
    folder = str(tmp_path / "checkpoints")
    tokenizer = gpt2_files(tmp_path)
    corpus = small_corpus(tmp_path, tokenizer=f"--tokenizer-type GPT2BPETokenizer {tokenizer}")
    own = f"--data-path {corpus} --tensorboard-dir {tmp_path}/tensorboard {tokenizer}"
    model = [*script("gpt3/train_gpt3_175b_distributed.sh"), *shlex.split(f"{own} {SMALLER} {layers} {recursion}")]
    words = [*model, "--save", folder, "--load", folder]
    first = torchrun(2, "pretrain_mesh.py", *words, "--exit-interval", 4)
    assert first.returncode == 0, first.stderr
    assert f"WARNING: --load {folder}: no latest_checkpointed_iteration.txt there" in first.stderr
    assert losses(Path(folder)).keys() == {1, 2, 3, 4}
    second = torchrun(2, "pretrain_mesh.py", *words)
    assert second.returncode == 0, second.stderr
    assert "WARNING: --load" not in second.stderr and "continuing from" in second.stdout
    steps = losses(Path(folder))
    assert steps.keys() == set(range(1, 9)) and steps[8][0] < steps[1][0]
    assert any((tmp_path / "tensorboard").iterdir())
    settings = json.loads((Path(folder) / "iter_0000008/run_config.json").read_text())
    if recursion:
        complete = str(tmp_path / "complete")
        assert torchrun(2, "pretrain_mesh.py", *model, "--save", complete, "--load", complete).returncode == 0
        assert losses(Path(complete)) == steps
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    tokens = [record["consumed tokens"] for record in records if "grad-norm" in record]
    assert tokens == [128, 256, 384, 512, 768, 1024, 1280, 1536]
    assert settings["data"]["tokenizer_type"] == "GPT2BPETokenizer" and settings["model"]["hidden_dropout"] == 0.1
    assert settings["training"]["fp16"] and settings["training"]["adam_beta2"] == 0.95
