"""Provide ``megatron.core``'s dataset builder without its barriers and with sample indices written atomically.

Workarounds for Megatron-Core 0.16.1 (0.19 and main are the same unless noted):

- Its builder synchronizes ranks with barriers, so an error on rank 0 leaves the others hanging. Here no rank waits
  inside the builder; ``ranks.rank_zero_first`` orders them.
- It writes index files in place: a job killed meanwhile leaves a cache that looks complete. Here they are renamed.
- It loads an index file that is a pickle, with any code in it (0.19 allows some classes). Here it is refused.
- ``BlendedDataset`` asks for a rank without a process group (fixed in main). Here its index stays in memory then.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.datasets.utils import Split

from mesh_megatron.data.fingerprint import content

Index = TypeVar("Index")


class LocalBuilder(BlendedMegatronDatasetBuilder):
    """Builds datasets on the calling rank alone; the caller ensures that rank 0 goes first.

    Samples are ordered as in datasets of ``sizes`` samples. A dataset that must hold ``at_least`` more samples
    continues in the same blend, and a component that reaches its end starts again.
    """

    def __init__(self, cls: type[EndlessDataset], sizes: list[int], config: Any, at_least: int = 0) -> None:
        super().__init__(cls, sizes, lambda: True, config)
        self.at_least = at_least

    def build_generic_dataset(  # type: ignore[override]
        self, cls: Any, is_built_on_rank: Callable, synchronize_ranks: bool, *args: Any
    ) -> Any:
        if cls is BlendedDataset:
            datasets, weights, size, config = args
            return CachedBlendedDataset(datasets, weights, max(size, self.at_least), config)
        dataset = cls(*args)
        dataset.at_least = self.at_least
        return dataset

    def _build_megatron_datasets_parallel(self, prefixes: list, split: list, sizes_per_dataset: list) -> list[list]:
        with ThreadPoolExecutor(self.config.num_dataset_builder_threads) as pool:
            jobs = [
                pool.submit(self._build_megatron_dataset_splits, prefix, split, sizes, False)
                for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
            ]
            return [list(column) for column in zip(*(job.result() for job in jobs), strict=True)]


class EndlessDataset(GPTDataset):
    """GPTDataset that starts again at its end until it holds ``at_least`` samples."""

    at_least = 0

    def __len__(self) -> int:
        return max(super().__len__(), self.at_least)

    def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
        return super()._query_document_sample_shuffle_indices(idx % super().__len__())


class EndlessMockDataset(EndlessDataset, MockGPTDataset):
    pass


class CachedGPTDataset(EndlessDataset):
    """GPTDataset whose index files appear in the cache together, under a name that depends on everything the index is
    made from: the settings in its description and the content of the .idx (the .bin does not matter)."""

    def _build_document_sample_shuffle_indices(self) -> Any:
        named_by = [self.unique_description_hash, content(f"{self.dataset_path}.idx")]  # type: ignore[has-type]
        self.unique_description_hash = hashlib.md5(" ".join(named_by).encode(), usedforsecurity=False).hexdigest()
        names = ("document_index.npy", "sample_index.npy", "shuffle_index.npy", "description.txt")
        return _publish(self, self.index_split, names, super()._build_document_sample_shuffle_indices)


class CachedBlendedDataset(BlendedDataset):
    """BlendedDataset whose index files appear in the cache together."""

    def _build_indices(self) -> Any:
        names = ("dataset_index.npy", "dataset_sample_index.npy", "description.txt")
        return _publish(self, self.split, names, super()._build_indices)


def _publish(dataset: Any, split: Split, names: Sequence[str], build: Callable[[], Index]) -> Index:
    """Run ``build()``, which reads the cache if all ``names`` are there; else its files are renamed into the cache."""
    shared, cache = dataset.config, Path(dataset.config.path_to_cache)
    stem = f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split.name}"
    cached = [cache / f"{stem}-{name}" for name in names]
    if all(file.exists() for file in cached):
        folder = None
        _check_arrays(cached)
    elif dist.is_initialized() and dist.get_rank() != 0:
        raise ValueError(
            f"--data-cache-path {cache}: rank {dist.get_rank()} does not see the sample index that rank 0 wrote there; "
            "give a folder on a file system that all nodes share"
        )
    else:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(dir=cache, prefix=".building-")
        except OSError as error:
            raise ValueError(
                f"--data-cache-path {cache}: {error.strerror}; give a folder that can be written"
            ) from error
    own = copy.copy(shared)
    own.path_to_cache = folder or str(cache)
    if isinstance(dataset, BlendedDataset) and not dist.is_initialized():
        own.path_to_cache = None
    dataset.config = own
    try:
        index = build()
        if folder is not None:
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, cache / file.name)
        return index
    except OSError as error:
        if folder is None:
            raise
        raise ValueError(
            f"--data-cache-path {cache}: the sample index cannot be written ({error.strerror or error}); make room or "
            "give another folder"
        ) from error
    finally:
        dataset.config = shared
        if folder is not None:
            for file in Path(folder).iterdir():
                file.unlink()
            Path(folder).rmdir()


def _check_arrays(files: list[Path]) -> None:
    """Raise ``ValueError`` for a .npy file that contains pickles or is not an array."""
    for file in files:
        if file.suffix == ".npy":
            try:
                np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ValueError(
                    f"{file} is not an array of numbers ({error}): delete it, it will be built again"
                ) from error
