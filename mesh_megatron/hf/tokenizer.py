"""Export the training tokenizer as files that ``AutoTokenizer`` reads, and check that both give the same ids.

Each vendor's model becomes one ``tokenizer.json``, a format that needs neither the vendor's library nor custom code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mesh_megatron.data.tokenizers.library_errors import as_value_error
from mesh_megatron.data.tokenizers.stored_state import add_stand_ins, drop_loaded_state, read_no_copies, write_origin

_SENTENCEPIECE_KINDS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_SPACE = "▁"  # how SentencePiece writes a space
_UNIGRAM, _BPE = 1, 2
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# Texts that the exported tokenizer must encode as in training: white space in code, scripts, symbols, line ends.
SAMPLES = (
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces   three    four",
    "def f(x, *, y=1):\n    if x:\n        return {'a': [x ** 2]}  # comment\n\n\n",
    "\tif (a && b) {\n\t\treturn a->b[0];\t// c\n\t}\r\n",
    "Größe, naïve, Ελληνικά, русский, 中文字符, 日本語, العربية, हिन्दी",
    "emoji 🙂👩‍👩‍👧 and math ∑ᵢ xᵢ² ≤ ∞",
    "3.14159 1,234,567 0xDEADBEEF user@example.com https://example.com/a?b=c#d",
    "\u00a0\u2003\u200b\ufeff zero width and wide spaces",
    "\x00\x07 control characters",
    "the names of tokens: <0x41> and <unk>",
)
# Where an added token or user-defined symbol may stand in a text.
_SYMBOL_FORMS = ("{0}", "{0}after", "{0} after", " {0}", "before {0} after{0}{0}", "before{0}", "{0}<0x41>{0}<unk>")


class TrainingTokenizer(Protocol):
    """The interface of the training tokenizer that exporting needs."""

    kind: str
    model: Path | None
    eod: int | None
    unique_identifiers: dict[str, Any]
    converted_from: list[dict[str, Any]]

    def tokenize(self, text: str) -> list[int]: ...


def load_tokenizer(folder: Path, config: PreTrainedConfig) -> Any:
    """Load the tokenizer of an exported folder with ``AutoTokenizer``.

    ``config`` replaces the folder's configuration, so that transformers does not ask whether to run the folder's code.
    """
    read_no_copies()
    loaded = AutoTokenizer.from_pretrained(str(folder), config=config, local_files_only=True, trust_remote_code=False)
    drop_loaded_state(loaded)
    return loaded


def export_tokenizer(trained: TrainingTokenizer, folder: Path, config: PreTrainedConfig) -> int | None:
    """Write ``trained`` to ``folder``; ``ValueError`` if ``AutoTokenizer`` then gives other ids on ``SAMPLES``.

    ``config`` is the exported model's. Returns the id of the padding token. The folder records from which tokenizer it
    was made, so that data made with either goes with it after an import.
    """
    with as_value_error():  # the libraries have exceptions of their own for a model they cannot hold
        fast = _convert(trained)
    if trained.eod is not None:
        eod = fast.convert_ids_to_tokens(trained.eod)
        missing = {"eos_token": fast.eos_token, "bos_token": fast.bos_token, "pad_token": fast.pad_token}
        fast.add_special_tokens({name: eod for name, token in missing.items() if token is None})
    fast.model_max_length = config.max_position_embeddings
    fast.model_input_names = ["input_ids", "attention_mask"]  # generate refuses others, such as token_type_ids
    fast.init_kwargs["model_input_names"] = fast.model_input_names  # without this it would not be saved
    fast.save_pretrained(folder)
    loaded = load_tokenizer(folder, config)
    symbols = [token.content for token in loaded.added_tokens_decoder.values() if not token.special]
    if trained.kind in _SENTENCEPIECE_KINDS and trained.model is not None:
        symbols += user_symbols(_read_sentencepiece(trained.model))
    texts = [*SAMPLES, *(form.format(symbol) for symbol in symbols for form in _SYMBOL_FORMS)]
    check_ids(trained.tokenize, lambda text: loaded(text, verbose=False)["input_ids"], texts)
    write_origin(folder, loaded, [trained.unique_identifiers, *trained.converted_from])
    return loaded.pad_token_id


def check_ids(expected: Callable[[str], list[int]], exported: Callable[[str], list[int]], texts: Iterable[str]) -> None:
    """Raise ``ValueError`` with the first of ``texts`` on which both tokenizers disagree."""
    for text in texts:
        wanted, got = list(expected(text)), list(exported(text))
        if wanted != got:
            raise ValueError(
                f"the exported tokenizer encodes {text!r} as {got} and training encoded it as {wanted}: this "
                "tokenizer cannot be exported; use --no-tokenizer and copy its files yourself"
            )


def _convert(trained: TrainingTokenizer) -> Any:
    """Build a transformers tokenizer with the ids of ``trained``."""
    kind, model = trained.kind, trained.model
    if kind == "HuggingFaceTokenizer" and model is not None:
        return _hugging_face(model, trained.tokenize)
    if kind == "GPT2BPETokenizer":
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained.to_json()))  # type: ignore[attr-defined]
    if kind == "ByteLevelTokenizer":
        return PreTrainedTokenizerFast(tokenizer_object=_bytes())
    if kind == "TikTokenizer":
        return PreTrainedTokenizerFast(tokenizer_object=_tiktoken(trained.encoding))  # type: ignore[attr-defined]
    if kind in _SENTENCEPIECE_KINDS and model is not None:
        return PreTrainedTokenizerFast(tokenizer_object=sentencepiece_to_fast(model))
    raise ValueError(f"--tokenizer-type {kind} has no Hugging Face form: add --no-tokenizer")


def _hugging_face(model: Path, tokenize: Callable[[str], list[int]]) -> Any:
    if model.is_dir():
        fast = AutoTokenizer.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
        add_stand_ins(fast)
    else:
        fast = PreTrainedTokenizerFast(tokenizer_file=str(model))
    drop_loaded_state(fast)
    probe = "Hello, world!"
    if fast.is_fast and fast(probe)["input_ids"] != tokenize(probe):
        fast.backend_tokenizer.post_processor = None  # training left its special tokens out
    return fast


def _bytes() -> Tokenizer:
    """Build a tokenizer of UTF-8 bytes as ids 0..255, with end of document 256."""
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    return tokenizer


def _tiktoken(encoding: Any) -> Tokenizer:
    """Convert a ``tiktoken.Encoding``: its pattern, its ranks as ids, its special tokens with their ids."""
    letters = bytes_to_unicode()
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    specials = dict(sorted(encoding._special_tokens.items(), key=lambda item: item[1]))

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {written(token): rank for token, rank in ranks.items()}
    merges = [
        (written(left), written(right))
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in _splits(token, ranks)
    ]
    tokenizer = Tokenizer(models.BPE({**vocabulary, **specials}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(encoding._pat_str), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def sentencepiece_to_fast(path: Path) -> Tokenizer:
    """Convert a SentencePiece model file (BPE or unigram) to ``tokenizers``, with the same ids.

    One difference is intended: control symbols such as ``</s>`` are recognised in text, as everywhere in transformers.
    User-defined symbols are no added tokens: ``tokenizers`` normalises the text before and after one by itself, so a
    text that starts with a symbol would get no dummy prefix. Each is split off as a word and found in the vocabulary.
    """
    proto = _read_sentencepiece(path)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise ValueError(f"--tokenizer-model {path}: only BPE and unigram models with escaped spaces can be exported")
    model: models.Model
    symbols = user_symbols(proto)
    splits: list[Any] = [pre_tokenizers.Split(Regex(_either(symbols)), behavior="isolated")] if symbols else []
    if trainer.model_type == _BPE:
        model = bpe = _sentencepiece_bpe(proto)
        if symbols:
            splits += _bpe_splits(proto, bpe)
            bpe.ignore_merges = True
    else:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
        splits += _unigram_splits(proto)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _sentencepiece_normalizer(rules)
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    unknown = decoders.Replace(trainer.unk_piece, trainer.unk_surface)
    steps = [decoders.Replace(_SPACE, " "), unknown, decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    for piece in proto.pieces:
        if piece.type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
    return tokenizer


def _read_sentencepiece(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    return proto


def user_symbols(proto: Any) -> list[str]:
    """Return the user-defined symbols, longest first; SentencePiece never finds one that contains a space."""
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED and " " not in piece.piece]
    return sorted(symbols, key=len, reverse=True)


def _bpe_splits(proto: Any, model: models.BPE) -> list[Any]:
    """Return the split that keeps ``ignore_merges`` to user-defined symbols.

    With it a word that is in the vocabulary is one token. Where merges give other tokens (for the text "<0x41>", which
    is also the name of a byte), the word is cut after the first of these tokens.
    """
    heads = []
    for piece in proto.pieces:
        tokens = model.tokenize(piece.piece)
        if piece.type not in (_CONTROL, _USER_DEFINED) and len(tokens) > 1:
            head = len(piece.piece.encode()[: tokens[0].offsets[1]].decode())
            heads.append(_cut(piece.piece, head, end=r"\z"))
    return [pre_tokenizers.Split(Regex(rf"\A(?:{'|'.join(heads)})"), behavior="isolated")] if heads else []


def _unigram_splits(proto: Any) -> list[Any]:
    """Return the split that keeps text like "<0x41>" or "<unk>" from being taken for the token of that name."""
    names = [piece.piece for piece in proto.pieces if piece.type not in (_NORMAL, _CONTROL, _USER_DEFINED)]
    cuts = [_cut(name, 1) for name in names if len(name) > 1]
    return [pre_tokenizers.Split(Regex("|".join(cuts)), behavior="merged_with_previous")] if cuts else []


def _either(symbols: list[str]) -> str:
    return "|".join(map(re.escape, symbols))


def _cut(name: str, head: int, end: str = "") -> str:
    """Return a pattern for the first ``head`` characters of ``name`` where the others, and then ``end``, follow."""
    return f"{re.escape(name[:head])}(?={re.escape(name[head:])}{end})"


def _sentencepiece_bpe(proto: Any) -> models.BPE:
    """Convert the scores of SentencePiece, which merges the best-scored pair first, to an ordered list of merges."""
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    mergeable = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    ordered = sorted(mergeable, key=lambda piece: -proto.pieces[mergeable[piece]].score)
    trainer = proto.trainer_spec
    return models.BPE(
        vocabulary,
        [pair for piece in ordered for pair in _splits(piece, mergeable)],
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _sentencepiece_normalizer(rules: Any) -> Any:
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        for pattern, text in ((r"\A +", ""), (r" +\z", ""), (" {2,}", " ")):  # ^ and $ also match at ends of lines
            steps.append(normalizers.Replace(Regex(pattern), text))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _splits(token: Any, vocabulary: dict[Any, int]) -> list[tuple[Any, Any]]:
    """List every pair of entries of ``vocabulary`` that joins to ``token``, smallest ids first."""
    pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    return sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
