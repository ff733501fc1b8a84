"""A run that continues with other settings has the length that was asked for and reports what has changed."""

import json

import pytest
from integration_runs import losses, small_corpus

from mesh_megatron.config.data import DataConfig
from mesh_megatron.data.datasets import SampleCounts, Samples, build_datasets

pytestmark = pytest.mark.full


def samples(save) -> int:
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line).get("consumed tokens", 0) for line in lines) // 32


@pytest.mark.parametrize(("first", "then", "steps"), [(4, 8, 10 + 5), (8, 4, 5 + 10)])
def test_a_length_in_sequences_is_kept_when_the_batch_changes(train, tmp_path, first, then, steps):
    flags = ["--train-samples", 80, "--save", tmp_path]
    assert train(*flags, "--global-batch-size", first, "--exit-interval", 40 // first)[0] != 0
    code, out, _ = train(*flags, "--global-batch-size", then)
    assert code == 0
    assert f"iteration {40 // first} of {steps}" in out
    assert f"changed since then: --global-batch-size {first} -> {then}\n" in out
    assert len(losses(tmp_path)) == steps
    assert samples(tmp_path) == 80


@pytest.mark.parametrize(("first", "then"), [(32, 64), (64, 32)])
def test_a_length_in_tokens_is_kept_when_sequences_change(train, tmp_path, first, then):
    flags = ["--train-tokens", 4096, "--save", tmp_path]
    train(*flags, "--seq-length", first, "--exit-interval", 2048 // (4 * first))
    code, out, _ = train(*flags, "--seq-length", then)
    assert code == 0 and f"changed since then: --seq-length {first} -> {then}\n" in out
    assert samples(tmp_path) * 32 == 4096
    assert len(losses(tmp_path)) == 2048 // (4 * first) + 2048 // (4 * then)


def texts_of(corpus: str, order: int) -> list[int]:
    """Hashes of the training samples of the next test, in the order of so many."""
    data, counts = DataConfig(data_path=(corpus,), split="60,20,20"), SampleCounts(train=order, valid=0, test=0)
    train = build_datasets(data, counts, seq_length=256, seed=1234, tokenizer=None, vocab_size=384).train
    return [hash(tuple(train[number]["tokens"].tolist())) for number in range(len(train))]


@pytest.mark.parametrize("asked", ["--train-samples", "--train-tokens", "--train-iters"])
def test_the_order_of_data_stays_when_the_batch_changes(train, tmp_path, monkeypatch, asked):
    """An epoch more or less comes of today's batch than was asked for: no text is read twice before each was once."""
    corpus = small_corpus(tmp_path, copies=1)
    epoch = len(texts_of(corpus, 1))
    amount = epoch // 5 * 5 if asked == "--train-iters" else epoch // 5 * 5 + 5
    larger = next(batch for batch in range(6, 50) if (amount - 50) % batch >= 5)  # a step that leaves the rest out
    expected = texts_of(corpus, amount)[:epoch]
    read: list[int] = []
    original = Samples.__getitem__

    def noting(self, index):
        sample = original(self, index)
        if self.name == "train":
            read.append(hash(tuple(sample["tokens"].tolist())))
        return sample

    monkeypatch.setattr(Samples, "__getitem__", noting)
    length = {"--train-samples": amount, "--train-tokens": amount * 256, "--train-iters": amount // 5}[asked]
    flags = [asked, length, "--seq-length", 256, "--micro-batch-size", 1, "--eval-iters", 0, "--save", tmp_path / "run"]
    train(*flags, "--global-batch-size", 5, "--exit-interval", 10, data=corpus)
    train(*flags, "--global-batch-size", larger, data=corpus)
    assert len(read) > epoch - larger and read[:epoch] == expected[: len(read)]


@pytest.mark.parametrize(("first", "then"), [(4, 8), (8, 4)])
def test_a_length_in_steps_keeps_its_learning_rates_when_the_batch_changes(train, tmp_path, first, then):
    flags = ["--train-iters", 12]
    train(*flags, "--global-batch-size", first, "--save", tmp_path / "whole")
    train(*flags, "--global-batch-size", first, "--save", tmp_path / "changed", "--exit-interval", 6)
    code, _, _ = train(*flags, "--global-batch-size", then, "--save", tmp_path / "changed")
    assert code == 0
    rates = [[rate for _, _, rate in losses(tmp_path / name).values()] for name in ("whole", "changed")]
    assert rates[1] == pytest.approx(rates[0])
    assert samples(tmp_path / "changed") == 6 * first + 6 * then


def rates_by_consumed(save) -> dict[int, float]:
    """Return the learning rates by the number of sequences read before the step."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if "learning-rate" in line]
    consumed = [0, *(record["consumed tokens"] // 32 for record in records)]
    return dict(zip(consumed, (record["learning-rate"] for record in records), strict=False))


def test_warmup_in_steps_that_is_over_does_not_begin_again_with_a_larger_batch(train, tmp_path):
    """The length is in sequences, so the rate after a number of sequences does not depend on the batch size."""
    flags = ["--train-samples", 88, "--lr-warmup-iters", 8]
    train(*flags, "--save", tmp_path / "whole")
    train(*flags, "--save", tmp_path / "changed", "--exit-interval", 10)
    train(*flags, "--save", tmp_path / "changed", "--global-batch-size", 16)
    whole, changed = rates_by_consumed(tmp_path / "whole"), rates_by_consumed(tmp_path / "changed")
    assert changed.keys() == {*range(0, 44, 4), 56, 72}
    assert changed == pytest.approx({consumed: whole[consumed] for consumed in changed})


def test_warmup_in_steps_takes_so_many_whatever_their_batch(train, tmp_path):
    flags = ["--train-samples", 160, "--lr-warmup-iters", 6, "--save", tmp_path]
    train(*flags, "--exit-interval", 3)
    train(*flags, "--global-batch-size", 8)
    rates = [rate for _, _, rate in losses(tmp_path).values()]
    assert rates[:7] == pytest.approx([3e-3 * step / 6 for step in range(7)]) and max(rates) == rates[6]


def test_decay_in_steps_keeps_its_learning_rates_when_the_batch_changes(train, tmp_path):
    flags = ["--train-samples", 80, "--lr-decay-iters", 10, "--lr-warmup-iters", 2]
    train(*flags, "--save", tmp_path / "whole")
    train(*flags, "--save", tmp_path / "changed", "--exit-interval", 4)
    train(*flags, "--save", tmp_path / "changed", "--global-batch-size", 8)
    whole, changed = ([rate for _, _, rate in losses(tmp_path / name).values()] for name in ("whole", "changed"))
    assert len(changed) == 4 + 8 and changed == pytest.approx(whole[:12])


def test_what_changed_is_said(train, tmp_path):
    flags = ["--train-iters", 4, "--save", tmp_path]
    train(*flags, "--exit-interval", 2)
    _, out, _ = train(*flags, "--lr", 1e-3, "--seed", 5, "--exit-interval", 3)
    assert "changed since then: --lr 0.003 -> 0.001\n" in out
    assert "changed since then: --seed 1234 -> 5\n" in out
    _, out, _ = train(*flags, "--lr", 1e-3, "--seed", 5)
    assert "changed since then" not in out


def test_other_data_under_the_same_name_is_said_and_read(train, tmp_path):
    data = small_corpus(tmp_path, copies=1)
    flags = ["--train-iters", 4, "--save", tmp_path / "run", "--exit-interval", 2]
    train(*flags, data=data)
    index = set((tmp_path / "cache").iterdir())
    small_corpus(tmp_path, copies=2)
    _, out, _ = train(*flags, data=data)
    assert out.count("changed since then: ") == 2 and f"changed since then: {data}.bin" in out
    assert set((tmp_path / "cache").iterdir()) > index
