"""Reasons why an example cannot be used, and checks inside of a TensorFlow graph.

A record that is damaged fails inside the graph of its example with one of the reasons below. The
pipeline drops the example, counts it by its source and its reason, and puts another in its place.
"""

from __future__ import annotations

import re

from vlp_jax.data.lazy_tensorflow import tf

UNDECODABLE = "undecodable image"
TOO_LARGE = "image too large"
EMPTY_TEXT = "empty caption"
MALFORMED_TEXT = "malformed text"  # bytes that are no UTF-8
MISSING_FIELD = "missing field"
UNREADABLE = "unreadable record"  # a checksum that is wrong, a record that does not parse
AMBIGUOUS = "ambiguous example"  # a name that occurs twice: which file is meant is not known
TRUNCATED = "truncated shard"
FAILED = "failed operation"
REASONS = (
    *(UNDECODABLE, TOO_LARGE, EMPTY_TEXT, MALFORMED_TEXT, MISSING_FIELD),
    *(UNREADABLE, AMBIGUOUS, TRUNCATED, FAILED),
)


class BadExample(Exception):
    """An example that cannot be used: `reason` is one of `REASONS`, `detail` one line."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


# The field of a record that says why it cannot be used; empty where it can.
FAULT = "__fault__"

_MARK = "bad example"
_TRACEBACK = ("Graph execution error", "Detected at node", "File ", "node ")
_MESSAGE = re.compile(rf"{_MARK} \(([a-z ]+)\): ([^\n]*)")


# Messages of TensorFlow's own errors, for faults that no `require` came before.
_KINDS = (
    (re.compile(r"is required but could not be found|Number of \w+ values"), MISSING_FIELD),
    (re.compile(r"Could not parse example input|Data types don't match"), UNREADABLE),
    (re.compile(r"No such file|Permission denied|Is a directory"), UNREADABLE),
    (re.compile(r"(?i)jpe?g|png|gif|bmp|webp|image|decode"), UNDECODABLE),
)


def require(
    value: tf.Tensor, condition: tf.Tensor, reason: str, detail: str | tf.Tensor
) -> tf.Tensor:
    """Returns `value`; makes the graph fail where it is needed and `condition` does not hold.

    The check is pruned with the value: if no output of the graph depends on the value, nothing is
    checked. An Assert would never be pruned, and TensorFlow's optimizer would drop a control
    dependency on an operation without effects.

    Args:
      value: strings or numbers of any shape.
      condition: bool, scalar.
      reason: one of `REASONS`.
      detail: what is wrong, one line; a Python string or a scalar string tensor.
    """
    message = tf.strings.join([f"{_MARK} ({reason}): ", detail])
    return require_marked(value, condition, message)


def require_marked(value: tf.Tensor, condition: tf.Tensor, message: tf.Tensor) -> tf.Tensor:
    """`require` with the whole message, a string scalar that `marked` made."""
    # A number that is 0, or whose parsing fails with the message. Adding it to the value makes the
    # value depend on the check.
    zero = tf.strings.to_number(tf.where(condition, "0", message), tf.int32)
    if value.dtype == tf.string:
        return tf.strings.substr(value, zero, tf.int32.max)
    return value + tf.cast(zero, value.dtype)


def marked(reason: str, detail: str) -> bytes:
    """The message with which a source says in a record's `FAULT` why it could not be read."""
    return f"{_MARK} ({reason}): {detail}".encode("utf-8", "replace")


def explain(message: str) -> tuple[str, str]:
    """The reason, one of `REASONS`, and a one-line detail of a TensorFlow error's message."""
    found = _MESSAGE.search(message)
    if found:
        return found[1], found[2].strip()
    detail = _first_line(message)
    return next((why for pattern, why in _KINDS if pattern.search(message)), FAILED), detail


def _first_line(message: str) -> str:
    """A TensorFlow error in one line, without the names of graph nodes and operations."""
    message = re.sub(r"\{\{[^}]*\}\}\s*|\s*\[Op:[^]]*\].*|\[\[[^]]*\]\]", "", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    # An error within a function begins with where the function was made.
    told = [line for line in lines if not line.startswith(_TRACEBACK)]
    return told[0] if told else "no message"
