"""What stands out among ranks and steps."""

from collections import deque

from mesh_megatron.training.outliers import Load, outlying, slow_step

GIB = 2**30


def load(seconds=1.0, memory=10 * GIB, stage=0):
    return Load(stage, "node7", seconds, memory)


def test_a_slow_and_a_full_rank_are_named():
    (slow,) = outlying([load(), load(seconds=2.5), load(), load()], factor=2)
    assert slow.startswith("rank 1 on node7 takes 2.50 s of a step") and slow.endswith("others 1.00 s")
    (full,) = outlying([load(), load(), load(memory=30 * GIB)], factor=2)
    assert full == "rank 2 on node7 has used 30.0 GiB of memory, others 10.0 GiB"


def test_stages_are_not_compared_with_each_other():
    assert outlying([load(), load(), load(3.0, stage=1), load(3.0, stage=1)], factor=2) == []
    assert outlying([load(), load(9.0, stage=1)], factor=2) == []
    assert len(outlying([load(3.0, stage=1), load(9.0, stage=1)], factor=2)) == 1


def test_small_differences_are_nobodys_trouble():
    assert outlying([load(0.001, GIB // 8), load(0.004, GIB // 4)], factor=2) == []


def test_a_slow_step():
    before = deque(maxlen=100)
    assert all(slow_step(step, 1.0, before, 2) is None for step in range(20))
    assert slow_step(21, 4.0, before, 2) == "step 21 took 4.00 s, 4.0 times the median of the 21 last"
    assert slow_step(22, 1.5, before, 2) is None
    assert slow_step(2, 50.0, deque([1.0], maxlen=100), 2) is None  # the first steps compile
