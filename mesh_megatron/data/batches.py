"""Provide one rank's micro-batches as a function of the number of consumed samples alone.

The samples of a step, numbers [consumed, consumed + global batch), are divided into rows: micro-batch m of
data-parallel rank r holds the ``micro_batch_size`` samples that start at
``consumed + (m * data_parallel_size + r) * micro_batch_size``. So the samples of a step do not depend on the number of
ranks, a run resumed at any count gets the batches it would have had, and the global batch may change between steps.
This module looks up no rank or process group.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class BatchShard:
    """The part of every row of samples that one data-parallel rank reads (see the module)."""

    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise ValueError(f"data_parallel_rank {self.data_parallel_rank} is not below {self.data_parallel_size}")

    @property
    def row(self) -> int:
        """Number of samples in a row: one micro-batch of every data-parallel rank."""
        return self.micro_batch_size * self.data_parallel_size


@dataclass(frozen=True)
class MicroBatchSampler:
    """Yields the sample numbers of each micro-batch of a rank, starting at ``consumed_samples`` (see the module)."""

    total: int
    consumed_samples: int
    shard: BatchShard
    wrap: bool

    def __iter__(self) -> Iterator[list[int]]:
        size, start = self.shard.micro_batch_size, self.consumed_samples
        while self.wrap or start + self.shard.row <= self.total:
            first = start + self.shard.data_parallel_rank * size
            yield [index % self.total for index in range(first, first + size)]
            start += self.shard.row


def with_token_numbers(
    batches: Iterator[Batch] | None, shard: BatchShard, seq_length: int, first_sample: int, micro_batches: int
) -> Iterator[Batch]:
    """Yield a step's ``batches`` with ``token_numbers`` [B, S]: sample times ``seq_length`` plus position, int64.

    A rank that reads no data gets nothing else.
    """
    size = shard.micro_batch_size
    for number in range(micro_batches):
        first = (first_sample + number * shard.row + shard.data_parallel_rank * size) * seq_length
        numbers = torch.arange(first, first + size * seq_length).view(size, seq_length)
        yield {**(next(batches) if batches is not None else {}), "token_numbers": numbers}


class MicroBatches:
    """Batches of ``dataset`` (``datasets.Samples``) for one data-parallel rank, read ahead by ``num_workers``
    processes. Each is a dictionary of the sample's tensors with a first dimension B = ``shard.micro_batch_size``.

    At its end a dataset starts again if ``wrap`` (evaluation); otherwise ``ValueError`` (training, whose dataset is
    built long enough). Neither reading ahead nor worker processes change order, results or torch's random state.
    """

    def __init__(
        self,
        dataset: Dataset,
        shard: BatchShard,
        *,
        num_workers: int = 0,
        wrap: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.total, self.wrap = dataset, len(dataset), wrap  # type: ignore[arg-type]
        if self.total == 0:
            raise ValueError("the dataset holds no samples")
        self.shard, self.num_workers, self.pin_memory = shard, num_workers, pin_memory
        self._stream: Iterator[Batch] = iter(())
        self._position: int | None = None
        self._seconds = 0.0

    def micro_batches(self, consumed_samples: int, num_microbatches: int) -> Iterator[Batch]:
        """Yield the ``num_microbatches`` batches of a step that starts after ``consumed_samples``.

        Consecutive steps use what is already read ahead; any other position restarts reading there.
        """
        if consumed_samples != self._position:
            self._stream = self._read_from(consumed_samples)
            self._position = consumed_samples
        for _ in range(num_microbatches):
            start = time.perf_counter()
            try:
                batch = next(self._stream)
            except StopIteration:
                raise ValueError(
                    f"the dataset ends: {self._position} of its {self.total} samples are consumed and the next "
                    f"{self.shard.row} do not exist"
                ) from None
            self._seconds += time.perf_counter() - start
            self._position += self.shard.row
            yield batch

    def take_seconds(self) -> float:
        """Return the seconds spent waiting for batches since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """End the worker processes; the next call starts new ones."""
        self._stream, self._position = iter(()), None

    def _read_from(self, consumed_samples: int) -> Iterator[Batch]:
        sampler = MicroBatchSampler(self.total, consumed_samples, self.shard, self.wrap)
        loader: DataLoader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_leave_signals_to_the_rank,
            generator=torch.Generator(),  # a separate one: starting a loader must not draw from training's random state
        )
        return iter(loader)


def _leave_signals_to_the_rank(worker: int) -> None:
    """Ignore signals in a worker: a launcher signals all processes of a rank, which needs batches until it stops."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
