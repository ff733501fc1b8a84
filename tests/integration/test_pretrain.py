"""pretrain_mesh.py as a user runs it: learning, resuming, precision, schedules, refusals."""

import json
import math
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from integration_runs import ROOT, SMALL, final, losses, torchrun, weights

from mesh_megatron.config.model import Recurrence
from mesh_megatron.training.fault_tolerance.save_lock import hold_save_lock

OWN_GROUPS = "--router-lr-mult 0.1 --router-wd-mult 0 --router-gate sigmoid --router-input rmsnorm --router-scale 0.01"


@pytest.mark.parametrize(
    "scheme",
    ["mesh", *(pytest.param(name, marks=pytest.mark.full) for name in get_args(Recurrence) if name != "mesh")],
)
def test_every_scheme_learns(train, tmp_path, scheme):
    code, _, _ = train("--recurrence", scheme, "--train-iters", 15, "--save", tmp_path)
    assert code == 0
    steps = losses(tmp_path)
    assert steps[1][0] == pytest.approx(math.log(384), abs=0.5)  # 257 bytes and marks, padded to 384 rows
    assert steps[15][0] < steps[1][0] - 0.5


@pytest.mark.parametrize(
    "more", ["--bf16", *(pytest.param(more, marks=pytest.mark.full) for more in ("", "--fp16", OWN_GROUPS))]
)
def test_resume_is_bit_identical(train, tmp_path, more):
    flags = ["--train-iters", 12, "--save-interval", 6, *more.split()]
    train(*flags, "--save", tmp_path / "whole")
    train(*flags, "--save", tmp_path / "parts", "--exit-interval", 6)
    assert losses(tmp_path / "parts").keys() == set(range(1, 7))
    code, out, _ = train(*flags, "--save", tmp_path / "parts")
    assert code == 0 and "continuing from" in out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = weights(final(tmp_path / "whole")), weights(final(tmp_path / "parts"))
    assert whole.keys() == parts.keys() and any(name.startswith("optimizer.exp_avg.") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    again = (tmp_path / "parts" / "metrics.jsonl").read_text()
    assert train(*flags, "--save", tmp_path / "parts")[0] == 0  # finished: nothing left to do, nothing doubled
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == again


@pytest.mark.full
def test_routers_learn_at_a_rate_of_their_own(train, tmp_path):
    after = {}
    for factor in (0, 0.1, 1):
        save = tmp_path / str(factor)
        train("--train-iters", 1, "--lr-decay-style", "constant", "--router-lr-mult", factor, "--save", save)
        after[factor] = weights(final(save))
        assert losses(save)[1][2] == 3e-3, "the rate that is logged is that of all other weights"
    routers = [name for name in after[1] if name.startswith("recurrence.routers.")]
    assert len(routers) == 6
    for name in routers:  # Adam's first step has the length of its rate, whatever the gradient
        full, tenth = (after[factor][name] - after[0][name] for factor in (1, 0.1))
        torch.testing.assert_close(tenth, 0.1 * full, rtol=1e-3, atol=1e-7)
        assert full.abs().max() > 2e-3
    other = "core.layers.0.mlp.linear_fc1.weight"
    torch.testing.assert_close(after[0][other], after[1][other], rtol=0, atol=1e-5)  # but for how a norm is summed


@pytest.mark.full
def test_routers_decay_at_a_rate_of_their_own(train, tmp_path):
    after = {}
    for factor in (0, 1, 2):
        save = tmp_path / str(factor)
        flags = ["--train-iters", 1, "--lr-decay-style", "constant", "--lr-warmup-iters", 0, "--router-scale", 0.5]
        train(*flags, "--weight-decay", 0.1, "--router-wd-mult", factor, "--save", save)
        after[factor] = weights(final(save))
    for name, free in after[0].items():
        once, twice = (free - after[factor][name] for factor in (1, 2))
        decays = name.startswith("recurrence.routers.") and name.endswith("weight")
        torch.testing.assert_close(twice, 2 * once, rtol=1e-2, atol=1e-7)
        assert bool(once.abs().max() > 1e-6) == decays, name


@pytest.mark.full
def test_embedding_and_output_learn_at_a_rate_of_their_own(train, tmp_path):
    after = {}
    for rate in (3e-4, 3e-3):
        save = tmp_path / str(rate)
        flags = ["--train-iters", 1, "--lr-decay-style", "constant", "--lr-warmup-iters", 0, "--weight-decay", 0]
        train(*flags, "--decoupled-lr", rate, "--save", save, "--lr", "1e-2")
        after[rate] = weights(final(save))
        assert losses(save)[1][2] == 1e-2, "the rate that is logged is that of all other weights"
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):  # Adam's first step is as long as its rate
        assert (after[3e-3][name] - after[3e-4][name]).abs().max() == pytest.approx(2.7e-3, rel=0.01)
    other = "core.layers.0.mlp.linear_fc1.weight"
    torch.testing.assert_close(after[3e-3][other], after[3e-4][other], rtol=0, atol=1e-5)


