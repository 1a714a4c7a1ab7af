"""The operation `tokenize`: it marks a string field, and whole chunks of examples are tokenized.

A call of a tokenizer for each example would cost more than the tokenizing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data.lazy_tensorflow import Example, Op, tf
from vlp_jax.data.tokenizers import base
from vlp_jax.errors import UserError

if TYPE_CHECKING:
    from vlp_jax.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Framing:
    """The form of a row of ids, as `tokenize` describes it. The default is the tokenizer's own."""

    length: int | None = None
    bos: bool | None = None
    eos: bool = True
    padding: str = "right"

    def row_length(self, tokenizer: Tokenizer) -> int:
        return tokenizer.context_length if self.length is None else self.length

    def check(self, tokenizer: Tokenizer, field: str) -> None:
        """Raises UserError if a tokenizer cannot make such rows of the field `field`."""
        if self == Framing():
            return
        if not hasattr(tokenizer, "bos_id"):  # it came with a model of others
            raise UserError(
                f"data.preprocess.tokenize: the tokenizer of these weights frames {field!r} by "
                "itself: leave length, bos, eos and padding out"
            )
        if self.bos and tokenizer.bos_id is None:
            raise UserError(
                f"data.preprocess.tokenize: {field!r} is to begin with bos, and the tokenizer has "
                "none; set bos to None or False"
            )
        special, length = self._special(tokenizer), self.row_length(tokenizer)
        if length <= special:
            raise UserError(
                f"data.preprocess.tokenize: length={length} of {field!r} has no room for a token "
                f"beside {special} special ones; raise it"
            )

    def rows(self, tokenizer: Tokenizer, texts: Sequence[str | bytes]) -> np.ndarray:
        """Token ids of n texts, int32 [n, row_length]; a text that is too long loses its end."""
        # Tokenizers of other projects frame texts by themselves and can do nothing else.
        if self == Framing():
            return tokenizer(texts)
        front = [tokenizer.bos_id] if self._has_bos(tokenizer) else []
        back = [tokenizer.eos_id] if self.eos else []
        length = self.row_length(tokenizer)
        room = length - self._special(tokenizer)
        rows = [[*front, *row[:room], *back] for row in tokenizer.encode(texts)]
        return base.padded(rows, length, tokenizer.pad_id, left=self.padding == "left")

    def _has_bos(self, tokenizer: Tokenizer) -> bool:
        return tokenizer.bos_id is not None if self.bos is None else self.bos

    def _special(self, tokenizer: Tokenizer) -> int:
        return int(self._has_bos(tokenizer)) + int(self.eos)


@dataclass(frozen=True)
class Marked:
    """A string field [] that is tokenized together with its chunk, into rows of `framing`."""

    text: tf.Tensor
    framing: Framing

    @property
    def dtype(self) -> tf.DType:
        """The dtype of the ids, so that operations on strings refuse the field."""
        return tf.int32

    @property
    def shape(self) -> tf.TensorShape:
        """The shape of a row whose length is not known."""
        return tf.TensorShape([self.framing.length])


def tokenize(
    field: str = "text",
    into: str | None = None,
    length: int | None = None,
    bos: bool | None = None,
    eos: bool = True,
    padding: str = "right",
) -> Op:
    """Turns a string field into the ids of its tokens, int32 [length].

    A `text` that is a string after all operations is tokenized without being named. An example
    whose text is empty or white space cannot be used.

    Args:
      field: the string.
      into: the field of the ids; None replaces the string.
      length: ids in a row; None for `tokenizer.context_length`. A longer text loses its end.
      bos: whether rows begin with bos; None: if the tokenizer has one.
      eos: whether texts end with eos.
      padding: the side that is filled up, "right" or "left".

    Raises:
      UserError: a setting that is none, or a field that is no string.
    """
    _check(field, into, length, bos, eos, padding)
    framing = Framing(length, bos, eos, padding)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        text = example[field]
        if isinstance(text, Marked):
            raise UserError(f"tokenize: {field!r} is tokenized already; set into in the first one")
        if text.dtype != tf.string or text.shape.rank != 0:
            raise UserError(f"tokenize: {field!r} is no string; choose_text makes one of a list")
        return {**example, into or field: Marked(text, framing)}

    return apply


def _check(field: Any, into: Any, length: Any, bos: Any, eos: Any, padding: Any) -> None:
    if not isinstance(field, str) or not (into is None or isinstance(into, str)):
        raise UserError(f"tokenize: field and into are names of fields, got {field!r}, {into!r}")
    whole = isinstance(length, int) and not isinstance(length, bool)
    if length is not None and (not whole or length < 1):
        raise UserError(f"tokenize: length must be None or a number from 1, got {length!r}")
    if bos not in (None, True, False) or eos not in (True, False):
        raise UserError(
            f"tokenize: bos must be None, True or False and eos True or False, got {bos!r}, {eos!r}"
        )
    if padding not in ("right", "left"):
        raise UserError(f"tokenize: padding must be 'right' or 'left', got {padding!r}")


def unmarked(example: Mapping[str, Any]) -> tuple[dict[str, tf.Tensor], dict[str, Framing]]:
    """Splits an example into fields, marked ones as strings, and the framing of each marked one."""
    strings = {k: v.text if isinstance(v, Marked) else v for k, v in example.items()}
    return strings, {k: v.framing for k, v in example.items() if isinstance(v, Marked)}
