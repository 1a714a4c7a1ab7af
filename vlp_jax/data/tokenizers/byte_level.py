"""The tokenizer that needs nothing: UTF-8 bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from vlp_jax.data.tokenizers import base, files


class ByteTokenizer:
    """UTF-8 bytes: byte b is id b + 3; see `Tokenizer`."""

    bos_id, eos_id = base.BOS_ID, base.EOS_ID
    vocab_size = 256 + len(base.SPECIAL_TOKENS)

    def __init__(self, context_length: int) -> None:
        self.context_length = base.check_context_length(context_length)
        self.pad_id = base.PAD_ID

    @classmethod
    def load(cls, path: str | os.PathLike[str], context_length: int) -> ByteTokenizer:
        """Looks at what `save` wrote.

        Raises:
          UserError: it is the file of another tokenizer.
        """
        files.read(path, "bytes")
        return cls(context_length)

    def __call__(self, texts: Sequence[str | bytes]) -> np.ndarray:
        room = self.context_length - base.frame_length(self)
        rows = [np.frombuffer(_as_bytes(text)[:room], np.uint8) for text in texts]
        return base.frame([row.astype(np.int32) + len(base.SPECIAL_TOKENS) for row in rows], self)

    def encode(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        return [[byte + len(base.SPECIAL_TOKENS) for byte in _as_bytes(text)] for text in texts]

    def decode(self, ids: np.ndarray) -> list[str]:
        first = len(base.SPECIAL_TOKENS)
        return [
            bytes(int(i) - first for i in row if i >= first).decode("utf-8", "replace")
            for row in base.up_to_eos(ids, self.eos_id)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a note: a byte tokenizer has nothing to keep but its kind."""
        files.write_note(path, "bytes")

    def to_json(self, lowercase: bool, canonicalize: bool = False) -> str:
        """The bytes as a byte-level BPE without merges; see `Tokenizer`."""
        library = base.import_tokenizers()
        vocab = {name: i for i, name in enumerate(base.SPECIAL_TOKENS)}
        vocab.update({symbol: byte + 3 for byte, symbol in enumerate(base.byte_symbols())})
        model = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
        model.add_special_tokens(list(base.SPECIAL_TOKENS))
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        model.decoder = library.decoders.ByteLevel()
        return base.framing_json(model, self, lowercase, canonicalize)


def _as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "replace")
