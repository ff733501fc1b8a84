"""Settings without an effect beside the others are named; all others are not."""

from dataclasses import fields, is_dataclass
from fnmatch import filter as matching
from pathlib import Path

import pytest

from mesh_megatron.commands.pretrain import report
from mesh_megatron.config import cli, without_effect
from mesh_megatron.config.presets import PRESETS
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.without_effect import settings_without_effect
from mesh_megatron.planning.summary import summary_of

EXPERTS = "--num-experts 4 --moe-router-topk 2"
RECIPES = sorted((Path(__file__).parents[3] / "examples").rglob("*.yaml"))


def run_of(flags: str) -> RunConfig:
    run = cli.parse_run(RunConfig, PRESETS, f"--dry-run --train-iters 9 {flags}".split())
    run.validate(1)
    return run


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            "--recurrence base --router-gate sigmoid --num-memory-slots 7",
            ["--num-memory-slots 7, --router-gate sigmoid have no effect with --recurrence base"],
        ),
        ("--recurrence static --router-lr-mult 0.5", ["--router-lr-mult 0.5 has no effect with --recurrence static"]),
        ("--recurrence dynamic --router-lr-mult 0.5 --router-init-std 0", []),
        ("--recurrence vanilla+mesh --layout 2+4R2+2 --router-gate sigmoid", []),
        ("--router-gate sigmoid --router-preset paper --router-wd-mult 0", []),
        ("--hyper-lanes 3", ["--hyper-lanes 3 has no effect with --recurrence mesh"]),
        ("--hyper-lanes 3 --recurrence hyper-dynamic", []),
        ("--decay-input linear", ["--decay-input linear has no effect with --recurrence mesh"]),
        ("--share-kv-across-loops --layout 2+2R2+2", []),
        (
            "--share-kv-across-loops --layout 2+2R1+2",
            ["--share-kv-across-loops has no effect with --layout 2+2R1+2"],
        ),
        (
            "--exit-gate --exit-gate-only --router-z-loss 0.1",
            ["--router-z-loss 0.1 has no effect with --exit-gate-only"],
        ),
        ("--exit-gate --exit-entropy-coeff 0.5 --router-z-loss 0.1", []),
        ("--exit-gate --layout 2+2R1+2", ["--exit-gate has no effect with --layout 2+2R1+2"]),
        ("--loss-scale 8", ["--loss-scale 8.0 has no effect without --fp16"]),
        ("--initial-loss-scale 8 --bf16", ["--initial-loss-scale 8.0 has no effect without --fp16"]),
        ("--loss-scale 8 --fp16", []),
        ("--recompute-num-layers 2", ["--recompute-num-layers 2 has no effect without --recompute-granularity full"]),
        (
            "--recompute-modules core_attn mlp",
            ["--recompute-modules core_attn mlp has no effect without --recompute-granularity selective"],
        ),
        ("--recompute-granularity selective --recompute-modules mlp", []),
        ("--muon-nesterov", ["--muon-nesterov has no effect with --optimizer adam"]),
        ("--muon-nesterov --optimizer muon", []),
        ("--rope-scaling-factor 4", ["--rope-scaling-factor 4.0 has no effect without --use-rope-scaling"]),
        ("--moe-router-topk 3", ["--moe-router-topk 3 has no effect without --num-experts"]),
        ("--lr-wsd-decay-iters 3", ["--lr-wsd-decay-iters 3 has no effect with --lr-decay-style cosine"]),
        ("--lr-wsd-decay-iters 3 --lr-decay-style WSD", []),
        ("--min-lr 0 --lr-decay-style constant", ["--min-lr 0.0 has no effect with --lr-decay-style constant"]),
        ("--loss-spike-window 9", ["--loss-spike-window 9 has no effect without --loss-spike-factor"]),
        ("--recurrence base --router-gate softmax --router-lr-mult 1 --hyper-lanes 2", []),
        ("--router-bias 2", ["--router-bias 2.0 has no effect with --router-init uniform"]),
        ("--router-bias 2 --router-init anchor", []),
        (f"{EXPERTS} --moe-aux-loss-coeff 0.1 --moe-router-load-balancing-type seq_aux_loss", []),
        (
            f"{EXPERTS} --moe-aux-loss-coeff 0.1 --moe-router-load-balancing-type none",
            ["--moe-aux-loss-coeff 0.1 has no effect with --moe-router-load-balancing-type none"],
        ),
        (
            f"{EXPERTS} --moe-router-score-function sigmoid --moe-router-pre-softmax --moe-router-bias-update-rate 1",
            [
                "--moe-router-bias-update-rate 1.0 has no effect without --moe-router-enable-expert-bias",
                "--moe-router-pre-softmax has no effect with --moe-router-score-function sigmoid",
            ],
        ),
        (
            "--exit-gate --exit-improvement-slope 9",
            ["--exit-improvement-slope 9.0 has no effect without --exit-gate-only"],
        ),
        (
            "--exit-gate --exit-gate-only --exit-improvement-slope 9 --exit-entropy-coeff 1",
            ["--exit-entropy-coeff 1.0 has no effect with --exit-gate-only"],
        ),
        ("--adam-beta2 0.99", []),
        ("--adam-beta2 0.99 --optimizer muon", []),
        ("--adam-beta2 0.99 --optimizer sgd", ["--adam-beta2 0.99 has no effect with --optimizer sgd"]),
        ("--sgd-momentum 0.8", ["--sgd-momentum 0.8 has no effect with --optimizer adam"]),
        (
            "--weight-decay 1 --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1",
            ["--weight-decay 1.0 has no effect with --weight-decay-incr-style linear"],
        ),
        (
            "--fp16 --loss-scale 8 --loss-scale-window 5",
            ["--loss-scale-window 5 has no effect with --loss-scale 8.0"],
        ),
        (
            "--make-vocab-size-divisible-by 64 --padded-vocab-size 640",
            ["--make-vocab-size-divisible-by 64 has no effect with --padded-vocab-size 640"],
        ),
        ("--vocab-size 500", ["--vocab-size 500 has no effect with --tokenizer-type None"]),
        ("--vocab-size 500 --tokenizer-type NullTokenizer", []),
        ("--split 9,1,0 --train-data-path a", ["--split 9,1,0 has no effect with paths for each split"]),
        ("--ddp-bucket-size 9", ["--ddp-bucket-size 9 has no effect without --overlap-grad-reduce"]),
        ("--ddp-bucket-size 9 --use-torch-fsdp2", ["--ddp-bucket-size 9 has no effect with --use-torch-fsdp2"]),
        ("--attention-backend local --transformer-impl local", []),
        (
            "--attention-backend flash --transformer-impl local",
            ["--attention-backend flash has no effect with --transformer-impl local"],
        ),
        ("--keep-last 2 --async-save", ["--keep-last 2, --async-save have no effect without --save"]),
        ("--keep-last 2 --async-save --save x", []),
        ("--ckpt-step 5", ["--ckpt-step 5 has no effect without --load or --save"]),
        ("--ckpt-step 5 --load x", []),
        ("--timing-log-option max", ["--timing-log-option max has no effect without --timing-log-level"]),
        ("--wandb-exp-name x", ["--wandb-exp-name x has no effect without --wandb-project"]),
        (
            "--loss-scale 8 --moe-router-topk 3",
            [
                "--moe-router-topk 3 has no effect without --num-experts",
                "--loss-scale 8.0 has no effect without --fp16",
            ],
        ),
    ],
)
def test_they_are_named_with_what_they_need(flags, lines):
    assert settings_without_effect(run_of(flags)) == lines


def test_a_run_warns_of_them(caplog):
    run = run_of("--loss-scale 8 --padded-vocab-size 128")
    report(run, summary_of(run, 128, 1))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "--loss-scale 8.0 has no effect without --fp16")
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_have_none(recipe):
    words = ["--config", str(recipe), "--save", "where a user says"]
    assert settings_without_effect(cli.parse_run(RunConfig, PRESETS, words)) == []


def test_the_table_names_settings_that_there_are():
    groups = [group for field in fields(RunConfig) if is_dataclass(group := getattr(RunConfig(), field.name))]
    names = [field.name for group in [RunConfig(), *groups] for field in fields(group)]
    assert len(set(names)) == len(names)
    for patterns, _, _ in without_effect._NEEDS:
        assert all(matching(names, pattern) for pattern in patterns.split()), patterns
