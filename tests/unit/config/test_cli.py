"""Flags, YAML and presets: what overrides what, and what a mistake is answered with."""

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mesh_megatron.commands.checkpoint import List, Prune
from mesh_megatron.commands.evaluate import Evaluate
from mesh_megatron.commands.preprocess_data import Arguments as Preprocess
from mesh_megatron.commands.probe import Arguments as Probe
from mesh_megatron.config import cli
from mesh_megatron.config.cli import parse
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig

FLAGS = Path(__file__).with_name("flags.txt")


def run(*args: str) -> RunConfig:
    return cli.parse_run(RunConfig, PRESETS, args, prog="pretrain_mesh.py")


def all_flags(cls: type, found: list[str] | None = None) -> list[str]:
    found = [] if found is None else found
    for field in dataclasses.fields(cls):
        group = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
        if group is not None:
            all_flags(group, found)
        else:
            found.append("--" + field.name.replace("_", "-"))
    return found


def test_list_of_flags():
    """Flags are an interface: a new, renamed or lost one changes this file in the same commit."""
    assert all_flags(RunConfig) == FLAGS.read_text().split()


def test_no_two_groups_share_a_flag():
    flags = all_flags(RunConfig)
    assert len(flags) == len(set(flags))


def test_every_flag_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in all_flags(RunConfig):
        assert flag in text
    assert "(default: " in text and "Memory slots M of mesh" in text


def test_flags_over_file_over_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: pythia-410m\nmodel:\n  layout: 3+6R3+3\n  num-memory-slots: 7\ntraining:\n  lr: 3e-4\n")
    config = run("--config", str(file), "--num-memory-slots", "4", "--bf16")
    assert config.model.hidden_size == 1024  # the preset's
    assert str(config.model.segments) == "3+6R3+3" and config.training.lr == 3e-4  # the file's
    assert config.model.memory_slots == 4 and config.training.bf16  # the command line's


