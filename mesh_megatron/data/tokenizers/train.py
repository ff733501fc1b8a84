"""Train a tokenizer on the inputs that preprocessing reads: SentencePiece (unigram, BPE) or byte-level BPE."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mesh_megatron.data.preprocessing.documents import describe, parse
from mesh_megatron.data.preprocessing.readers import TRAILING, SplitOptions, read_blocks
from mesh_megatron.data.preprocessing.sources import Source
from mesh_megatron.util.atomic_files import write_atomically

ModelType = Literal["unigram", "bpe", "byte-level-bpe"]
END_OF_DOCUMENT = "<|endoftext|>"
SENTENCE_CHARACTERS = 4000
_CONTROL_SYMBOLS = ("<unk>", "<s>", "</s>")  # as a user's symbol, </s> would no longer be the end of document


@dataclass
class Corpus:
    """The documents' texts for a trainer; counts skipped documents and keeps the error that ended reading."""

    sources: Sequence[Source]
    split_options: SplitOptions
    on_error: Literal["stop", "skip"] = "stop"
    documents: int = 0
    left_out: int = 0
    error: BaseException | None = None
    """The error that ended reading; SentencePiece would wrap it in several lines of its own."""

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._texts()
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
            raise

    def _texts(self) -> Iterator[str]:
        for source in self.sources:
            line = 0
            for block in read_blocks(source, self.split_options):
                documents, problems, lines = parse(block, source, self.split_options)
                for problem in problems:
                    if self.on_error == "stop" and problem.kind not in ("empty file", TRAILING):  # harmless kinds
                        text = describe(problem, source, line)
                        raise ValueError(f"{text}; fix the input, or leave such documents out with --on-error skip")
                    self.left_out += problem.kind != TRAILING
                for document in documents:
                    self.documents += 1
                    yield from (part for parts in document.texts for part in parts)
                line += lines

    def lines(self) -> Iterator[str]:
        """Yield SentencePiece's sentences: lines without their ends, long ones in pieces."""
        for text in self:
            for line in text.split("\n"):
                for start in range(0, len(line), SENTENCE_CHARACTERS):
                    yield line[start : start + SENTENCE_CHARACTERS]


@dataclass(frozen=True, kw_only=True)
class SentencePieceOptions:
    """Options of SentencePiece's trainer; most have its names."""

    model_type: Literal["unigram", "bpe"]
    vocab_size: int
    byte_fallback: bool = False
    character_coverage: float = 0.9995
    split_digits: bool = False
    normalization: str = "identity"
    user_defined_symbols: Sequence[str] = ()
    input_sentence_size: int = 5_000_000
    """Number of random lines in memory."""
    threads: int = 1


def train_sentencepiece(corpus: Corpus, output: str, options: SentencePieceOptions) -> Path:
    """Write OUTPUT.model and OUTPUT.vocab; ids 0 to 2 are <unk>, <s>, </s> (the end of document).

    Unlike SentencePiece's own defaults the model keeps every character: no normalisation, and white space is not
    merged. With ``byte_fallback`` decoding restores a text, except that U+2581, SentencePiece's own sign for a space,
    becomes a space. ``ValueError`` for a vocabulary that is too large for the text.
    """
    import sentencepiece

    symbols = list(options.user_defined_symbols)
    _check_special_tokens(symbols)
    if own := [token for token in symbols if token in _CONTROL_SYMBOLS]:
        raise ValueError(f"--special-tokens {own[0]}: SentencePiece has it as a control symbol; drop it")
    model = io.BytesIO()
    if not options.byte_fallback and "\n" not in symbols:
        symbols.append("\n")  # training sees lines without their ends, so it would be unknown
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=corpus.lines(),
            model_writer=model,
            model_type=options.model_type,
            vocab_size=options.vocab_size,
            byte_fallback=options.byte_fallback,
            character_coverage=options.character_coverage,
            split_digits=options.split_digits,
            normalization_rule_name=options.normalization,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=symbols,
            input_sentence_size=options.input_sentence_size,
            shuffle_input_sentence=True,
            max_sentence_length=4 * SENTENCE_CHARACTERS + 4,
            num_threads=options.threads,
            minloglevel=1,
        )
    except (RuntimeError, OSError) as error:
        if corpus.error is not None:
            raise corpus.error from None
        if not corpus.documents:
            raise ValueError("--input holds no documents to train on") from error
        raise ValueError(f"--vocab-size {options.vocab_size}: {_sentence(error)}") from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = ((processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size()))
    _write(Path(output + ".vocab"), "".join(f"{piece}\t{score:g}\n" for piece, score in pieces).encode())
    return _write(Path(output + ".model"), model.getvalue())


def _check_special_tokens(tokens: Sequence[str]) -> None:
    """Raise ``ValueError`` for tokens that a library refuses in words of its own, or takes as something else."""
    for token in tokens:
        if not token:
            raise ValueError("--special-tokens '': is empty; drop it")
        if tokens.count(token) > 1:
            raise ValueError(f"--special-tokens {token}: listed twice; name it once")


def _sentence(error: Exception) -> str:
    """Return SentencePiece's message without its source location: 'Internal: ../trainer.cc(12) [condition] message'."""
    return str(error).rpartition("] ")[2] or str(error)


def train_byte_level_bpe(corpus: Corpus, output: str, *, vocab_size: int, special_tokens: Sequence[str] = ()) -> Path:
    """Write OUTPUT.json, a Hugging Face tokenizer.json with GPT-2's split of text and <|endoftext|> as id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    _check_special_tokens(special_tokens)
    special = [END_OF_DOCUMENT, *(token for token in special_tokens if token != END_OF_DOCUMENT)]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ValueError(f"--vocab-size {vocab_size}: the bytes and special tokens alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(iter(corpus), trainer)
    if not corpus.documents:
        raise ValueError("--input holds no documents to train on")
    return _write(Path(output + ".json"), tokenizer.to_str(pretty=True).encode())


def _write(path: Path, content: bytes) -> Path:
    """Write a tokenizer's file atomically; ``ValueError`` names --output where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise ValueError(f"--output {path}: {error.strerror}") from error
    return path
