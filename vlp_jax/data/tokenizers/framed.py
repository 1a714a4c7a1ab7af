"""Tokenizers of other projects' models, which frame texts by themselves."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlp_jax.data.tokenizers import base
from vlp_jax.errors import UserError


class FramedTokenizer:
    """Token ids as `transformers` makes them with `padding="max_length", truncation=True`.

    The file's own normalization and special tokens are used, unlike in `SubwordTokenizer`.
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
          pad_token: what rows are filled up with, as it is spelled or its id.
          texts_may_hold_special_tokens: a text that spells "</s>" gets that token, as in
            `transformers` unless it is told otherwise.
          pads_left, cuts_left: padding comes before the text; a long text loses its beginning.
          zeroed: an id that becomes 0, as open_clip's `strip_sep_token` wants it.
          clean: what is done to a text first.
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


_SPACE = "\u2581"
# normalizer_spec {add_dummy_prefix: false} of a ModelProto: behind a message it is merged with it.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SiglipTokenizer:
    """Token ids as `SiglipTokenizer` makes them with `padding="max_length", truncation=True`.

    Text is lower-cased and loses the punctuation of ASCII, but for special tokens that it spells.
    Source: transformers 5.24, models/siglip/tokenization_siglip.py and tokenization_python.py,
    which read spiece.model even where a tokenizer.json lies beside it.
    """

    def __init__(
        self,
        model: bytes,
        context_length: int,
        special: Mapping[str, str],
        added: Mapping[str, tuple[bool, bool]],
        *,
        lowercase: bool = True,
        dummy_prefix: bool = True,
        texts_may_hold_special_tokens: bool = True,
        pads_left: bool = False,
        cuts_left: bool = False,
        clean: Callable[[str], str] = str,
    ) -> None:
        """Builds the tokenizer of `model`, the content of spiece.model.

        Args:
          special: "eos", "pad" and "unk" -> the token's spelling.
          added: spelling of every token that a text may spell -> whether white space to its left
            and to its right belongs to it.
          lowercase, dummy_prefix: `do_lower_case` and `legacy` of the tokenizer's config.
        """
        import sentencepiece

        # A protocol buffer that is appended overrides fields, so no field has to be found.
        model += b"" if dummy_prefix else _NO_DUMMY_PREFIX
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError):  # whose message is a line of its C++
            raise UserError("spiece.model is not a SentencePiece model that can be read") from None
        ids = {name: self._model.piece_to_id(spelled) for name, spelled in special.items()}
        for name, spelled in special.items():
            if self._model.id_to_piece(ids[name]) != spelled:
                raise UserError(f"spiece.model has no token {spelled!r}, which is its {name} token")
        self.context_length, self.vocab_size = context_length, self._model.get_piece_size()
        self.pad_id, self.eos_id, self._unknown = ids["pad"], ids["eos"], special["unk"]
        self._special = frozenset(special.values())
        # The longest first: the regular expression takes the first alternative that fits.
        names = sorted(added, key=len, reverse=True) if texts_may_hold_special_tokens else []
        spaces = {True: r"\s*", False: ""}
        found = [
            f"{spaces[added[name][0]]}(?:{re.escape(name)}){spaces[added[name][1]]}"
            for name in names
        ]
        self._split = re.compile(f"({'|'.join(found)})") if found else None
        self._lowercase, self._pads_left, self.cuts_left = lowercase, pads_left, cuts_left
        self._clean = clean

    def __call__(self, texts: Sequence[str | bytes]) -> np.ndarray:
        rows = []
        for ids in self.encode(texts):
            over = max(len(ids) + 1 - self.context_length, 0)
            ids = ids[over:] if self.cuts_left else ids[: len(ids) - over]
            rows.append(ids if self._ends(ids) else [*ids, self.eos_id])
        return base.padded(rows, self.context_length, self.pad_id, self._pads_left)

    def encode(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """The ids of n texts without eos and padding, not cut."""
        return [self._encode(self._clean(base.as_text(text))) for text in texts]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of ids of each text with eos, not cut."""
        return [len(ids) + (not self._ends(ids)) for ids in self.encode(texts)]

    def decode(self, ids: np.ndarray) -> list[str]:
        """The texts of rows of ids, int [n, length], up to eos."""
        return [self._model.decode(row.tolist()) for row in base.up_to_eos(ids, self.eos_id)]

    def _ends(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] == self.eos_id

    def _encode(self, text: str) -> list[int]:
        text = _SPACE + text.replace(_SPACE, " ")
        parts = [text] if self._split is None else self._split.split(text)
        pieces: list[str] = []
        for number, part in enumerate(parts):
            if number % 2:
                pieces.append(part.strip())
            elif part:
                pieces += self._plain(part)
        if len(pieces) > 1 and pieces[0] == _SPACE and pieces[1] in self._special:
            pieces = pieces[1:]
        return [self._model.piece_to_id(piece) for piece in pieces]

    def _plain(self, text: str) -> list[str]:
        text = text.lower() if self._lowercase else text
        text = re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()
        # Behind the name of a token SentencePiece leaves the space at the beginning alone.
        pieces = self._model.encode(self._unknown + text, out_type=str)
        skipped = len(self._model.encode(self._unknown))
        return pieces[skipped:] if len(pieces) >= skipped else pieces
