"""Small indexed datasets, written by megatron.core itself."""

import numpy as np
import pytest
import torch


@pytest.fixture
def write_prefix(tmp_path):
    """write(name, documents, dtype) -> prefix"""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def write(name, documents, dtype=np.uint16):
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
        for document in documents:
            builder.add_document(torch.tensor(document), [len(document)])
        builder.finalize(prefix + ".idx")
        return prefix

    return write


@pytest.fixture
def documents():
    """200 documents of 5 to 60 tokens below 100, each ending in 100"""
    rng = np.random.default_rng(0)
    return [[*rng.integers(0, 100, size=rng.integers(5, 60)).tolist(), 100] for _ in range(200)]
