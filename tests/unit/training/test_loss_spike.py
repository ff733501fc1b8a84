"""The definition of a spike, and the micro-batch that is reported."""

import math

import pytest

from mesh_megatron.config.training import TrainingConfig
from mesh_megatron.training.callbacks.bad_steps import worst
from mesh_megatron.training.loss_spike import is_spike
from mesh_megatron.training.state import TrainState

SETTINGS = TrainingConfig(train_iters=1, loss_spike_factor=2.0, loss_spike_window=3)


@pytest.mark.parametrize(
    ("loss", "recent", "expected"),
    [
        (6.1, [3.0, 3.0, 100.0], True),  # above twice the median, whatever the mean is
        (6.0, [3.0, 3.0, 3.0], False),
        (100.0, [3.0, 3.0], False),  # not yet a window
        (6.1, [100.0, 100.0, 100.0, 3.0, 3.0, 3.0], True),  # remembered in a longer window
        (math.nan, [3.0, 3.0, 3.0], False),  # not finite is another matter
        (math.inf, [3.0, 3.0, 3.0], False),
    ],
)
def test_a_spike_is_above_a_multiple_of_the_median(loss, recent, expected):
    assert is_spike(loss, recent, SETTINGS) is expected
    assert not is_spike(loss, recent, TrainingConfig(train_iters=1))


def test_losses_are_compared_by_their_number_of_loops():
    """With one loop the loss is 6, with four 2; 100 is a spike with either."""
    state = TrainState()
    for _ in range(5):
        for loops, loss in ((4, 2.0), (1, 6.0)):
            assert not is_spike(loss, state.recent(loops), SETTINGS)
            state.remember(loss, loops, SETTINGS.loss_spike_window)
    assert state.recent_by_loops == {4: [2.0] * 3, 1: [6.0] * 3} and state.recent_losses == []
    assert is_spike(5.0, state.recent(4), SETTINGS) and not is_spike(5.0, state.recent(1), SETTINGS)
    state.remember(7.0, None, SETTINGS.loss_spike_window)
    assert state.recent(None) == state.recent_losses == [7.0]


def test_the_worst_micro_batches():
    losses = {0: (30.0, 10.0), 2: (20.0, 4.0), 4: (31.0, 10.0)}
    assert worst(losses, finite=True) == [2]
    assert worst(losses | {6: (math.nan, 4.0), 8: (math.inf, 4.0)}, finite=False) == [6, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations_to_skip": (3, 0)}, "--iterations-to-skip 0: must be at least 1"),
        ({"max_bad_steps": -1}, "--max-bad-steps -1"),
        ({"loss_spike_factor": 0.9}, "--loss-spike-factor 0.9: must be above 1"),
        ({"loss_spike_factor": 2.0, "loss_spike_window": 0}, "--loss-spike-window 0"),
        ({"skip_loss_spikes": True}, "--skip-loss-spikes needs --loss-spike-factor"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(train_iters=1, **settings).validate()
