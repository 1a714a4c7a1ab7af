"""SentencePiece (Kudo and Richardson 2018): a .model file, as T5, SigLIP and Llama have one.

Conversion to the Hugging Face `tokenizers` library follows google/sentencepiece,
src/normalizer.cc, unigram_model.cc and bpe_model.cc; and for what the other side computes,
huggingface/tokenizers, normalizers/precompiled.rs and models/. The fields of a .model file are read
here, because the module of sentencepiece refuses to load beside most versions of protobuf.
"""

from __future__ import annotations

import base64
import io
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data.tokenizers import base
from vlp_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

MODEL_TYPES = ("unigram", "bpe")


class SentencePieceTokenizer(base.Tokenizer):
    """A SentencePiece model, framed by its own bos and eos; see `Tokenizer`.

    The special ids are the model's own. Without a bos (-1 there), as in T5's and SigLIP's, rows
    begin with the text; without a pad, as in Llama's, eos pads; without an eos it is an error. Text
    that spells a special token ("</s>") is encoded as text.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, context_length: int, where: str) -> None:
        """Reads `model`, the content of a .model file; `where` names it in messages."""
        import sentencepiece

        self._file = model
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError):  # whose message is a line of its C++
            raise UserError(f"{where} is not a SentencePiece model that can be read") from None
        super().__init__(processor, context_length)
        if self._model.eos_id() < 0:
            raise UserError(
                f"{where} has no eos: train it with --eos_id=1 (tools/train_tokenizer.py does)"
            )
        self.eos_id = self._model.eos_id()
        self.bos_id = None if self._model.bos_id() < 0 else self._model.bos_id()
        self.pad_id = self.eos_id if self._model.pad_id() < 0 else self._model.pad_id()
        self.vocab_size = self._model.get_piece_size()
        self.unk_id = self._model.unk_id()

    @classmethod
    def load(cls, path: str | os.PathLike[str], context_length: int) -> SentencePieceTokenizer:
        """Reads a .model file, or what `save` wrote."""
        content = base.read_file(path, "sentencepiece")
        note = base.read_note(content, "sentencepiece")
        if note is not None:
            content = base64.b64decode(note["model"])
        return cls(content, context_length, str(path))

    @property
    def model_file(self) -> bytes:
        return self._file

    def encode(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        # One thread: see `base.import_tokenizers`.
        return self._model.encode([base.as_text(text) for text in texts], num_threads=1)

    def decode(self, ids: np.ndarray) -> list[str]:
        return [self._model.decode(row.tolist()) for row in base.up_to_eos(ids, self.eos_id)]

    def note(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self._file).decode()}

    def library_model(self) -> tokenizers.Tokenizer:
        """The model converted; see `convert` for models that it refuses."""

        return convert(self._file)


def train_sentencepiece(
    texts: Iterable[str | bytes], vocab_size: int, context_length: int, model_type: str = "unigram"
) -> SentencePieceTokenizer:
    """Trains a SentencePiece model with T5's special ids: pad 0, eos 1, unk 2 and no bos.

    The same texts in any order give the same model. `vocab_size` is an upper bound; `model_type` is
    "unigram" (Kudo 2018) or "bpe" (Sennrich et al. 2016). Raises UserError if there is no text, or
    if the vocabulary does not hold its characters.
    """
    import sentencepiece

    if model_type not in MODEL_TYPES:
        raise UserError(f"a SentencePiece model is one of {MODEL_TYPES}, not {model_type!r}")
    # Sorted, because the model depends on the order of texts; a line break would end a text.
    lines = sorted(" ".join(base.as_text(text).split()) for text in texts)
    if not any(lines):
        raise UserError("there is no text to train a tokenizer on")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9999,  # rarer characters are unknown
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
            max_sentence_length=1 << 16,  # bytes; longer ones would be left out
            num_threads=4,  # not the machine's own number, on which the sums' rounding depends
            minloglevel=2,
        )
    except RuntimeError as error:
        # Without the place in the C++ code.
        reason = str(error).splitlines()[0].rpartition("] ")[2].strip()
        raise UserError(
            f"SentencePiece cannot make {vocab_size} tokens of {len(lines)} texts: {reason}"
        ) from None
    return SentencePieceTokenizer(written.getvalue(), context_length, "the trained model")


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
UNIGRAM, BPE, WORD, CHAR = range(1, 5)  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary: its text, its score and its type, such as `NORMAL`."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class ModelFile:
    """The fields of a ModelProto that decide how text becomes ids, after sentencepiece_model.proto.

    `normalizer` names the rules, such as "nmt_nfkc"; `charsmap` holds them, compiled, and is empty
    if text stays as it is.
    """

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    normalizer: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    @classmethod
    def parse(cls, content: bytes) -> ModelFile:
        """Reads a serialized ModelProto; raises ValueError if it is cut off or none."""
        fields = list(_fields(content))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer, normalizer = _merged(fields, 2), _merged(fields, 3)
        return cls(
            pieces=tuple(pieces),
            model_type=trainer.get(3, UNIGRAM),
            byte_fallback=bool(trainer.get(35, 0)),
            whitespace_as_suffix=bool(trainer.get(24, 0)),
            normalizer=normalizer.get(1, b"").decode(),
            charsmap=normalizer.get(2, b""),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
            escape_whitespaces=bool(normalizer.get(5, 1)),
        )


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields.get(1, b"").decode(), score, fields.get(3, NORMAL))


def _merged(fields: list[tuple[int, bytes | int]], number: int) -> dict[int, bytes | int]:
    """The fields of message `number`; later messages override earlier ones."""
    return {key: value for n, part in fields if n == number for key, value in _fields(part)}


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yields (number, value) of every field of a protocol buffer in wire format."""
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(content, place)
        else:
            # Wire types: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes.
            size = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                size, place = _varint(content, place)
            if size is None or place + size > len(content):
                raise ValueError(f"no protocol buffer: byte {place}")
            value, place = content[place : place + size], place + size
        yield tag >> 3, value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """Reads a number of variable length; returns it and the place behind it."""
    value = shift = 0
    while place < len(content):
        byte = content[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place
    raise ValueError("a protocol buffer that is cut off")


_SPACE = "\u2581"

# The library applies these rules to one grapheme at a time, and misses those that need several of
# its characters, unless the text was composed (and lower-cased, for folding) before.
_NFKC, _FOLDING = ("nfkc", "nmt_nfkc"), ("nfkc_cf", "nmt_nfkc_cf")

# What a conversion has to encode as SentencePiece does, or it is not handed out.
PROBES = (
    "",
    " a  red circle,\tleft of 2 blue squares\n",
    "Größe ŒUVRE İstanbul naïve ½ ﬁne ① ™",
    "красный круг, ένας κόκκινος ΚΥΚΛΟΣ",
    "دائرة حمراء בצד ריבוע כחול",
    "नीले वर्ग के पास วงกลมสีแดงอยู่ข้าง",
    "红色圆圈，青い四角の左に 파란 사각형 ㌔",
    "კარგი ቀይ ክብ 🟥👩‍👩‍👧 x\u200by \u00a0 z",
    "e\u0301 o\u0308 \u1112\u1161\u11ab \u304b\u3099",
    "[email protected] #tag 1,234.5% <b> x_y {}",
)


def convert(content: bytes) -> tokenizers.Tokenizer:
    """Converts a .model file to a model of the library that gives texts the same ids.

    Unigram and BPE models with the rules of normalization that come with SentencePiece (identity,
    nfkc, nmt_nfkc, and both with case folding), byte fallback, and user-defined symbols if no
    space is put before a text. What stays different is normalization where a character that NFKC
    replaces carries a combining mark that it does not compose with, and, of a unigram model, text
    that spells the name of a byte ("<0x41>", with byte fallback).

    Raises:
      UserError: the model is of another kind, or the result differs on one of `PROBES`.
    """
    file = ModelFile.parse(content)
    for wrong, why in _obstacles(file):
        if wrong:
            raise _refusal(why)
    library = base.import_tokenizers()
    make = _unigram if file.model_type == UNIGRAM else _bpe
    model = library.Tokenizer(make(file, library))
    special = [piece.text for piece in file.pieces if piece.type in (CONTROL, UNKNOWN)]
    model.add_special_tokens([library.AddedToken(text, normalized=False) for text in special])
    symbols = [piece.text for piece in file.pieces if piece.type == USER_DEFINED]
    model.add_tokens([library.AddedToken(text, normalized=True) for text in symbols])
    model.normalizer = library.normalizers.Sequence(_normalization(file, library))
    splitting = _keep_apart(special, file, library) if file.model_type == UNIGRAM else None
    if splitting is not None:
        model.pre_tokenizer = splitting
    model.decoder = _decoder(file, library.decoders)
    _check(model, content)
    return model


def _obstacles(file: ModelFile) -> list[tuple[bool, str]]:
    types = {piece.type for piece in file.pieces}
    known = (*_NFKC, *_FOLDING)
    return [
        (file.model_type not in (UNIGRAM, BPE), "it is neither a unigram nor a BPE model"),
        (file.whitespace_as_suffix, "it puts spaces behind words"),
        (not file.escape_whitespaces, "it does not escape spaces"),
        (UNUSED in types, "it has unused pieces"),
        (
            bool(file.charsmap) and file.normalizer not in known,
            f"its rules of normalization are its own ({file.normalizer})",
        ),
        (
            USER_DEFINED in types and (file.add_dummy_prefix or bool(file.charsmap)),
            "it has user-defined symbols and normalizes, or puts a space before a text",
        ),
    ]


def _refusal(why: str) -> UserError:
    return UserError(
        f"this SentencePiece model cannot be written as a tokenizer.json: {why}; those who use the "
        f"exported weights need its .model file"
    )


def _unigram(file: ModelFile, library: Any) -> Any:
    unknown = next(i for i, piece in enumerate(file.pieces) if piece.type == UNKNOWN)
    lowest = min((piece.score for piece in file.pieces if piece.type == NORMAL), default=0.0)
    # An unknown character costs 10 more than the lowest score there is, in SentencePiece of the
    # normal pieces, in the library of all; and pieces that stand for no text are to be unlikely.
    vocab = [
        (piece.text, piece.score if piece.type in (NORMAL, USER_DEFINED) else lowest)
        for piece in file.pieces
    ]
    return library.models.Unigram(vocab, unknown, file.byte_fallback)


def _bpe(file: ModelFile, library: Any) -> Any:
    scores = {piece.text: piece.score for piece in file.pieces if piece.type == NORMAL}
    unknown = next(piece.text for piece in file.pieces if piece.type == UNKNOWN)
    # SentencePiece merges any two neighbours that make a piece, the best score first. The library
    # wants the pairs listed in that order.
    merges = []
    for text in sorted(scores, key=lambda text: -scores[text]):
        pairs = ((text[:place], text[place:]) for place in range(1, len(text)))
        merges += [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
    return library.models.BPE(
        vocab={piece.text: i for i, piece in enumerate(file.pieces)},
        merges=merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=file.byte_fallback,
    )


def _keep_apart(special: list[str], file: ModelFile, library: Any) -> Any:
    """Splits text that spells a special token, which a unigram model would take for the token.

    The split is where no piece lies across, so that nothing else changes; if there is no such
    place, text that spells the token becomes the token.
    """
    pieces = {piece.text for piece in file.pieces if piece.type in (NORMAL, USER_DEFINED)}
    patterns = []
    for text in special:
        for place in range(1, len(text)):
            across = text[place - 1 : place + 1]
            # A run of unknown characters is one token, and so must not be split either.
            known = any(character in pieces for character in across)
            if known and not any(across in piece for piece in pieces):
                before, after = re.escape(text[:place]), re.escape(text[place:])
                patterns.append(f"(?<={before}){after}")
                break
    if not patterns:
        return None
    return library.pre_tokenizers.Split(library.Regex("|".join(patterns)), "merged_with_next")


def _normalization(file: ModelFile, library: Any) -> list[Any]:
    normalizers = library.normalizers
    steps = []
    if file.charsmap:
        # Spaces first, on which a mark may follow: they are what NFKC makes of them anyway.
        spaces = library.Regex(r"[\x{a0}\x{2000}-\x{200a}\x{202f}\x{205f}\x{3000}]")
        steps += [normalizers.Replace(spaces, " "), normalizers.NFC()]
        if file.normalizer in _FOLDING:
            # SentencePiece's folding leaves the dotted I as it is, lower-casing here does not.
            hidden, dotted = "\U0010fffd", "\u0130"
            steps += [normalizers.Replace(dotted, hidden), normalizers.Lowercase()]
            steps += [normalizers.Replace(hidden, dotted)]
        steps += [normalizers.Precompiled(file.charsmap)]
    if file.remove_extra_whitespaces:
        ends = library.Regex(r"\A +| +\z")
        steps += [normalizers.Replace(library.Regex(" {2,}"), " "), normalizers.Replace(ends, "")]
    if file.add_dummy_prefix:
        steps += [normalizers.Prepend(" ")]
    return [*steps, normalizers.Replace(" ", _SPACE)]


def _decoder(file: ModelFile, decoders: Any) -> Any:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.add_dummy_prefix:
        steps += [decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def _check(model: tokenizers.Tokenizer, content: bytes) -> None:
    """Raises UserError for the first probe that the model encodes differently."""
    import sentencepiece

    expected = sentencepiece.SentencePieceProcessor(model_proto=content)
    for probe in PROBES:
        if model.encode(probe, add_special_tokens=False).ids != expected.encode(probe):
            raise _refusal(f"{probe!r} would get other ids")