@pytest.mark.full
def test_states_that_are_not_loaded_or_not_saved(train, tmp_path):
    """Without --no-load-optim the run continues exactly; with it, moments begin at zero while progress continues."""
    flags = ["--train-iters", 6, "--save-interval", 3]
    train(*flags, "--save", tmp_path / "once")
    train(*flags, "--save", tmp_path / "bare", "--exit-interval", 3, "--no-save-rng")
    saved = weights(tmp_path / "bare" / "iter_0000003")
    assert any(name.startswith("optimizer.") for name in saved) and not any("rng" in name for name in saved)
    assert any("rng" in name for name in weights(tmp_path / "once" / "iter_0000003"))
    for name, more in {"again": ["--no-load-rng"], "new": ["--no-load-optim"]}.items():
        train(*flags, "--load", tmp_path / "bare", "--save", tmp_path / name, *more)
    once = losses(tmp_path / "once")
    records = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("again", "new")
    }
    steps = {
        name: [(each["iteration"], each["lm loss"], each["learning-rate"]) for each in found if "grad-norm" in each]
        for name, found in records.items()
    }
    expected = [(iteration, once[iteration][0], once[iteration][2]) for iteration in (4, 5, 6)]
    assert steps["again"] == expected
    assert steps["new"][0] == expected[0] and steps["new"][2][1] != expected[2][1]
    assert [rate for _, _, rate in steps["new"]] == [rate for _, _, rate in expected]


@pytest.mark.full
def test_precisions_agree_and_routers_stay_float32(train, tmp_path):
    curves = {}
    for precision in ("fp32", "bf16", "fp16"):
        flags = {"fp32": [], "bf16": ["--bf16"], "fp16": ["--fp16", "--initial-loss-scale", 256]}[precision]
        train("--train-iters", 10, "--save", tmp_path / precision, *flags)
        curves[precision] = [loss for loss, _, _ in losses(tmp_path / precision).values()]
    assert curves["bf16"] == pytest.approx(curves["fp32"], abs=0.05) and curves["bf16"] != curves["fp32"]
    assert curves["fp16"] == pytest.approx(curves["fp32"], abs=0.05)
    saved = weights(final(tmp_path / "bf16"))
    assert saved["recurrence.routers.0.weight"].dtype == torch.float32
    assert saved["core.layers.0.mlp.linear_fc1.weight"].dtype == torch.bfloat16
    assert saved["optimizer.main.core.layers.0.mlp.linear_fc1.weight"].dtype == torch.float32


@pytest.mark.full
def test_asynchronous_checkpoints_hold_the_same(train, tmp_path):
    for name, flags in {"now": [], "later": ["--async-save"]}.items():
        train("--train-iters", 8, "--save-interval", 4, "--save", tmp_path / name, "--keep-last", 1, *flags)
        assert [path.name for path in sorted((tmp_path / name).glob("iter_*"))] == ["iter_0000008"]
    now, later = (weights(final(tmp_path / name)) for name in ("now", "later"))
    assert all(torch.equal(now[name], later[name]) for name in now)


