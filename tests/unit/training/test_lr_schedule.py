"""Length, data order and learning rates of continued runs, also with other batch sizes and sequence lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from mesh_megatron.config import cli
from mesh_megatron.config.model import ModelConfig
from mesh_megatron.config.run import RunConfig
from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.training.lr_schedule import build_schedule
from mesh_megatron.training.run_length import RunLength, compute_run_length, data_position
from mesh_megatron.training.state import TrainState


class Travel:
    """A run that computes nothing: it counts steps and writes the progress that a checkpoint records."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder, self.settings = folder, settings
        self.names = count()
        self.source: Path | None = None
        self.rates: list[float] = []
        self.decays: list[float] = []
        """Weight decay of each step."""
        self.places: list[tuple[int, int]] = []
        """Sequences and tokens read before each step."""
        self.read: list[int] = []
        """Indices of the samples of all steps."""

    def go(self, batch: int, until: int | None = None, seq_length: int = 16, noted: bool = True) -> RunLength:
        """Start or continue the run and stop at step ``until`` or its end; an older version recorded less."""
        training = TrainingConfig(global_batch_size=batch, lr=1.0, min_lr=0.0, **self.settings)
        run = RunConfig(model=ModelConfig(seq_length=seq_length), training=training)
        length = compute_run_length(run, 1, self.source)
        state = TrainState()
        if self.source is not None:
            known = json.loads((self.source / "run_config.json").read_text())["resolved"]
            state = TrainState(**{name: value for name, value in known.items() if hasattr(state, name)})
        optimizer = SimpleNamespace(param_groups=[{}])
        schedule = build_schedule(run, optimizer, length)
        while state.iteration < (length.total_iters if until is None else until):
            schedule.set_rates(state)
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.decays.append(optimizer.param_groups[0]["weight_decay"])
            self.places.append((state.consumed_samples, state.consumed_tokens))
            size = training.ramped_batch_size(state.consumed_samples, batch, seq_length)
            first = data_position(training, seq_length, state.consumed_samples, state.consumed_tokens)
            self.read += range(first, first + size)
            state.count_step(size, seq_length)
        self.tokens = state.consumed_tokens
        self.source = self.folder / str(next(self.names))
        self.source.mkdir(parents=True)
        names = ("iteration", "consumed_samples", "consumed_tokens", *(("turns",) if noted else ()))
        resolved = {name: getattr(state, name) for name in names} | {"global_batch_size": batch}
        resolved |= {"order_samples": length.order_samples} if noted else {}
        (self.source / "run_config.json").write_text(json.dumps(cli.to_dict(run) | {"resolved": resolved}, default=str))
        return length

    def by_sequences(self) -> dict[int, float]:
        return dict(zip((sequences for sequences, _ in self.places), self.rates, strict=True))

    def by_tokens(self) -> dict[int, float]:
        return dict(zip((tokens for _, tokens in self.places), self.rates, strict=True))


LENGTHS = [{"train_samples": 401}, {"train_tokens": 6405}, {"train_iters": 60}]
WARMUPS = [{}, {"lr_warmup_iters": 7}, {"lr_warmup_samples": 30}, {"lr_warmup_fraction": 0.15}]
DECAYS = [
    {"lr_decay_style": "cosine"},
    {"lr_decay_style": "linear", "lr_decay_iters": 40},
    {"lr_decay_style": "linear", "lr_decay_samples": 300},
    {"lr_decay_style": "WSD"},
    {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9},
    {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 90},
]
RAMPS = [{}, {"rampup_batch_size": (4, 4, 40)}]


@pytest.mark.parametrize("ramp", RAMPS, ids=str)
@pytest.mark.parametrize("decay", DECAYS, ids=str)
@pytest.mark.parametrize("warmup", WARMUPS, ids=str)
@pytest.mark.parametrize("asked", LENGTHS, ids=str)
def test_a_restart_changes_no_rate(tmp_path, asked, warmup, decay, ramp):
    """Neither in a run as it was begun, nor after its batch size and sequence length have been changed."""
    settings = {**asked, **warmup, **decay, **ramp}
    once, often = Travel(tmp_path / "once", **settings), Travel(tmp_path / "often", **settings)
    once.go(8, 20)
    total = once.go(16, seq_length=32).total_iters
    for stop in range(2, 21, 3):
        often.go(8, stop)
    for stop in range(20, total, 3):
        often.go(16, stop, seq_length=32)
    often.go(16, seq_length=32)
    assert often.rates == pytest.approx(once.rates, rel=1e-12) and often.places == once.places
    assert often.read == once.read
    assert min(once.rates) >= 0 and max(once.rates) <= 1


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
@pytest.mark.parametrize("warmup", [{}, {"lr_warmup_samples": 30}, {"lr_warmup_iters": 4}, {"lr_warmup_fraction": 0.1}])
def test_a_rate_belongs_to_the_sequences_read_whatever_the_batch(tmp_path, style, warmup):
    settings = {"train_samples": 401, "lr_decay_style": style, **warmup}
    same, other = Travel(tmp_path / "same", **settings), Travel(tmp_path / "other", **settings)
    same.go(8)
    other.go(8, 20)
    other.go(16, 24)
    other.go(24)
    whole = same.by_sequences()
    assert other.rates == pytest.approx([whole[place] for place in other.by_sequences()])


