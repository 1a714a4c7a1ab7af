"""The fields of a SentencePiece .model file that its library does not give access to.

Source: google/sentencepiece, src/sentencepiece_model.proto. The generated module that comes with
the library refuses to load beside most versions of protobuf, so the few fields are read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

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
    """The fields of a ModelProto that decide how text becomes ids.

    Attributes:
      pieces: in the order of their ids.
      model_type: such as `UNIGRAM`.
      byte_fallback: what is unknown becomes bytes.
      whitespace_as_suffix: a space belongs to the word before it.
      normalizer: name of the rules, such as "nmt_nfkc".
      charsmap: the rules, compiled; empty if text stays as it is.
      add_dummy_prefix: texts begin with a space.
      remove_extra_whitespaces: spaces are trimmed, and two become one.
      escape_whitespaces: spaces become U+2581.
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
        """Reads a serialized ModelProto.

        Raises:
          ValueError: the content is cut off or is none.
        """
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
