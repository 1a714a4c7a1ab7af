"""UTF-8 bytes as tokens, which needs neither training nor a file."""

from __future__ import annotations

import os
from typing import Any

from vlp_jax.data.tokenizers import base, files


class ByteTokenizer(base.Tokenizer):
    """UTF-8 bytes: byte b is id b + 3; see `Tokenizer`."""

    kind = "bytes"
    pad_id, eos_id, bos_id = base.PAD_ID, base.EOS_ID, base.BOS_ID
    vocab_size = 256 + len(base.SPECIAL_TOKENS)

    def __init__(self, context_length: int) -> None:
        super().__init__(self.library_model(), context_length)
        self._model.encode_special_tokens = True  # a text that spells one is text

    @classmethod
    def load(cls, path: str | os.PathLike[str], context_length: int) -> ByteTokenizer:
        """Looks at the file that `save` wrote, which holds nothing but the kind.

        Raises:
          UserError: it is the file of another tokenizer.
        """
        files.read(path, cls.kind)
        return cls(context_length)

    def library_model(self) -> Any:
        """A byte-level BPE without merges."""
        library = base.import_tokenizers()
        names = [*base.SPECIAL_TOKENS, *base.byte_symbols()]
        vocab = {name: i for i, name in enumerate(names)}
        model = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
        model.add_special_tokens(list(base.SPECIAL_TOKENS))
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        model.decoder = library.decoders.ByteLevel()
        return model