@pytest.mark.parametrize(("first", "then"), [(16, 32), (32, 16)])
@pytest.mark.parametrize("style", ["cosine", "WSD"])
def test_a_length_in_tokens_is_kept_whatever_the_length_of_sequences(tmp_path, style, first, then):
    settings = {"train_tokens": 4096, "lr_decay_style": style, "lr_warmup_samples": 12}
    same, other = Travel(tmp_path / "same", **settings), Travel(tmp_path / "other", **settings)
    same.go(4, seq_length=16)
    other.go(4, 1024 // (4 * first), seq_length=first)
    order = other.go(4, seq_length=then).order_samples
    assert other.tokens == same.tokens == 4096
    assert order == 4096 // then and other.read[-1] == order - 1  # as much of the data as there is left to read
    rates = {tokens: rate for tokens, rate in other.by_tokens().items() if tokens >= 1024}
    whole = same.by_tokens()
    common = rates.keys() & whole.keys()
    assert len(common) > 20
    warmed = 12 * first  # the decay begins where the warmup, told in sequences, has ended
    if style == "WSD" or warmed == 12 * 16:
        assert [rates[tokens] for tokens in common] == pytest.approx([whole[tokens] for tokens in common])


def test_a_length_in_steps_is_kept_with_its_rates_whatever_the_batch(tmp_path):
    settings = {"train_iters": 40, "lr_warmup_iters": 5, "rampup_batch_size": (4, 4, 40)}
    same, other = Travel(tmp_path / "same", **settings), Travel(tmp_path / "other", **settings)
    same.go(8)
    other.go(8, 3)
    other.go(16, 20)
    other.go(4 * 8)
    assert other.rates == pytest.approx(same.rates) and len(same.rates) == 40


def test_the_final_decay_is_a_tenth_of_what_was_asked_for(tmp_path):
    run = Travel(tmp_path, train_samples=800, lr_decay_style="WSD", lr_warmup_samples=8)
    run.go(8, 87)
    run.go(16)
    rates = run.by_sequences()
    assert [place for place, rate in rates.items() if place >= 8 and rate == 1.0] == [
        *range(8, 696, 8), 696, 712
    ]  # fmt: skip
    assert rates[728] == pytest.approx(1 - (8 / 80) ** 0.5)


@pytest.mark.parametrize("asked", [{"train_samples": 800}, {"train_tokens": 800 * 16}], ids=str)
def test_a_final_decay_in_steps_never_falls_at_once(tmp_path, asked):
    """With twice the batch size the decay should have begun earlier: it begins when the change is known."""
    run = Travel(tmp_path, **asked, lr_decay_style="WSD", lr_wsd_decay_iters=10, lr_wsd_decay_style="linear")
    run.go(8, 87)
    run.go(16)
    rates = run.by_sequences()
    assert rates[696] == 1.0 and rates[712] == pytest.approx(1 - 16 / 104) and rates[776] == pytest.approx(24 / 104)


def test_a_final_decay_that_has_begun_goes_on(tmp_path):
    run = Travel(tmp_path, train_samples=800, lr_decay_style="WSD", lr_wsd_decay_iters=10, lr_wsd_decay_style="linear")
    run.go(8, 95)
    run.go(16)
    assert run.rates[90:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3])


def test_a_warmup_in_steps_goes_on_where_it_was(tmp_path):
    run = Travel(tmp_path, train_samples=400, lr_warmup_iters=6)
    run.go(4, 3)
    run.go(16)
    assert run.rates[:7] == pytest.approx([step / 6 for step in range(7)])


def test_what_was_asked_for_says_where_the_decay_ends(tmp_path):
    """A last step that would exceed the length is not taken; the learning rates are not affected."""
    rates = {}
    for batch in (8, 4):
        run = Travel(tmp_path / str(batch), train_samples=103, lr_decay_style="linear", lr_warmup_fraction=0)
        run.go(batch)
        rates[batch] = run.by_sequences()
    assert rates[8] == pytest.approx({place: 1 - place / 103 for place in range(0, 96, 8)})
    assert rates[4] == pytest.approx({place: 1 - place / 103 for place in range(0, 100, 4)})


@pytest.mark.parametrize(
    ("asked", "order"), [({"train_samples": 505}, 505), ({"train_tokens": 8090}, 505), ({"train_iters": 40}, 320)]
)
def test_the_order_of_data_is_that_of_the_first_start(tmp_path, asked, order):
    run = Travel(tmp_path, **asked)
    assert run.go(8, 10).order_samples == order
    assert run.go(12, 20).order_samples == order
    run.settings["train_iters"], run.settings["train_samples"], run.settings["train_tokens"] = None, 700, None
    assert run.go(12).order_samples == order  # even if more is asked for now
    assert run.read == list(range(len(run.read))) and len(run.read) >= 690


