"""Counts examples that could not be used, and says when there are too many."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_jax.errors import NoScores, UserError

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
    if isinstance(max_fraction, bool) or not isinstance(max_fraction, int | float):
        raise UserError(f"data.max_bad_fraction={max_fraction!r} must be a number from 0 to 1")
    if not 0 <= max_fraction <= 1:
        raise UserError(f"data.max_bad_fraction={max_fraction} must be from 0 to 1")


class FaultLog:
    """Bad examples by source and reason, and how many were read, batch by batch.

    Batches are read ahead of the step that takes them, so counts are asked for up to a batch.

    Args:
      max_fraction: the largest share of bad examples among those read; the share is taken of at
        least 1,000, so that a few early ones do not end a run.
      of_split: the share is looked at once a split is read (`check_all`), and not before.

    Raises:
      UserError: for a share that is not from 0 to 1.
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

        Raises:
          UserError: too many were.
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
        """Adds the counts from before a checkpoint to the share, and not to the totals.

        Args:
          read: examples.
          bad: (source, reason) -> examples.
        """
        with self._lock:
            self._all.update(bad)
            self._read += read

    def check_all(self, gather: Callable[[Sequence[int]], Sequence[Sequence[int]]]) -> None:
        """Checks the share of bad examples once all of a split is read.

        The share is taken of at least 100, so that one broken image among few is no error.

        Args:
          gather: the numbers that every process gives, on every process.

        Raises:
          NoScores: too many examples are bad, or all of them.
        """
        # All processes sum the same numbers, so that all of them raise or none does.
        counts = gather((sum(self._all.values()), self._read))
        bad, read = (sum(column) for column in zip(*counts, strict=True))
        if bad > self._max_fraction * max(read, _FEWEST_OF_A_SPLIT) or (bad and bad == read):
            raise NoScores(self._too_many(bad, read))
