"""Settings of exits and losses after every loop: mistakes are refused by flag, value and fix."""

import pytest

from mesh_megatron.config import cli
from mesh_megatron.config.run import RunConfig

GATE = "--layout 2+2R4+2 --exit-gate"
WEIGHTS = "--layout 2+2R4+2 --loop-loss-weights 1 1 1 1"


def validate(flags: str) -> None:
    run = cli.parse(RunConfig, [*flags.split(), "--mock-data", "--padded-vocab-size", "128", "--train-iters", "1"])
    run.validate(run.parallel.model_parallel_size)


@pytest.mark.parametrize(
    "flags",
    [
        GATE,
        f"{GATE} --exit-gate-only --exit-improvement-threshold -0.1",
        f"{GATE} --loops-sampling uniform --exit-entropy-coeff 0",
        f"{GATE} --tensor-model-parallel-size 2 --context-parallel-size 2 --use-distributed-optimizer",
        "--layout 2+2R4+0 --recurrence base --exit-gate",
        f"{WEIGHTS} --num-experts 4",
        f"{GATE} --use-torch-fsdp2",
        "--layout 2+2R2+2 --loop-loss-weights 0 3",
        f"{GATE} --recurrence attend",
        f"{WEIGHTS} --recurrence hyper",
        f"{GATE} --pipeline-model-parallel-size 2 --micro-batch-size 1 --global-batch-size 2",
    ],
)
def test_what_works(flags):
    validate(flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--exit-entropy-coeff 0.2", "--exit-entropy-coeff 0.2 without --exit-gate: there is no gate"),
        ("--exit-gate-only", "--exit-gate-only without --exit-gate: there is no gate to train; add --exit-gate"),
        ("--exit-improvement-slope 9", "--exit-improvement-slope 9.0 without --exit-gate"),
        (f"{GATE} --exit-entropy-coeff -1", "--exit-entropy-coeff -1.0: must be 0"),
        (f"{GATE} --exit-gate-only --exit-improvement-slope 0", "--exit-improvement-slope 0.0: must be above 0"),
        (f"{WEIGHTS} --exit-gate", "--loop-loss-weights 1 1 1 1 with --exit-gate: the gate weighs the losses"),
        ("--layout 2+2R4+2 --loop-loss-weights 1 2", r"--loop-loss-weights 1 2: 2 weights for the 4 loops .* give 4"),
        ("--layout 2+2R2+2 --loop-loss-weights 0 0", "--loop-loss-weights 0 0: no loss is left"),
        ("--layout 2+2R2+2 --loop-loss-weights 1 -1", "--loop-loss-weights -1.0: must be 0"),
        ("--layout 2+2+2+2 --exit-gate", r"--exit-gate with --layout 2\+2\+2\+2: .* use a layout such as"),
        ("--layout 4 --recurrence vanilla --exit-gate", "--exit-gate with --layout 4"),
        ("--layout 2+2R1+2 --exit-gate --exit-gate-only", r"--exit-gate-only with --layout 2\+2R1\+2: .* 2 loops"),
        (
            "--layout 2+2R40+2 --hidden-size 64 --num-attention-heads 4 --exit-gate --pipeline-model-parallel-size 2",
            "--exit-gate does not work with --pipeline-model-parallel-size 2: a state of --hidden-size 64 has no room",
        ),
        (f"{WEIGHTS} --loops-sampling uniform", "--loop-loss-weights 1 1 1 1 does not work with --loops-sampling uni"),
        (f"{GATE} --exit-gate-only --loops-sampling uniform", "--exit-gate-only does not work with --loops-sampling"),
        (f"{GATE} --backprop-loops 2", "--exit-gate does not work with --backprop-loops 2"),
        (
            f"{GATE} --exit-gate-only --fp8-format hybrid --bf16",
            "--exit-gate-only does not work with --fp8-format hybrid",
        ),
        (f"{GATE} --exit-gate-only --use-torch-fsdp2", "--exit-gate-only does not work with --use-torch-fsdp2"),
        (f"{GATE} --num-experts 4", "--exit-gate does not work with --num-experts 4"),
        (f"{GATE} --exit-gate-only --optimizer muon", "--exit-gate-only does not work with --optimizer muon"),
    ],
)
def test_mistakes_name_flag_value_and_fix(flags, words):
    with pytest.raises(ValueError, match=words):
        validate(flags)
