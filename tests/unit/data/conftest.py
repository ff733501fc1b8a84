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


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    """A byte-level BPE tokenizer.json of 320 entries with <|endoftext|> = 0"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def f(x):\n    return x + 1  # naïve\n"] * 20, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
