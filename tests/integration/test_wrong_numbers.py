"""NaN, spikes and overflows in a complete run: exit codes, log, and how to continue."""

import json
import math

import pytest
import torch
from test_pretrain import final, weights

from mesh_megatron.data.datasets import Samples
from mesh_megatron.training import step

pytestmark = pytest.mark.full


def records(save, kind):
    found = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if kind in record]


def test_stops_and_goes_on_past_bad_samples(train, tmp_path, monkeypatch):
    original = Samples.__getitem__

    def poisoned(self, index):
        sample = original(self, index)
        if index in (18, 22, 26):  # one sample of each of iterations 5, 6 and 7
            sample["loss_mask"] = sample["loss_mask"] * math.nan
        return sample

    monkeypatch.setattr(Samples, "__getitem__", poisoned)
    flags = ["--train-iters", 9, "--save-interval", 2, "--max-bad-steps", 3, "--eval-iters", 0, "--save", tmp_path]
    code, out, _ = train(*flags)
    assert code == 3
    assert "iteration        5 | loss is nan, weights unchanged | samples 16 to 19 | suspicious 18 19: " in out
    assert "tokens_text_document documents " in out
    assert "add --iterations-to-skip 5 6 7 to skip those" in out
    assert final(tmp_path).name == "iter_0000004"
    with monkeypatch.context() as restarted:
        restarted.setenv("TORCHELASTIC_RUN_ID", "none")
        code, out, err = train(*flags)
        assert code == 3 and "continuing" not in out and "not started again after" in err
    code, out, _ = train(*flags, "--iterations-to-skip", 5, 6, 7)
    assert code == 0 and "at iteration 4" in out
    assert [record["iteration"] for record in records(tmp_path, "event")] == [5, 6, 7]
    assert [record["iteration"] for record in records(tmp_path, "grad-norm")] == [1, 2, 3, 4, 8, 9]
    assert all(math.isfinite(record["lm loss"]) for record in records(tmp_path, "lm loss"))


def test_spikes(train, tmp_path, monkeypatch):
    original = step._loss

    def spiky(mask, total):
        total, tokens, report = original(mask, total)
        factor = 3.0 if next(calls) in (10, 11) else 1.0  # both micro-batches of the sixth step
        return total * factor, tokens, report * torch.tensor([factor, 1.0])

    def run(name, *flags):
        nonlocal calls
        calls = iter(range(100))
        code, _, _ = train("--train-iters", 8, "--eval-iters", 0, "--save", tmp_path / name, *flags)
        assert code == 0
        return records(tmp_path / name, "event")

    calls = iter(())
    spikes = ["--loss-spike-factor", 1.5, "--loss-spike-window", 3]
    monkeypatch.setattr(step, "_loss", spiky)
    [warned] = run("warned", *spikes)
    [skipped] = run("skipped", *spikes, "--skip-loss-spikes")
    assert warned["iteration"] == skipped["iteration"] == 6 and warned["samples"] == [20, 23]
    assert warned["event"].endswith("is a spike, weights updated")
    assert skipped["event"].endswith("is a spike, weights unchanged")
    counts = [[records(tmp_path / name, "grad-norm")[-1][f"{kind} iterations"] for kind in ("spike", "skipped", "nan")]
              for name in ("warned", "skipped")]  # fmt: skip
    assert counts == [[1, 0, 0], [1, 1, 0]]
    monkeypatch.setattr(step, "_loss", original)
    run("passed over", "--iterations-to-skip", 6)
    passed, left, kept = (weights(final(tmp_path / name)) for name in ("passed over", "skipped", "warned"))
    assert all(torch.equal(passed[name], left[name]) for name in passed)
    name = "core.layers.0.mlp.linear_fc1.weight"
    assert not torch.equal(passed[name], kept[name])


@pytest.mark.parametrize("least", [False, True])
def test_overflow_of_the_loss_scale(train, tmp_path, least):
    """2^24 overflows float16 at every step: the loss scale is lowered until it is at its minimum."""
    scale = ["--initial-loss-scale", 2**24, *(["--min-loss-scale", 2**24] if least else [])]
    code, _, _ = train(
        "--fp16", *scale, "--train-iters", 5, "--max-bad-steps", 3, "--eval-iters", 0, "--save", tmp_path
    )  # fmt: skip
    last = records(tmp_path, "grad-norm")[-1]
    assert code == (3 if least else 0)
    assert last["iteration"] == last["skipped iterations"] == (3 if least else 5)
    assert last["nan iterations"] == (3 if least else 0)
    assert len(list(tmp_path.glob("iter_*"))) == (0 if least else 1)