@pytest.mark.full
def test_asynchronous_checkpoints_know_of_no_later_batch(train, tmp_path):
    ramp = ["--global-batch-size", 16, "--rampup-batch-size", 4, 4, 40]
    train("--train-iters", 7, *ramp, "--save-interval", 1, "--eval-iters", 0, "--save", tmp_path, "--async-save")
    records = [json.loads((tmp_path / f"iter_{i:07d}" / "run_config.json").read_text()) for i in range(1, 8)]
    turns = [record["resolved"]["turns"] for record in records]
    assert turns[-1] == [[4, 16, 512], [6, 32, 1024]]
    assert turns == [[turn for turn in turns[-1] if turn[0] < iteration] for iteration in range(1, 8)]


@pytest.mark.full
@pytest.mark.parametrize("more", [[], ["--async-save"]])
def test_retained_checkpoints_are_not_removed(train, tmp_path, more):
    flags = ["--save-interval", 1, "--keep-last", 2, "--save-retain-interval", 3, "--eval-iters", 0]
    train("--train-iters", 8, *flags, "--save", tmp_path, *more)
    assert [path.name for path in sorted(tmp_path.glob("iter_*"))] == [f"iter_{i:07d}" for i in (3, 6, 7, 8)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("style", "shape"), [("cosine", "falls"), ("linear", "falls"), ("constant", "flat"), ("WSD", "plateau")]
)
def test_schedules(train, tmp_path, style, shape):
    flags = ["--lr-decay-style", style, "--lr-warmup-iters", 2, "--lr-wsd-decay-iters", 4]
    train("--train-iters", 10, *flags, "--save", tmp_path)
    rates = [rate for _, _, rate in losses(tmp_path).values()]
    assert rates[:3] == pytest.approx([0, 1.5e-3, 3e-3])
    if shape == "flat":
        assert rates[3:] == pytest.approx([3e-3] * 7)
    else:
        assert 3e-4 < rates[-1] < 1e-3  # after the last step it would be the least
        assert (rates[5] == pytest.approx(3e-3)) == (shape == "plateau")


@pytest.mark.full
def test_a_record_has_the_rate_of_its_step(train, tmp_path):
    """Adam's first update has the length of its rate: none at all in the first step of a warmup."""
    flags = ["--train-iters", 3, "--save-interval", 1, "--lr-warmup-iters", 2]
    for name, rate in {"low": 2e-3, "high": 2e-2}.items():
        train(*flags, "--lr", rate, "--save", tmp_path / name)
        assert [step[2] for step in losses(tmp_path / name).values()] == pytest.approx([0, rate / 2, rate])
    weight = "core.layers.0.mlp.linear_fc1.weight"
    first, second = (
        {name: weights(tmp_path / name / f"iter_{iteration:07d}")[weight] for name in ("low", "high")}
        for iteration in (1, 2)
    )
    assert torch.equal(first["low"], first["high"])
    for name, rate in {"low": 2e-3, "high": 2e-2}.items():
        assert (second[name] - first[name]).abs().max() == pytest.approx(rate / 2, rel=0.05)


