"""A tokenizer's mapping of text to ids is exported, without other stored state."""

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig

from mesh_megatron.data.tokenizers import build_tokenizer
from mesh_megatron.hf.tokenizer import export_tokenizer

TEXT = "def f(x):\n    return x + 1  # a line of code, longer than what is stored\n"


def test_stored_truncation_and_dropout_are_not_exported(tmp_path):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.train_from_iterator([TEXT] * 20, trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"]))
    inner.enable_truncation(4)
    inner.model.dropout = 0.9
    inner.save(str(tmp_path / "stored.json"))
    trained = build_tokenizer("HuggingFaceTokenizer", tmp_path / "stored.json")
    export_tokenizer(trained, tmp_path / "out", GPTNeoXConfig(max_position_embeddings=32))
    exported = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert exported.encode(TEXT).ids == trained.tokenize(TEXT)
