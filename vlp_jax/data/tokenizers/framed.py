"""Tokenizers of other projects' models, whose tokenizer.json frames texts by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlp_jax.data.tokenizers import base
from vlp_jax.errors import UserError


class FramedTokenizer:
    """Token ids as `transformers` makes them with `padding="max_length", truncation=True`.

    The file's own normalization and special tokens are used, unlike in `SubwordTokenizer`, which
    frames texts itself.

    Attributes:
      cuts_left: a text that is too long loses its beginning, not its end.
    """

    def __init__(
        self,
        tokenizer_json: str | bytes,
        context_length: int,
        pad_token: str | int,
        *,
        texts_may_hold_special_tokens: bool = True,
        pads_left: bool = False,
        cuts_left: bool = False,
        zeroed: int | None = None,
        clean: Callable[[str], str] = str,
    ) -> None:
        """Reads the tokenizer.

        Args:
          tokenizer_json: the content of the file.
          context_length: of a row of ids.
          pad_token: what rows are filled up with, as it is spelled or its id.
          texts_may_hold_special_tokens: a text that spells "</s>" gets that token, as in
            `transformers` unless it is told otherwise.
          pads_left: the padding comes before the text.
          cuts_left: see the attribute.
          zeroed: an id that becomes 0, as open_clip's `strip_sep_token` wants it.
          clean: what is done to a text first.

        Raises:
          UserError: the file cannot be read, or has no such token.
        """
        library = base.import_tokenizers()
        if isinstance(tokenizer_json, bytes):
            tokenizer_json = tokenizer_json.decode("utf-8", "replace")
        try:
            model = library.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises plain Exception for every kind of damage
            reason = str(error).splitlines()[0]
            raise UserError(f"the tokenizer.json cannot be read: {reason}") from None
        pad_id = model.token_to_id(pad_token) if isinstance(pad_token, str) else pad_token
        if pad_id is None:
            raise UserError(f"the tokenizer.json has no token {pad_token!r}, which pads texts")
        self.context_length, self.pad_id = context_length, pad_id
        self.vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values())
        self.cuts_left, self._pads_left, self._zeroed = cuts_left, pads_left, zeroed
        self._clean = clean
        model.encode_special_tokens = not texts_may_hold_special_tokens
        model.no_padding()
        model.enable_truncation(context_length, direction="left" if cuts_left else "right")
        self._cut = model
        # Truncation is a state of a model; `lengths` needs a model without it.
        self._whole = library.Tokenizer.from_str(model.to_str())
        self._whole.encode_special_tokens = model.encode_special_tokens
        self._whole.no_truncation()

    def __call__(self, texts: Sequence[str | bytes]) -> np.ndarray:
        """Token ids of n texts, int32 [n, context_length]."""
        batch = self._cleaned(texts)
        try:
            rows = [encoding.ids for encoding in self._cut.encode_batch_fast(batch)]
        except Exception as error:  # plain Exception, as for an unknown token that is unknown
            raise UserError(f"the tokenizer.json cannot make ids of a text: {error}") from None
        ids = base.padded(rows, self.context_length, self.pad_id, self._pads_left)
        return ids if self._zeroed is None else np.where(ids == self._zeroed, 0, ids)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of ids of each text, framed and not cut."""
        return [len(e.ids) for e in self._whole.encode_batch_fast(self._cleaned(texts))]

    def _cleaned(self, texts: Sequence[str | bytes]) -> list[str]:
        return [self._clean(base.as_text(text)) for text in texts]

    def decode(self, ids: np.ndarray) -> list[str]:
        """The texts of rows of ids, int [n, length], without special tokens."""
        return self._whole.decode_batch([row.tolist() for row in ids], skip_special_tokens=True)
