"""Captions that come as lists: all of an example's, put through the text operations of a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.data.ops import apply_ops, build_ops
from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError

# The operations of `OPS` that make another `text` of a `text`.
TEXT_TO_TEXT = (
    "clean_text",
    "prompt_template",
    "canonicalize_text",
    "lowercase",
    "truncate_text",
)


def text_operations(
    preprocess: Mapping[str, Any] | Sequence[Any] | None,
) -> Callable[[Sequence[bytes]], list[bytes]]:
    """What a config's `preprocess` makes of texts, as a function of a list of them.

    Operations on other fields are left out, and so is `choose_text`: every text is given. What is
    random takes the same choice for every text.

    Raises:
      UserError: as `build_ops`; when called, for a template that needs another field than `text`.
    """
    plain = as_plain(preprocess or {})
    if isinstance(plain, Mapping):
        chosen: Any = {name: plain[name] for name in plain if name in TEXT_TO_TEXT}
    else:
        chosen = [pair for pair in plain if pair[0] in TEXT_TO_TEXT]
    ops = build_ops(chosen)

    def apply(texts: Sequence[bytes]) -> list[bytes]:
        if not ops or not texts:
            return list(texts)
        tf = import_tensorflow()
        seeds = np.zeros((len(ops), 2), np.int32)
        rows = tf.data.Dataset.from_tensor_slices(np.array(texts, object))
        done = rows.map(lambda text: apply_ops(ops, {"text": text}, seeds)["text"])
        return list(done.batch(len(texts)).get_single_element().numpy())

    return apply


def captions_of(value: Any) -> list[bytes]:
    """The captions of one example, as a batch holds them: a byte string, or an array of them.

    Those that are empty or white space are left out.

    Raises:
      UserError: they are no strings.
    """
    captions = [value] if isinstance(value, bytes) else list(np.ravel(value))
    if not all(isinstance(caption, bytes) for caption in captions):
        raise UserError(f"captions: the field holds {type(captions[0]).__name__}, not text")
    return [caption for caption in captions if caption.strip()]
