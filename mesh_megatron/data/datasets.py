"""Build datasets of samples from the data settings, through ``megatron.core``'s GPTDataset and blended builder.

A sample is ``seq_length`` + 1 tokens of the concatenated, shuffled documents. Which tokens sample i holds depends on
the data, the seed, ``seq_length`` and the number of samples that the order was made for, never on ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from mesh_megatron.config.data import DataConfig, is_text, parse_split, read_blend
from mesh_megatron.data.builder import CachedGPTDataset, EndlessMockDataset, LocalBuilder
from mesh_megatron.data.check import EXACT_TOKENS, check_ids, ids_beyond
from mesh_megatron.data.indexed import read_indexed
from mesh_megatron.data.preprocessing.text_path import cached_prefix
from mesh_megatron.data.ranks import rank_zero_first
from mesh_megatron.data.tokenizers import build_tokenizer
from mesh_megatron.data.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)
Blend = Sequence[tuple[float | None, str]]


class Samples(torch.utils.data.Dataset):
    """Samples of one split: ``tokens``, ``labels``, ``position_ids`` int64 [S], ``loss_mask`` float32 [S],
    ``sample_ids`` int64, and with ``--reset-attention-mask`` ``attention_mask`` bool [1, S, S] (True: hidden).

    Every sample is checked as it is read: ``ValueError`` names the file of an id without a row in the embedding.
    """

    def __init__(self, name: str, inner: Any, vocab_size: int) -> None:
        self.name, self.inner, self.vocab_size = name, inner, vocab_size

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.inner[index]
        source = sample.pop("dataset_id", None)
        ids, last = sample["tokens"], int(sample["labels"][-1])
        for found in (max(int(ids.max()), last), min(int(ids.min()), last)):
            if not 0 <= found < self.vocab_size:
                part = self.inner if source is None else self.inner.datasets[int(source)]
                raise ValueError(ids_beyond(part.dataset_path, found, self.vocab_size))
        return {**sample, "sample_ids": torch.tensor(index)}

    def origin(self, index: int) -> str:
        """Return a readable text with the file of sample ``index`` and its documents in that file."""
        part = self.inner
        if isinstance(part, BlendedDataset):
            source = int(part[index]["dataset_id"])
            part, index = part.datasets[source], int(part.dataset_sample_index[index])
        documents = part._query_document_sample_shuffle_indices(index)[1]  # newer versions return more
        name = part.dataset_path or "mock data"
        return f"{name} documents {' '.join(str(int(document)) for document in documents)}"


@dataclass(frozen=True)
class Datasets:
    """The datasets of a run. A split without samples or without documents is absent."""

    train: Samples | None = None
    valid: dict[str, Samples] = field(default_factory=dict)
    """By name; a single set is named ``validation``."""
    test: Samples | None = None


@dataclass(frozen=True, kw_only=True)
class SampleCounts:
    """Least number of samples of each split; every validation set has ``valid``."""

    train: int
    valid: int
    test: int
    train_order: int | None = None
    """Training samples come in the order of a run of so many samples (None: of ``train``)."""


def build_datasets(
    data: DataConfig,
    counts: SampleCounts,
    *,
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> Datasets:
    """Build the datasets of a run.

    ``vocab_size`` is the number of rows of the embedding. With a process group, rank 0 checks the files and builds
    the sample indices first; its errors are raised on all ranks. ``ValueError`` for files or settings that a user can
    fix.
    """
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"--padded-vocab-size {vocab_size} is smaller than the tokenizer's vocabulary of {tokenizer.vocab_size}: "
            f"use at least {tokenizer.vocab_size}"
        )
    build = _Build(data, seq_length, seed, tokenizer, vocab_size)
    return rank_zero_first(lambda: build(counts))


class _Build:
    """One call of ``build_datasets``."""

    def __init__(
        self,
        data: DataConfig,
        seq_length: int,
        seed: int,
        tokenizer: Tokenizer | None,
        vocab_size: int,
    ) -> None:
        self.data, self.seq_length, self.seed, self.vocab_size = data, seq_length, seed, vocab_size
        self.own_tokenizer = tokenizer
        self.leads = not dist.is_initialized() or dist.get_rank() == 0
        self.checked: set[str] = set()
        self.looked_at = EXACT_TOKENS // max(sum(map(len, data.sources().values())), 1)
        # megatron.core needs a tokenizer with vocab_size and eod even where neither is used
        self.tokenizer = tokenizer or build_tokenizer("NullTokenizer", vocab_size=vocab_size - 1)

    def __call__(self, counts: SampleCounts) -> Datasets:
        data, wanted = self.data, (counts.train, counts.valid, counts.test)
        self.train_order = counts.train_order
        if data.mock_data:
            train, valid, test = (self._mock(part, samples) for part, samples in enumerate(wanted))
            return Datasets(train, {"validation": valid} if valid else {}, test)
        if data.per_split:
            whole = (0.0, 1.0)
            train = self._one(0, "--train-data-path", data.train_data_path, whole, wanted[0])
            sets = {
                name: self._one(1, "--valid-data-path", blend, whole, wanted[1], name)
                for name, blend in data.validation_sets.items()
            }
            test = self._one(2, "--test-data-path", data.test_data_path, whole, wanted[2])
        else:
            bounds = np.concatenate([[0.0], np.cumsum(parse_split(data.split))])
            train, only, test = (
                self._one(part, "--data-path", data.data_path, (bounds[part], bounds[part + 1]), samples)
                for part, samples in enumerate(wanted)
            )
            sets = {"validation": only}
        if train is None and wanted[0]:
            raise ValueError(f"--split {data.split}: nothing to train on; give --train-data-path or a larger share")
        return Datasets(train, {name: samples for name, samples in sets.items() if samples is not None}, test)

    def _one(
        self, part: int, flag: str, items: Sequence[str], share: tuple[float, float], samples: int, name: str = ""
    ) -> Samples | None:
        """Build split ``part`` (0 train, 1 validation, 2 test) of a blend; None without samples or documents."""
        name = name or ("train", "validation", "test")[part]
        if not items or not samples or share[1] <= share[0]:
            return None
        sizes = [(weight, path, self._tokens(flag, path, share)) for weight, path in self._prefixes(flag, items)]
        empty = [path for _, path, tokens in sizes if not tokens]
        if empty and part == 0:
            raise ValueError(f"{flag} {empty[0]}: no tokens to train on ({share[0]:.3f} to {share[1]:.3f} of it)")
        if empty and self.leads:
            logger.warning("%s: %s holds no %s documents at --split %s", flag, empty[0], name, self.data.split)
        kept = [(weight if weight is not None else float(tokens), path) for weight, path, tokens in sizes if tokens]
        if not kept:
            return None
        folder = Path(read_blend(flag, items)[0][1]).parent
        config = self._config(folder, [path for _, path in kept], [weight for weight, _ in kept])
        config.split_matrix = [share if index == part else None for index in range(3)]
        return Samples(name, self._built(CachedGPTDataset, config, part, samples), self.vocab_size)

    def _mock(self, part: int, samples: int) -> Samples | None:
        if not samples:
            return None
        config = self._config(None, None, None)
        config.split_matrix = [share if index == part else None for index, share in enumerate(config.split_matrix)]
        built = self._built(EndlessMockDataset, config, part, samples)
        return Samples(("train", "validation", "test")[part], built, self.vocab_size)

    def _built(self, cls: type, config: GPTDatasetConfig, part: int, samples: int) -> Any:
        """Build the one split of ``config`` that is not None."""
        order = (self.train_order or samples) if part == 0 else samples
        sizes = [order if index == part else 0 for index in range(3)]
        return LocalBuilder(cls, sizes, config, at_least=samples).build()[part]

    def _prefixes(self, flag: str, items: Sequence[str]) -> Blend:
        """Return the blend with each text file replaced by the prefix it was preprocessed to."""
        return [
            (weight, cached_prefix(flag, path, self.data, self.own_tokenizer, self.leads) if is_text(path) else path)
            for weight, path in read_blend(flag, items)
        ]

    def _tokens(self, flag: str, path: str, share: tuple[float, float]) -> int:
        """Check the ids of a prefix and return the number of tokens in a share of its documents."""
        try:
            file = read_indexed(path)
        except ValueError as error:
            raise ValueError(f"{flag} {path}: {error}") from error
        if self.leads and path not in self.checked:
            self.checked.add(path)
            check_ids(flag, file, self.own_tokenizer, self.vocab_size, self.looked_at)
        first, last = (int(round(bound * len(file.lengths))) for bound in share)
        return int(file.lengths[first:last].sum(dtype=np.int64))

    def _config(self, folder: Path | None, paths: list[str] | None, weights: list[float] | None) -> GPTDatasetConfig:
        data = self.data
        cache = data.data_cache_path or (folder / "cache" if folder else None)
        return GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            blend=None if paths is None else (paths, None if len(paths) == 1 else weights),
            split=None if paths is None else data.split,
            num_dataset_builder_threads=data.num_dataset_builder_threads,
            path_to_cache=None if cache is None else str(cache),
            tokenizer=self.tokenizer,
            reset_position_ids=False,  # rotary positions are relative
            reset_attention_mask=data.reset_attention_mask,
            eod_mask_loss=data.eod_mask_loss,
            create_attention_mask=data.reset_attention_mask,
        )