def test_a_preset_of_routers_is_a_default_too(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: pythia-410m\nrouter_preset: recommended\nmodel:\n  router_bias: 2\n")
    config = run("--config", str(file), "--router-lr-mult", "0.5")
    assert (config.model.hidden_size, config.model.router_gate) == (1024, "sigmoid")
    assert config.model.router_bias == 2 and config.training.router_lr_mult == 0.5
    assert run("--router-preset=recommended").training.router_lr_mult == 0.1
    paper = run("--config", str(file), "--router-preset", "paper")
    assert (paper.model.router_gate, paper.training.router_lr_mult) == ("softmax", 1.0)


def test_a_preset_may_be_named_with_underscores():
    assert run("--router_preset", "recommended") == run("--router-preset", "recommended")
    assert run("--router_preset=recommended").model.router_gate == "sigmoid"


@pytest.mark.parametrize("flag", ["--preset", "--router-preset"])
def test_an_empty_preset_is_refused(capsys, flag):
    """As an unset shell variable gives it."""
    with pytest.raises(SystemExit) as stopped:
        run(flag, "")
    assert stopped.value.code == 2 and f"{flag} : no such preset; one of " in capsys.readouterr().err


def test_a_file_may_merge_what_it_has_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: &small\n  hidden_size: 64\n  num_attention_heads: 4\n")
    assert run("--config", str(file)).model.hidden_size == 64
    file.write_text("model:\n  <<: {hidden_size: 64, qk-layernorm: true}\n  hidden_size: 96\n")
    assert (run("--config", str(file)).model.hidden_size, run("--config", str(file)).model.qk_layernorm) == (96, True)


def test_the_papers_routers_are_the_default():
    assert run("--router-preset", "paper") == dataclasses.replace(run(), router_preset="paper")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("router_preset: best\n", "--router-preset best: no such preset; one of paper, recommended"),
        ("model:\n  hiden_size: 3\n", "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ("modle:\n  hidden_size: 3\n", "unknown key 'modle'; did you mean 'model'"),
        ("model:\n  hidden_size: wide\n", "hidden_size: expected int, found 'wide'"),
        ("model:\n  recurrence: mush\n", "'mush' is not one of vanilla, base"),
        ("model: 3\n", "model is a group of settings"),
        ("checkpoint:\n  save: ''\n", "save: is empty; name a path"),
        ("- 1\n", "expected groups of settings, found list"),
        ("a: [1\n", "is not YAML"),
        ("preset: pythia-2b\n", "no such preset; did you mean 'pythia-"),
        ("preset: 160\n", "--preset 160: no such preset; "),
        ("preset: [pythia-410m]\n", "--preset ['pythia-410m']: no such preset; "),
        ("router_preset: {a: 1}\n", "--router-preset {'a': 1}: no such preset; one of paper, recommended"),
        ("preset: ''\n", "--preset : no such preset; one of pythia-160m"),
        ("parallel:\n  recompute_modules: []\n", "parallel: recompute_modules: is empty; name at least one"),
        ("config: other.yaml\n", "config: one file cannot name another"),
        ("training:\n  lr: 1\n  bf16: true\n  lr: 2\n", "run.yaml, line 4: lr is there twice; drop one"),
        ("training: {lr: 1}\nmodel: {}\ntraining: {bf16: true}\n", "line 3: training is there twice"),
        ("model:\n  hidden_size: 64\n  hidden-size: 96\n", "model: hidden-size is there twice, with dashes and"),
        (f"training:\n  lr: 1{'0' * 400}\n", "lr: expected float, found 10000"),
        ("checkpoint:\n  save: ~/runs/a\n", "--save ~/runs/a: only a shell knows what ~ stands for"),
    ],
)
def test_mistakes_in_a_file_name_the_nearest_valid(tmp_path, capsys, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run("--config", str(file))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_text_in_a_file_is_one_path_and_a_list_is_several(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  data_path: my data/wiki\n  valid_data_path: [a b, c]\nlogging:\n  profile_ranks: 3\n")
    found = run("--config", str(path))
    assert found.data.data_path == ("my data/wiki",) and found.data.valid_data_path == ("a b", "c")
    assert found.logging.profile_ranks == (3,)
    assert run("--data-path", "my data/wiki", "b").data.data_path == ("my data/wiki", "b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hiden-size 3", "--hiden-size: no such flag; did you mean --hidden-size?"),
        ("--recurence mesh", "--recurence: no such flag; did you mean --recurrence?"),
        ("--zzzzz", "--zzzzz: no such flag; see --help"),
        ("--recurrence mehs", "--recurrence mehs: no such value; did you mean 'mesh'?"),
        ("--loss-kernel bla", "--loss-kernel bla: no such value; one of auto, fused, torch"),
        ("--train-iters 1e3", "--train-iters 1e3: must be a whole number: write 1000"),
        ("--train_iters=1.5", "--train-iters 1.5: must be a whole number"),
        ("--profile-ranks 0 x", "--profile-ranks x: must be a whole number"),
        ("--lr fast", "--lr fast: must be a number"),
        ("--seed --bf16", "--seed: needs a value"),
        ("--bf16 yes", "--bf16 takes no value: drop 'yes'"),
        ("--lr 1 2", "--lr takes one value: drop '2'"),
        ("--config", "--config: needs a value"),
        ("--save=~/runs", "--save ~/runs: only a shell knows what ~ stands for; write the complete path"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_that_names_the_nearest(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        run(*words.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith(f": error: {message}\n") and error.count("\n") == 1


def test_flags_are_taken_in_all_their_forms():
    found = run(
        "--no-bf16", "--train_iters=5", "--seed", "-3", "--lr", "1e-3", "--train-samples", "None", "--data-path"
    )
    assert (found.training.train_iters, found.training.seed, found.training.lr) == (5, -3, 1e-3)


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (Evaluate, "--load a --data-path b --loops x", "--loops x: must be a whole number"),
        (Evaluate, "--data-path b", "--load: not given; see --help"),
        (Probe, "--load a --data b", "--output: not given; see --help"),
        (List | Prune, "prune a --keep-lst 1", "--keep-lst: no such flag; did you mean --keep-last?"),
        (List | Prune, "prune --keep-last x a", "--keep-last x: must be a whole number"),
        (Preprocess, "--input --output-prefix a --tokenizer-type NullTokenizer", "--input: needs a value"),
        (Preprocess, "--input a --output-prefix a --json-keys", "--json-keys: needs a value"),
        (Probe, "--load a --data --output c", "--data: needs a value"),
        (Probe, "--load '' --data b --output c", "--load '': is empty; name a path, or drop the flag"),
        (List | Prune, "list ''", "an argument is empty: name a path"),
    ],
)
def test_tools_tell_a_mistake_in_one_line(capsys, command, words, message):
    with pytest.raises(SystemExit) as stopped:
        parse(command, shlex.split(words), prog="tool")
    assert stopped.value.code == 2 and capsys.readouterr().err == f"tool: error: {message}\n"


def test_positional_values_may_stand_anywhere():
    assert parse(List | Prune, ["prune", "--keep-last", "2", "runs"]) == Prune(save=Path("runs"), keep_last=2)
    assert parse(List | Prune, ["prune", "runs", "--dry-run", "--keep-last=2"]).dry_run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model:\n  a: [1\nb: 2\n", ", line 3 is not YAML: expected ',' or ']'"),
        (b"a: \x01\n", " is not YAML: special characters are not allowed"),
        (b"a: \xff\n", " is not text in UTF-8"),
    ],
)
def test_a_file_that_is_not_yaml_is_told_in_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        run("--config", str(path))
    error = capsys.readouterr().err
    assert f"error: --config {path}{message}" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("absent", "instead"),
    [
        ("--use-megatron-fsdp", "--use-torch-fsdp2"),
        ("--reset-position-ids", "--reset-attention-mask"),
    ],
)
def test_flags_of_megatron_that_are_absent_name_what_to_use(capsys, absent, instead):
    with pytest.raises(SystemExit) as stopped:
        run("--bf16", absent)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"error: {absent}: " in error and instead in error
    run("--bf16", instead)


def test_missing_file_is_named(capsys):
    with pytest.raises(SystemExit):
        run("--config", "not_there.yaml")
    assert "--config not_there.yaml: No such file" in capsys.readouterr().err


def test_settings_survive_the_round_trip():
    config = run("--preset", "pythia-1b", "--data-path", "0.3", "a", "0.7", "b", "--save", "x", "--rotary-percent", "1")
    assert cli.from_dict(RunConfig, cli.to_dict(config), "test") == config


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert cli.run(interrupted, interrupted="run it again") == 130
    assert capsys.readouterr().err.endswith(": error: run it again\n")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_nobody_reads_ends_a_command_silently(lines):
    """The command fails to print, or only to write out what is left at its end."""
    program = f"import sys; from mesh_megatron.config.cli import run; sys.exit(run(lambda: print('x\\n' * {lines})))"
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start) as stdout:
        done = subprocess.run([sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE, timeout=100)
    assert (done.returncode, done.stderr) == (141, b"")
