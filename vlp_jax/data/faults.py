"""Why an example cannot be used, and how the TensorFlow graph of an example says so.

A record that is damaged fails inside the graph of its example with one of the reasons below. The
pipeline drops the example, counts it by its source and its reason, and puts another in its place.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vlp_jax.data.lazy_tensorflow import import_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

UNDECODABLE = "undecodable image"
TOO_LARGE = "image too large"
EMPTY_TEXT = "empty caption"
MISSING_FIELD = "missing field"
UNREADABLE = "unreadable record"  # a checksum that is wrong, a record that does not parse
TRUNCATED = "truncated shard"
REASONS = (UNDECODABLE, TOO_LARGE, EMPTY_TEXT, MISSING_FIELD, UNREADABLE, TRUNCATED)

_MARK = "bad example"
_MESSAGE = re.compile(rf"{_MARK} \(([a-z ]+)\): ([^\n]*)")


def require(value: tf.Tensor, condition: tf.Tensor, reason: str, detail: str) -> tf.Tensor:
    """`value`, which cannot be had unless `condition` holds.

    The check is pruned with the value: where no output of the graph depends on it, it is not made.
    So it is neither an Assert, which TensorFlow never prunes, nor a control dependency on an
    operation without effects, which TensorFlow's optimizer drops.

    Args:
      value: strings or numbers of any shape.
      condition: bool, scalar.
      reason: one of `REASONS`.
      detail: what is wrong, one line; a Python string or a scalar string tensor.
    """
    tf = import_tensorflow()
    message = tf.strings.join([f"{_MARK} ({reason}): ", detail])
    zero = tf.strings.to_number(tf.where(condition, "0", message), tf.int32)
    if value.dtype == tf.string:
        return tf.strings.substr(value, zero, tf.int32.max)
    return value + tf.cast(zero, value.dtype)


def explain(message: str) -> tuple[str, str]:
    """The reason and a one-line detail of a TensorFlow error's message.

    What `require` did not raise itself comes from decoding an image.
    """
    found = _MESSAGE.search(message)
    if found:
        return found[1], found[2].strip()
    return UNDECODABLE, _first_line(message)


def _first_line(message: str) -> str:
    """A TensorFlow error in one line, without the names of graph nodes and operations."""
    message = re.sub(r"\{\{[^}]*\}\}\s*|\s*\[Op:[^]]*\].*", "", message).strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else "no message"
