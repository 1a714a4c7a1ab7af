"""The wording of a run's texts, applied to texts from outside of its data: prompts, queries.

A model that has seen texts in lower case alone makes something else of capitals. So whatever embeds
a text puts it through the operations on wording that the training data goes through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.data.ops import apply_ops, build_ops, in_order
from vlp_jax.data.pipeline import split_mixture
from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError

# The operations of `OPS` that make another `text` of a `text`.
TEXT_TO_TEXT = ("clean_text", "prompt_template", "canonicalize_text", "lowercase", "truncate_text")
# The operations that take another `text` from the data.
NEW_TEXT = ("choose_text", "choose_question")


@dataclasses.dataclass(frozen=True)
class Wording:
    """Operations on a text, (name in `OPS`, keyword arguments) each, in their order."""

    operations: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.operations)

    def __str__(self) -> str:
        shown = (
            f"{name}({', '.join(f'{k}={v!r}' for k, v in sorted(arguments.items()))})"
            for name, arguments in self.operations
        )
        return ", ".join(shown).replace("()", "") or "none"

    def __call__(self, texts: Sequence[str | bytes]) -> list[bytes]:
        """The texts in UTF-8 after the operations. What is random is drawn alike for all texts.

        TensorFlow is imported only if there are operations.
        """
        encoded = [t if isinstance(t, bytes) else t.encode("utf-8", "replace") for t in texts]
        if not self.operations or not encoded:
            return encoded
        return list(self._graph(np.array(encoded, object)).numpy())

    @cached_property
    def _graph(self) -> Any:
        """The operations on many texts as a TensorFlow function that is traced once."""
        ops = build_ops(self.operations)
        # One seed for all texts: a random operation treats them alike.
        seeds = np.zeros((len(ops), 2), np.int32)

        def of_one(text: Any) -> Any:
            return apply_ops(ops, {"text": text}, seeds)["text"]

        return tf.function(
            lambda texts: tf.map_fn(of_one, texts, parallel_iterations=32),
            input_signature=[tf.TensorSpec([None], tf.string)],
            autograph=False,
        )


def caption_wording(preprocess: Mapping[str, Any] | Sequence[Any] | None) -> Wording:
    """The operations of `preprocess` that turn a text into a text, for lists of captions.

    Operations on other fields are left out, and so is `choose_text`: every caption is given. Of a
    `preprocess` that makes several texts one after the other, `text` is the last, unless
    `tokenize` makes the field `text` of an earlier one.
    """
    pairs = in_order(preprocess)
    made = {n: g.get("into") or g.get("field", "text") for n, (_, g) in enumerate(pairs)}
    ends = [n for n, (name, _) in enumerate(pairs) if name == "tokenize" and made[n] == "text"]
    # Operations after `tokenize` cannot change the text that it has taken.
    pairs = pairs[: ends[0]] if ends else pairs
    begins = [n for n, (name, _) in enumerate(pairs) if name in NEW_TEXT]
    return Wording(tuple(p for p in pairs[max(begins, default=0) :] if p[0] in TEXT_TO_TEXT))


def wording_of(data: Mapping[str, Any]) -> tuple[Wording, tuple[str, ...]]:
    """The wording of the texts of a training split, and notes on what it leaves open.

    Templates are left out, since a prompt is whole, and so is a window that is placed at random. Of
    a mixture the part with the largest weight counts.
    """
    return common_wording(worded_parts(data))


def worded_parts(data: Mapping[str, Any]) -> list[tuple[str, float, Wording]]:
    """(name, weight, wording) of each part of a data config; one part if it is no mixture."""
    parts, weights = split_mixture(as_plain(data))
    return [
        (name, weight, _fixed(part.get("preprocess")))
        for (name, part), weight in zip(parts.items(), weights, strict=True)
    ]


def common_wording(parts: Sequence[tuple[str, float, Wording]]) -> tuple[Wording, tuple[str, ...]]:
    """The wording of the part with the largest weight, and a note if others differ from it."""
    if not parts:
        return Wording(), ()
    name, _, chosen = max(parts, key=lambda part: part[1])
    if all(wording == chosen for _, _, wording in parts):
        return chosen, ()
    listed = "; ".join(f"{part}: {wording}" for part, _, wording in parts)
    note = (
        f"the parts of the training data word their texts in different ways ({listed}): prompts "
        f"and queries are worded as in {name!r}, the part with the largest weight"
    )
    return chosen, (note,)


def _fixed(preprocess: Mapping[str, Any] | Sequence[Any] | None) -> Wording:
    """The operations that apply to any text and draw nothing at random."""
    fixed = (
        (name, arguments)
        for name, arguments in caption_wording(preprocess).operations
        if name != "prompt_template" and arguments.get("where", "end") == "end"
    )
    return Wording(tuple(fixed))


def captions_of(value: Any) -> list[bytes]:
    """The captions of one example, as a batch holds them: a byte string, or an array of them.

    Captions that are empty or white space are left out.
    """
    captions = [value] if isinstance(value, bytes) else list(np.ravel(value))
    if not all(isinstance(caption, bytes) for caption in captions):
        raise UserError(f"captions: the field holds {type(captions[0]).__name__}, not text")
    return [caption for caption in captions if caption.strip()]
