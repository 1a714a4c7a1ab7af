"""Reasons why an example cannot be used, checks inside of a TensorFlow graph, and counts.

A record that is damaged fails inside the graph of its example with one of the reasons below. The
pipeline drops the example, counts it by its source and its reason, and puts another in its place.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.errors import NoScores, UserError

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
    dependency on an operation without effects. `detail` is one line, a Python string or a string
    tensor [].
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


NAMED = 3  # examples of each kind of fault that the log names
MAX_BAD_FRACTION = 0.1
FEWEST = 1000  # examples that a share of bad ones is taken of, at least
_FEWEST_OF_A_SPLIT = 100  # the same at the end of an evaluation, whose split may be small
_log = logging.getLogger("vlp_jax.data")


@dataclass(frozen=True)
class Fault:
    """An example that could not be used: why, and where it lies."""

    reason: str
    where: str


def check_fraction(max_fraction: float) -> None:
    """Raises UserError if `data.max_bad_fraction` is no share from 0 to 1."""
    number = isinstance(max_fraction, int | float) and not isinstance(max_fraction, bool)
    if not number or not 0 <= max_fraction <= 1:
        raise UserError(f"data.max_bad_fraction={max_fraction!r} must be a number from 0 to 1")


class FaultLog:
    """Bad examples by source and reason, and how many were read, batch by batch.

    Batches are read ahead of the step that takes them, so counts are asked for up to a batch.

    Args:
      max_fraction: the largest share of bad examples among those read; the share is taken of at
        least 1,000, so that a few early ones do not end a run.
      of_split: the share is looked at once a split is read (`check_all`), and not before.
    """

    def __init__(self, max_fraction: float, of_split: bool = False) -> None:
        check_fraction(max_fraction)
        self._max_fraction, self._of_split = max_fraction, of_split
        self._lock = threading.Lock()
        self._settled: Counter[tuple[str, str]] = Counter()
        self._settled_read = 0
        # (batch, examples read, faults) of batches that no step has taken yet.
        self._ahead: list[tuple[int, int, Counter[tuple[str, str]]]] = []
        # Counts that the share is taken of; `begin_with` adds the counts of earlier runs.
        self._all: Counter[tuple[str, str]] = Counter()
        self._read = 0
        self._last = ""  # where the newest bad example lies

    def add(self, batch: int, read: int, source: str, faults: Sequence[Fault]) -> None:
        """Counts the examples of `source` that were read for a batch, and the bad ones among them.

        Raises UserError if too many were bad.
        """
        counts = Counter((source, fault.reason) for fault in faults)
        with self._lock:
            for fault in faults:
                self._last = fault.where
                kind = (source, fault.reason)
                self._all[kind] += 1
                if self._all[kind] <= NAMED:
                    _log.warning("bad example left out (%s): %s", fault.reason, fault.where)
                if self._all[kind] == NAMED:
                    _log.warning("further examples with this fault are counted and not named")
            self._read += read
            self._ahead.append((batch, read, counts))
            bad = sum(self._all.values())
        if not self._of_split and bad > self._max_fraction * max(self._read, FEWEST):
            raise UserError(self._too_many(bad, self._read))

    def _too_many(self, bad: int, read: int) -> str:
        kinds = ", ".join(f"{n:,} {reason} in {s}" for (s, reason), n in self._all.most_common(4))
        last = f"; the last: {self._last}" if self._last else ""
        return (
            f"{bad:,} of {read:,} examples could not be used, a share above "
            f"data.max_bad_fraction={self._max_fraction} ({kinds}{last}); mend the data or raise it"
        )

    def totals(self, before: int | None = None) -> dict[str, Any]:
        """Counts of the batches below `before`: {"read": n, "bad": {source: {reason: n}}}.

        `before` must not become less from call to call.
        """
        with self._lock:
            ahead, self._ahead = self._ahead, []
            for entry in ahead:
                batch, read, counts = entry
                if before is not None and batch >= before:
                    self._ahead.append(entry)
                    continue
                self._settled_read += read
                self._settled.update(counts)
            bad: dict[str, dict[str, int]] = {}
            for (source, reason), count in sorted(self._settled.items()):
                bad.setdefault(source, {})[reason] = count
            return {"read": self._settled_read, "bad": bad}

    def begin_with(self, read: int, bad: Mapping[tuple[str, str], int]) -> None:
        """Adds the counts from before a checkpoint to the share, and not to the totals."""
        with self._lock:
            self._all.update(bad)
            self._read += read

    def check_all(self, gather: Callable[[Sequence[int]], Sequence[Sequence[int]]]) -> None:
        """Checks the share of bad examples (of at least 100) once all of a split is read.

        `gather` gives the numbers of every process, on every process. Raises NoScores if too many
        examples are bad, or all of them.
        """
        # All processes sum the same numbers, so that all of them raise or none does.
        counts = gather((sum(self._all.values()), self._read))
        bad, read = (sum(column) for column in zip(*counts, strict=True))
        if bad > self._max_fraction * max(read, _FEWEST_OF_A_SPLIT) or (bad and bad == read):
            raise NoScores(self._too_many(bad, read))
