"""The search: exact over what it looks at, and what it prints is a command of the trainer."""

import functools
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from mesh_megatron.commands import plan
from mesh_megatron.config import cli
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.planning.command import command_line, launcher
from mesh_megatron.planning.hardware import Assumptions, Links, gpu_named
from mesh_megatron.planning.plan import checked_vocabulary, plan_run
from mesh_megatron.planning.search import layouts, micro_batches, search
from mesh_megatron.planning.step_time import StepModel

LINKS = Links(gpu_named("h100"), Assumptions(), 8)
ROOM = 80e9 - 6 * 2**30
PAPER = "--bf16 --global-batch-size 512 --train-tokens 250000000000"

in_full = functools.partial(pytest.param, marks=pytest.mark.full)


def parsed(flags: str) -> RunConfig:
    return cli.parse_run(RunConfig, PRESETS, flags.split())


@pytest.mark.parametrize(
    "base, flags, ranks",
    [
        in_full("--preset pythia-1.4b", PAPER, 512),
        in_full("--preset pythia-410m", f"{PAPER} --recurrence vanilla --fp8-format hybrid", 64),
        in_full(
            "--config examples/pythia/1b.yaml", "--recurrence anchor --seq-length 16384 --global-batch-size 64", 64
        ),
        ("--preset pythia-160m", f"{PAPER} --num-experts 8 --expert-model-parallel-size 4", 16),
        ("", "--train-iters 10 --global-batch-size 48 --padded-vocab-size 1024 --mock-data", 3),
    ],
)
def test_every_layout_found_is_a_command_of_the_trainer(base: str, flags: str, ranks: int):
    run = parsed(f"{base} {flags}")
    for found in search(run, ranks, LINKS, ROOM):
        words = shlex.split(command_line(found.run, parsed(base), ranks, 8))
        read = cli.parse_run(RunConfig, PRESETS, words[words.index("pretrain_mesh.py") + 1 :])
        assert read.parallel == found.run.parallel and read.training == found.run.training
        assert read.model == run.model and read.fp8 == run.fp8
        assert plan_run(read, ranks).fullest == found.fullest
        assert found.fullest.total <= ROOM
        assert (
            read.data.data_path == (() if run.data.mock_data else ("PREFIX",)) and str(read.checkpoint.save) == "FOLDER"
        )


@pytest.mark.parametrize("ranks, room", [in_full(16, ROOM), (8, 4e9)])
def test_nothing_that_is_valid_and_fits_is_faster(ranks: int, room: float):
    """All layouts timed one by one, without the bound that lets the search stop."""
    run = parsed("--preset pythia-410m --bf16 --train-iters 10 --seq-length 2048 --global-batch-size 64")
    times = []
    for candidate in layouts(run, ranks, 8, False):
        try:
            rows = checked_vocabulary(candidate, ranks)
        except ValueError:
            continue
        if plan_run(candidate, ranks).fullest.total <= room:
            times.append(StepModel(candidate, rows, ranks, micro_batches(candidate, ranks), LINKS).simulated().total)
    assert len(times) > 20
    assert [found.time.total for found in search(run, ranks, LINKS, room, keep=5)] == sorted(times)[:5]


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_optimizers_are_searched_with_what_they_have(optimizer: str):
    """Replicas of neither have all that those of AdamW have; they are found all the same."""
    run = parsed(f"--preset pythia-160m --optimizer {optimizer} --bf16 --train-iters 10 --global-batch-size 64")
    fastest = search(run, 8, LINKS, ROOM, keep=1)[0].run.parallel
    assert fastest.model_parallel_size == 1 and fastest.overlap_grad_reduce and not fastest.overlap_param_gather
    assert fastest.use_distributed_optimizer == (optimizer == "muon")


def test_less_memory_asks_for_more_ranks_of_a_model():
    run = parsed(f"--preset pythia-1.4b {PAPER}")
    roomy, narrow = (search(run, 64, LINKS, room, keep=1)[0] for room in (ROOM, 5e9))
    assert roomy.run.parallel.model_parallel_size == 1 < narrow.run.parallel.model_parallel_size
    assert narrow.time.total > roomy.time.total


def test_tensor_parallelism_stays_inside_a_node_unless_asked():
    run = parsed("--preset pythia-1.4b --bf16 --train-iters 1")

    def sizes(across: bool) -> set[int]:
        return {c.parallel.tensor_model_parallel_size for c in layouts(run, 32, 8, across)}

    assert sizes(False) == {1, 2, 4, 8} and sizes(True) == {1, 2, 4, 8, 16, 32}


def test_refusals_name_the_fix():
    run = parsed(f"--preset pythia-1.4b {PAPER}")
    with pytest.raises(ValueError, match="no layout fits 0.9 GiB of a NVIDIA H100 SXM; the smallest one needs"):
        search(run, 8, LINKS, 1e9)
    odd = replace(run, training=replace(run.training, global_batch_size=7))
    with pytest.raises(ValueError, match="--global-batch-size 7"):
        search(odd, 11, LINKS, ROOM)
    with pytest.raises(ValueError, match="--world-size 12 does not fill nodes of --gpus-per-node 8"):
        launcher(12, 8)
    sharded = parsed(f"--preset pythia-160m {PAPER} --use-torch-fsdp2")
    with pytest.raises(
        ValueError, match="--use-torch-fsdp2: the search does not look at it; plan it with --search nev"
    ):
        search(sharded, 8, LINKS, ROOM)


