"""Converts texts to the token ids that a model takes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vlp_jax.data.tokenizers import SentencePieceTokenizer, SubwordTokenizer
from vlp_jax.data.tokenizers.base import as_text, frame_length
from vlp_jax.data.wording import Wording
from vlp_jax.errors import UserError
from vlp_jax.models.text import TextTransformer


@dataclasses.dataclass(frozen=True)
class TextProcessor:
    """Converts texts to token ids, int32 [n, context_length], as in training.

    Attributes:
      tokenizer: the tokenizer of a run or of foreign files.
      preprocess: the run's operations on texts before tokenizing, such as lower case.
    """

    tokenizer: Any
    preprocess: Wording = Wording()

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]:
        """Returns token ids; raises as `ids`. A text that is truncated gives a warning."""
        note = self.too_long(texts)
        if note:
            # 3 is the caller of `Encoder.embed_text`, whose line the warning shows.
            warnings.warn(note, stacklevel=3)
        return self.ids(texts)

    def ids(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]:
        """Returns token ids without a warning; see `too_long`.

        Raises:
          UserError: a text is empty, or is not a str.
        """
        return self.tokenizer(self._prepared(texts))

    def too_long(self, texts: Sequence[str]) -> str | None:
        """Describes the texts that are longer than the context, if any; raises as `ids`."""
        limit, prepared = self.tokenizer.context_length, self._prepared(texts)
        if hasattr(self.tokenizer, "lengths"):  # a foreign tokenizer, which adds bos and eos itself
            lengths = self.tokenizer.lengths(prepared)
        else:
            extra = frame_length(self.tokenizer)
            lengths = [len(ids) + extra for ids in self.tokenizer.encode(prepared)]
        long = [(n, k) for n, k in enumerate(lengths) if k > limit]
        if not long:
            return None
        number, length = long[0]
        more = f" (and {len(long) - 1} more)" if len(long) > 1 else ""
        end = "last" if getattr(self.tokenizer, "cuts_left", False) else "first"
        return (
            f"text {number} has {length} tokens{more}; the model reads the {end} {limit}: "
            f"{texts[number][:60]!r}"
        )

    def _prepared(self, texts: Sequence[str]) -> list[str]:
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"text {number} is of {type(text).__name__}: give a str")
            if not text.strip():
                raise UserError(f"text {number} is empty: there is nothing to embed")
        return [as_text(text) for text in self.preprocess(texts)]


def tokenizer_from(path: str, text: TextTransformer) -> Any:
    """Loads a tokenizer.json or a SentencePiece .model; raises UserError if it does not fit."""
    kinds = {".json": SubwordTokenizer, ".model": SentencePieceTokenizer}
    if Path(path).suffix not in kinds:
        raise UserError(f"{path}: a tokenizer is a tokenizer.json or a SentencePiece .model")
    tokenizer = kinds[Path(path).suffix].load(path, text.context_length)
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size:,} tokens and the model {text.vocab_size:,}: it is "
            "another model's"
        )
    return tokenizer