@pytest.mark.parametrize("ramp", RAMPS, ids=str)
@pytest.mark.parametrize("asked", [{"train_samples": 400}, {"train_tokens": 6400}, {"train_iters": 50}], ids=str)
def test_checkpoints_of_an_older_version_go_on(tmp_path, asked, ramp):
    settings = {**asked, **ramp, "lr_warmup_iters": 6, "lr_decay_style": "cosine"}
    same, older = Travel(tmp_path / "same", **settings), Travel(tmp_path / "older", **settings)
    same.go(8)
    before = older.go(8, 20, noted=False)
    assert older.go(8).order_samples == (before.order_samples // 8 * 8 if not ramp else before.samples)
    assert older.rates == pytest.approx(same.rates, rel=1e-12)


def test_a_warmup_that_leaves_no_decay_is_refused(tmp_path):
    with pytest.raises(ValueError, match="warms up over 80 sequences but decays over 80: lower --lr-warmup-iters"):
        Travel(tmp_path, train_samples=80, lr_warmup_iters=10).go(8)


LONG_DECAYS = [
    (
        {"train_iters": 20, "lr_wsd_decay_iters": 17},
        "takes 17 steps, but the warmup over 4 leaves 16 of 20: lower --lr-wsd",
    ),
    ({"train_iters": 20, "lr_wsd_decay_iters": 50}, "takes 50 steps"),
    ({"train_samples": 160, "lr_wsd_decay_iters": 18}, "takes 144 sequences, but the warmup over 32 leaves 128 of 160"),
    ({"train_samples": 160, "lr_wsd_decay_samples": 500}, "takes 160 sequences"),
    ({"train_iters": 60, "lr_decay_iters": 9}, "takes 6 steps, but the warmup over 4 leaves 5 of 9"),
]


@pytest.mark.parametrize(("settings", "message"), LONG_DECAYS, ids=str)
def test_a_final_decay_that_would_begin_in_the_warmup_is_refused(tmp_path, settings, message):
    """Where the warmup ends, the rate would fall at once."""
    with pytest.raises(ValueError, match=message):
        Travel(tmp_path, lr_decay_style="WSD", lr_warmup_iters=4, **settings).go(8)


@pytest.mark.parametrize("settings", [{"train_iters": 20}, {"train_samples": 160}, {"train_tokens": 2560}], ids=str)
def test_a_final_decay_may_begin_where_the_warmup_ends(tmp_path, settings):
    flags = {"lr_decay_style": "WSD", "lr_wsd_decay_style": "linear", "lr_warmup_iters": 4, "lr_wsd_decay_iters": 16}
    run = Travel(tmp_path, **settings, **flags)
    run.go(8)
    assert run.rates == pytest.approx([min(step / 4, (20 - step) / 16) for step in range(20)])


def test_finetuning_starts_from_zero(tmp_path):
    run = Travel(tmp_path, train_samples=80)
    run.go(8, 5)
    config = RunConfig(training=TrainingConfig(train_samples=80, global_batch_size=8))
    config = replace(config, checkpoint=replace(config.checkpoint, finetune=True))
    length = compute_run_length(config, 1, run.source)
    assert (length.iteration, length.total_iters, length.samples) == (0, 10, 80)


def test_the_warmup_begins_where_it_is_told(tmp_path):
    run = Travel(tmp_path, train_iters=20, lr_warmup_iters=4, lr_warmup_init=0.2, lr_decay_style="constant")
    run.go(4)
    assert run.rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


@pytest.mark.parametrize("length", [{"train_iters": 50}, {"train_samples": 200}, {"train_tokens": 3200}], ids=str)
def test_a_decay_in_sequences_ends_there(tmp_path, length):
    run = Travel(tmp_path, **length, lr_decay_samples=80, lr_warmup_iters=0, lr_decay_style="linear")
    run.go(4)
    assert run.rates[:22] == pytest.approx([max(1 - step / 20, 0) for step in range(22)])


@pytest.mark.parametrize("length", [{"train_iters": 50}, {"train_samples": 200}, {"train_tokens": 3200}], ids=str)
def test_a_final_decay_in_sequences(tmp_path, length):
    flags = {"lr_decay_style": "WSD", "lr_wsd_decay_style": "linear", "lr_warmup_iters": 0}
    run = Travel(tmp_path, **length, **flags, lr_wsd_decay_samples=40)
    run.go(4)
    assert run.rates == pytest.approx([min(1, (50 - step) / 10) for step in range(50)])


@pytest.mark.parametrize("decay", [{}, {"lr_decay_iters": 10}, {"lr_decay_samples": 30}], ids=str)
@pytest.mark.parametrize("length", [{"train_iters": 20}, {"train_samples": 80}, {"train_tokens": 1280}], ids=str)
def test_weight_decay_grows_over_the_length_of_training(tmp_path, length, decay):
    grows = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.1, "end_weight_decay": 0.3}
    run = Travel(tmp_path, **length, **grows, **decay, lr_warmup_iters=0, lr_decay_style="linear")
    run.go(4, 7)
    run.go(4)
    assert run.decays == pytest.approx([0.1 + 0.2 * step / 20 for step in range(20)])