def test_the_command_names_the_data_that_is_missing():
    given = {"": "--data-path PREFIX", "--valid-data-path v": "--train-data-path PREFIX", "--mock-data": ""}
    for words, missing in given.items():
        line = command_line(parsed(f"--preset pythia-160m {words}"), parsed("--preset pythia-160m"), 1, 8)
        assert line.partition(" --save ")[0].endswith(missing or "--mock-data")
        assert line.count("PREFIX") == (missing != "")


def test_launchers():
    assert launcher(1, 8) == ["python"]
    assert launcher(8, 8) == ["torchrun", "--nproc-per-node", "8"]
    assert launcher(64, 8)[:5] == ["torchrun", "--nnodes", "8", "--nproc-per-node", "8"]


def test_the_tool_searches_where_no_layout_is_given(capsys: pytest.CaptureFixture[str]):
    few = "--preset pythia-160m --global-batch-size 64 --world-size 8"
    assert plan.main(few.split()) == 0
    output = capsys.readouterr().out
    command = output.splitlines()[-1]
    for part in (
        "parameters",
        "FLOPs per token",
        "flight",
        "by --recompute-granularity",
        "sends per step",
        "GPU-hours",
    ):
        assert part in output, part  # of the best one
    assert "…" not in output  # no cell is cut off in a terminal of 80 columns
    assert command.startswith("torchrun --nproc-per-node 8 pretrain_mesh.py --preset pythia-160m --")
    for layout in ("--tensor-model-parallel-size 2", "--search never"):
        assert plan.main(f"{few} {layout}".split()) == 0
        output = capsys.readouterr().out
        assert "torchrun" not in output and "fits:" in output and "matrix products" in output
    for words in ("--tensor-model-parallel-size 2 --search always", "--grad-reduce-in-bf16"):  # the last is no layout
        assert plan.main(f"{few} {words}".split()) == 0
        assert "torchrun" in (output := capsys.readouterr().out)
    assert "--grad-reduce-in-bf16" in output.splitlines()[-1]
    assert plan.main([*few.split(), "--gpu", "h100", "--link-efficiency", "0"]) == 2
    assert "--link-efficiency 0" in capsys.readouterr().err


def test_the_tool_refuses_before_it_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    few = "--preset pythia-160m --global-batch-size 48"
    assert plan.main(f"{few} --world-size 12".split()) == 2
    said = capsys.readouterr()
    assert "--world-size 12 does not fill nodes of --gpus-per-node 8" in said.err and not said.out
    file = tmp_path / "run.yaml"
    file.write_text("gpu: h200\n")  # which a run does not know
    with pytest.raises(SystemExit):
        plan.main(f"{few} --world-size 8 --config {file}".split())
    said = capsys.readouterr()
    assert "unknown key 'gpu'" in said.err and not said.out


def test_the_tool_plans_with_the_last_batch_of_a_schedule(capsys: pytest.CaptureFixture[str]):
    words = f"{SMALL} --padded-vocab-size 256 --step-batch-size-schedule".split()
    assert plan.main([*words, "0:16 2K:32"]) == 0
    assert "32 sequences = micro-batch size 1" in capsys.readouterr().out
    assert plan.main([*words, "0:16 2K:32", "--global-batch-size", "64"]) == 2
    assert "--global-batch-size 64 is not the last batch" in capsys.readouterr().err
    assert plan.main(words[:-1]) == 0
    assert "512 sequences = micro-batch size 1" in capsys.readouterr().out


def test_bounds_are_checked_before_the_tokenizer_is_asked(capsys: pytest.CaptureFixture[str]):
    words = f"{SMALL} --tokenizer-type ByteLevelTokenizer --make-vocab-size-divisible-by 0"
    assert plan.main(words.split()) == 2
    assert "--make-vocab-size-divisible-by 0: must be at least 1" in capsys.readouterr().err


def test_the_tool_names_settings_without_effect(capsys: pytest.CaptureFixture[str]):
    assert plan.main(f"{SMALL} --padded-vocab-size 256 --muon-nesterov --keep-last 3".split()) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: --muon-nesterov has no effect with --optimizer adam"]


SMALL = "--layout 2+2R2+2 --hidden-size 128 --num-attention-heads 4 --seq-length 256 --train-iters 10"


def test_the_tool_plans_for_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.yaml"
    file.write_text("training: {fp16: true}\n")
    for words in ("--fp16", f"--config {file}"):
        assert plan.main(f"{SMALL} --padded-vocab-size 256 {words}".split()) == 0, words
    capsys.readouterr()
    assert plan.main(f"{SMALL} --padded-vocab-size 256 --bf16 --fp16".split()) == 2
    assert "--bf16 and --fp16 contradict each other" in capsys.readouterr().err


def test_the_tool_asks_the_tokenizer_for_the_vocabulary(capsys: pytest.CaptureFixture[str]):
    assert plan.main(f"{SMALL} --tokenizer-type ByteLevelTokenizer".split()) == 0
    assert "(384 rows)" in capsys.readouterr().out
    assert plan.main(f"{SMALL} --tokenizer-type HuggingFaceTokenizer --tokenizer-model nowhere".split()) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert plan.main(SMALL.split()) == 2
    assert "the vocabulary is unknown" in capsys.readouterr().err


def test_the_tool_writes_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "new" / "summary.json"
    words = f"{SMALL} --padded-vocab-size 256 --summary-json {file}".split()
    assert plan.main(words) == 0
    assert json.loads(file.read_text())["train_iters"] == 10
    capsys.readouterr()
    assert plan.main([*words[:-1], str(tmp_path)]) == 2
    assert f"--summary-json {tmp_path}: is a folder" in capsys.readouterr().err
    assert plan.main([*words, "--scaling-figure", str(tmp_path / "x.png")]) == 2
    assert "drop one of the two" in capsys.readouterr().err