@pytest.mark.full
def test_a_record_has_the_loss_scale_of_its_step(train, tmp_path):
    train("--train-iters", 3, "--fp16", "--initial-loss-scale", 2.0**40, "--save", tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scales = [(record["loss-scale"], record["skipped iterations"]) for record in records if "loss-scale" in record]
    assert scales == [(2.0**40, 1), (2.0**40, 2), (2.0**39, 3)]  # the second overflow in a row halves it


@pytest.mark.full
def test_final_decay_takes_its_steps_after_a_ramp_up(train, tmp_path):
    """The final decay is given in steps and counted in sequences: those of the last steps, not of the first."""
    flags = ["--lr-decay-style", "WSD", "--lr-warmup-iters", 1, "--lr-wsd-decay-iters", 4]
    ramp = ["--global-batch-size", 8, "--rampup-batch-size", 4, 4, 12]
    train("--train-iters", 12, *flags, *ramp, "--save", tmp_path)
    rates = [rate for _, _, rate in losses(tmp_path).values()]
    assert rates[1:9] == pytest.approx([3e-3] * 8)
    assert all(later < earlier for earlier, later in zip(rates[8:], rates[9:], strict=False)) and len(rates) == 12


@pytest.mark.full
def test_ramp_up_reads_each_sample_once(train, tmp_path):
    code, out, _ = train(
        "--train-samples", 40, "--global-batch-size", 8, "--rampup-batch-size", 4, 4, 12, "--save", tmp_path
    )  # fmt: skip
    assert code == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tokens = [record["consumed tokens"] // 32 for record in records if "grad-norm" in record]
    assert tokens == [4, 8, 12, 16, 24, 32, 40] or tokens == [4, 8, 12, 20, 28, 36]


@pytest.mark.full
def test_evaluation_alone_repeats_the_last_one(train, tmp_path):
    _, out, _ = train("--train-iters", 6, "--save", tmp_path)
    expected = [line for line in out.splitlines() if "lm loss validation" in line or "lm loss test" in line]
    assert len(expected) == 2
    before = (tmp_path / "metrics.jsonl").read_text()
    _, out, _ = train("--eval-only", "--load", tmp_path, "--save", tmp_path)
    again = [line for line in out.splitlines() if line.startswith("iteration") and "lm loss" in line]
    assert again == expected
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.full
def test_tensorboard_has_megatrons_tags(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    timed = ["--log-timers-to-tensorboard", "--timing-log-level", 1, "--timing-log-option", "max"]
    _, out, _ = train("--train-iters", 4, "--eval-interval", 2, "--save-interval", 2, "--save", tmp_path, *timed)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"lm loss", "grad-norm", "learning-rate", "lm loss validation"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("lm loss")] == [1, 2, 3, 4]
    for tag, steps in {"optimizer-time": [1, 2, 3, 4], "evaluate-time": [2, 4], "save-checkpoint-time": [2, 4]}.items():
        assert [event.step for event in board.Scalars(tag)] == steps
        assert all(0 < event.value < 60 for event in board.Scalars(tag))
    assert not any(tag.startswith("forward-compute") for tag in board.Tags()["scalars"])
    assert out.count("| max time across ranks (ms per step) | ") == 4
    assert "optimizer-time" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.full
def test_every_step_is_noted_and_every_interval_reported(train, tmp_path):
    """Lines hold means; an interrupted run records the same numbers, wherever it stopped between two reports."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--train-iters", 8, "--save-interval", 5, "--log-interval", 4]
    _, out, _ = train(*flags, "--save", tmp_path / "whole")
    train(*flags, "--save", tmp_path / "parts", "--exit-interval", 5)
    train(*flags, "--save", tmp_path / "parts")
    steps = losses(tmp_path / "whole")
    assert len(steps) == 8 and losses(tmp_path / "parts") == steps
    means = [sum(steps[i][0] for i in range(first, first + 4)) / 4 for first in (1, 5)]
    board = EventAccumulator(str(tmp_path / "whole" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("lm loss")] == [
        (4, pytest.approx(means[0])), (8, pytest.approx(means[1]))
    ]  # fmt: skip
    lines = [line for line in out.splitlines() if "| grad norm " in line]
    assert [f"| lm loss {mean:.4f} |" in line for mean, line in zip(means, lines, strict=True)] == [True, True]
    assert all(" s/step | " in line and "GiB" not in line for line in lines)


@pytest.mark.full
def test_speed_is_that_of_steps(train, tmp_path, monkeypatch):
    """Speeds in records and heartbeat exclude an evaluation and a checkpoint of one second each."""
    from mesh_megatron.training.callbacks import heartbeat
    from mesh_megatron.training.checkpointer import Checkpointer
    from mesh_megatron.training.trainer import Trainer

    def slowed(method):
        def slow(*args, **kwargs):
            time.sleep(1)
            return method(*args, **kwargs)

        return slow

    monkeypatch.setattr(Trainer, "evaluate", slowed(Trainer.evaluate))
    monkeypatch.setattr(Checkpointer, "save", slowed(Checkpointer.save))
    monkeypatch.setattr(heartbeat, "_SECONDS_BETWEEN", 0.9)
    ticks = []
    monkeypatch.setattr(heartbeat, "write_status", lambda save, status: ticks.append(status.tokens_per_second))
    train("--train-iters", 6, "--eval-interval", 2, "--save-interval", 3, "--save", tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "iteration-time" in record]
    assert len(steps) == 6 and all(0 < record["iteration-time"] < 0.9 for record in steps[1:])
    for record in steps:
        assert record["tokens per second"] * record["iteration-time"] == pytest.approx(4 * 32)
    assert min(tick for tick in ticks[-3:] if tick is not None) > 4 * 32 / 0.9


@pytest.mark.full
def test_weights_and_biases_send_the_rest_when_no_rank_waits(train, tmp_path, monkeypatch):
    groups_there = []
    run = SimpleNamespace(
        define_metric=lambda *_, **__: None,
        log=lambda _: groups_there.append(torch.distributed.is_initialized()),
        finish=lambda: groups_there.append(torch.distributed.is_initialized()),
    )
    stub = SimpleNamespace(init=lambda **_: run, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    code, _, err = train("--train-iters", 2, "--eval-iters", 0, "--save", tmp_path, "--wandb-project", "loops")
    assert code == 0 and "WARNING" not in err
    assert groups_there == [True, True, False]


@pytest.mark.full
def test_finetune_takes_weights_alone(train, tmp_path):
    train("--train-iters", 6, "--save", tmp_path / "first")
    train("--train-iters", 6, "--load", tmp_path / "first", "--finetune", "--save", tmp_path / "second")
    first, second = losses(tmp_path / "first"), losses(tmp_path / "second")
    assert second.keys() == first.keys() and second[1][0] < first[1][0] - 0.2


@pytest.mark.full
def test_finetuning_that_is_interrupted_goes_on(train, tmp_path):
    train("--train-iters", 6, "--save", tmp_path / "first")
    flags = ("--train-iters", 6, "--load", tmp_path / "first", "--finetune")
    train(*flags, "--save", tmp_path / "whole")
    assert train(*flags, "--save", tmp_path / "parts", "--exit-interval", 4)[0] == 75
    code, out, _ = train(*flags, "--save", tmp_path / "parts")
    assert code == 0 and f"continuing from {tmp_path / 'parts' / 'iter_0000004'} at iteration 4" in out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_dry_run_needs_neither_data_nor_ranks(tmp_path, capsys):
    import pretrain_mesh

    summary = tmp_path / "new" / "summary.json"
    flags = ["--preset", "pythia-1.4b", "--num-memory-slots", "5", "--train-iters", "10", "--global-batch-size", "512"]
    flags += ["--dry-run", "--world-size", "64", "--tensor-model-parallel-size", "2", "--summary-json", str(summary)]
    assert pretrain_mesh.main(flags) == 0
    content = json.loads(summary.read_text())
    assert content["parameters"]["total"] == 1_020_231_710
    assert content["parameters"]["non_embedding"] == 805_797_918
    assert content["tokens_per_step"] == 512 * 4096
    assert "4+8R2+4" in capsys.readouterr().out
    assert pretrain_mesh.main([*flags[:-1], str(tmp_path)]) == 2
    assert f"--summary-json {tmp_path}: is a folder" in capsys.readouterr().err


class TestRefusals:
    """Exit code 2 and one line that names flag, value and fix; nothing is written."""

    def refused(self, train, message, *flags, **kwargs):
        code, _, err = train("--train-iters", 4, *flags, **kwargs)
        assert code == 2, err
        assert err.count("\n") == 1 and message in err, err

    def test_missing_data(self, train, tmp_path):
        self.refused(train, "nor a text file of that name exists", data=str(tmp_path / "nowhere"))

    def test_empty_data(self, train, tmp_path):
        (tmp_path / "x.bin").touch()
        (tmp_path / "x.idx").touch()
        self.refused(train, "is empty", data=str(tmp_path / "x"))

    def test_vocabulary_beyond_the_embedding(self, train):
        self.refused(train, "--padded-vocab-size 64 is smaller", "--padded-vocab-size", 64)

    def test_ids_beyond_the_embedding(self, train):
        self.refused(
            train, "_text_document", "--tokenizer-type", "NullTokenizer", "--vocab-size", 20, "--padded-vocab-size", 32
        )

    def test_checkpoint_of_another_model(self, train, tmp_path):
        train("--train-iters", 1, "--save", tmp_path)
        before = sorted(tmp_path.rglob("*"))
        self.refused(
            train,
            "holds another model: --layout 1+1R2+1 there, 1+2R2+1 here",
            "--layout",
            "1+2R2+1",
            "--save",
            tmp_path,
        )
        assert sorted(tmp_path.rglob("*")) == before

    def test_word_of_it_only_in_the_heartbeat_of_the_run_itself(self, train, tmp_path):
        heartbeat, flags = tmp_path / "heartbeat.json", ["--save", tmp_path, "--global-batch-size", 3]
        train("--train-iters", 1, "--save", tmp_path)
        finished = heartbeat.read_text()
        self.refused(train, "--global-batch-size 3", "--eval-only", *flags)
        with hold_save_lock(tmp_path):
            self.refused(train, "--global-batch-size 3", *flags)
        assert heartbeat.read_text() == finished and '"finished"' in finished
        self.refused(train, "--global-batch-size 3", *flags)
        now = json.loads(heartbeat.read_text())
        assert (now["status"], now["exit_code"], now["iteration"]) == ("finished", None, 1)
        assert "--global-batch-size 3" in now["refusal"]

    def test_save_folder_that_cannot_be(self, train, tmp_path):
        (tmp_path / "file").touch()
        self.refused(train, "cannot be written", "--save", tmp_path / "file" / "run")

    def test_load_of_nothing(self, train, tmp_path):
        self.refused(
            train, "no latest_checkpointed_iteration.txt there", "--load", tmp_path, "--exit-on-missing-checkpoint"
        )
        train("--train-iters", 1, "--save", tmp_path)
        self.refused(train, "iterations there: 1", "--load", tmp_path, "--ckpt-step", 7)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
def test_signal_leads_to_a_checkpoint(corpus, tmp_path, number):
    flags = [*SMALL, "--data-path", corpus, "--train-iters", "100000", "--save", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "pretrain_mesh.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("iteration        3/"):
            process.send_signal(number)
    assert process.wait() == 75
    stopped = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert stopped >= 3 and max(losses(tmp_path)) == stopped


@pytest.mark.full
def test_processes_that_read_ahead_end_with_the_run(corpus, tmp_path):
    flags = [*SMALL, "--train-iters", "3", "--eval-iters", "0", "--num-workers", "2", "--data-path", corpus]
    command = [sys.executable, "pretrain_mesh.py", *flags, "--save", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path)) == 3


@pytest.mark.full
def test_two_ranks_under_torchrun(train, corpus, tmp_path):
    train("--train-iters", 5, "--save", tmp_path / "one")
    flags = [*SMALL, "--data-path", corpus, "--train-iters", 5, "--save", tmp_path / "two"]
    result = torchrun(2, "pretrain_mesh.py", *flags, "--pipeline-model-parallel-size", 2)
    assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    for iteration in one:
        assert two[iteration] == pytest.approx(one[iteration], rel=1e-4)


@pytest.mark.full
def test_not_a_number_is_skipped_and_counted(train, tmp_path, monkeypatch):
    """A batch with NaN changes only the counters."""
    from mesh_megatron.training import step

    calls = iter(range(100))
    original = step._loss

    def poisoned(mask, losses):
        total, tokens, report = original(mask, losses)
        if next(calls) == 4:  # the third step, two micro-batches a step
            total, report = total * math.nan, report * math.nan
        return total, tokens, report

    monkeypatch.setattr(step, "_loss", poisoned)
    train("--train-iters", 5, "--eval-iters", 0, "--save", tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "grad-norm" in record]
    assert math.isnan(records[2]["lm loss"])
    assert [record["nan iterations"] for record in records] == [0, 0, 1, 1, 1]
    assert math.isfinite(records[4]["lm loss"]) and records[4]["lm loss"] < records[0]["lm loss"]
