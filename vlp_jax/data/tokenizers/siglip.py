"""SigLIP's tokenizer as `transformers` has it: SentencePiece behind rules of its own.

Source: transformers 5.24, models/siglip/tokenization_siglip.py and tokenization_python.py, which
read spiece.model even where a tokenizer.json lies beside it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

from vlp_jax.data.tokenizers import base
from vlp_jax.errors import UserError

_SPACE = "\u2581"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SiglipTokenizer:
    """Token ids as `SiglipTokenizer` makes them with `padding="max_length", truncation=True`.

    Text is lower-cased and loses the punctuation of ASCII, but for special tokens that it spells.

    Attributes:
      cuts_left: a text that is too long loses its beginning, not its end.
    """

    def __init__(
        self,
        model: bytes,
        context_length: int,
        special: Mapping[str, str],
        *,
        lowercase: bool = True,
        dummy_prefix: bool = True,
        texts_may_hold_special_tokens: bool = True,
        pads_left: bool = False,
        cuts_left: bool = False,
    ) -> None:
        """
        Args:
          model: the content of spiece.model.
          context_length: of a row of ids.
          special: "eos", "pad" and "unk" -> the token's spelling.
          lowercase, dummy_prefix: `do_lower_case` and `legacy` of the tokenizer's config.
          texts_may_hold_special_tokens, pads_left, cuts_left: see `FramedTokenizer`.

        Raises:
          UserError: the file cannot be read, or lacks a special token.
        """
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError):  # whose message is a line of its C++
            raise UserError("spiece.model is not a SentencePiece model that can be read") from None
        if not dummy_prefix:
            self._model.override_normalizer_spec(add_dummy_prefix=False)
        ids = {name: self._model.piece_to_id(spelled) for name, spelled in special.items()}
        for name, spelled in special.items():
            if self._model.id_to_piece(ids[name]) != spelled:
                raise UserError(f"spiece.model has no token {spelled!r}, which is its {name} token")
        self.context_length, self.vocab_size = context_length, self._model.get_piece_size()
        self.pad_id, self.eos_id, self._unknown = ids["pad"], ids["eos"], special["unk"]
        self._special = {spelled: ids[name] for name, spelled in special.items()}
        names = sorted(self._special, key=len, reverse=True)
        found = "|".join(re.escape(name) for name in names)
        # White space around a special token belongs to it.
        self._split = re.compile(rf"\s*({found})\s*") if texts_may_hold_special_tokens else None
        self._lowercase, self._pads_left, self.cuts_left = lowercase, pads_left, cuts_left

    def __call__(self, texts: Sequence[str | bytes]) -> np.ndarray:
        """Token ids of n texts, int32 [n, context_length]."""
        rows = []
        for ids in self.encode(texts):
            over = max(len(ids) + 1 - self.context_length, 0)
            ids = ids[over:] if self.cuts_left else ids[: len(ids) - over]
            rows.append(ids if self._ends(ids) else [*ids, self.eos_id])
        return base.padded(rows, self.context_length, self.pad_id, self._pads_left)

    def encode(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """The ids of n texts without eos and padding, not cut."""
        return [self._encode(base.as_text(text)) for text in texts]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids n texts have with eos, not cut."""
        return [len(ids) + (not self._ends(ids)) for ids in self.encode(texts)]

    def decode(self, ids: np.ndarray) -> list[str]:
        """The texts of rows of ids, int [n, length], up to eos."""
        return [self._model.decode(row.tolist()) for row in base.up_to_eos(ids, self.eos_id)]

    def _ends(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] == self.eos_id

    def _encode(self, text: str) -> list[int]:
        text = _SPACE + text.replace(_SPACE, " ")
        parts = [text] if self._split is None else self._split.split(text)
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self._special[part])
            elif part:
                ids += self._plain(part)
        space = self._model.piece_to_id(_SPACE)
        if len(ids) > 1 and ids[0] == space and ids[1] in self._special.values():
            return ids[1:]
        return ids

    def _plain(self, text: str) -> list[int]:
        text = text.lower() if self._lowercase else text
        text = re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()
        # Behind the name of a token SentencePiece leaves the space at the beginning alone.
        ids, skipped = (self._model.encode(x) for x in (self._unknown + text, self._unknown))
        return ids[len(skipped) :] if len(ids) >= len(skipped) else ids
