"""Flags, YAML and presets: what overrides what, and what a mistake is answered with."""

import dataclasses
from pathlib import Path

import pytest

from mesh_megatron.config import cli
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
        ("- 1\n", "expected groups of settings, found list"),
        ("a: [1\n", "is not YAML"),
        ("preset: pythia-2b\n", "no such preset; did you mean 'pythia-"),
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


def test_mistyped_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--hiden-size", "3")
    assert stopped.value.code == 2
    assert "--hidden-size" in capsys.readouterr().err


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
