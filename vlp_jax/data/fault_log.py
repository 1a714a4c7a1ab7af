"""Counts examples that could not be used, and says when there are too many."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_jax.errors import UserError

NAMED = 3  # examples of each kind of fault that the log names
_FEWEST = 1000  # examples that a share of bad ones is taken of, at least
_log = logging.getLogger("vlp_jax.data")


@dataclass(frozen=True)
class Fault:
    """An example that could not be used: why, and where it lies."""

    reason: str
    where: str


class FaultLog:
    """Bad examples by source and reason, and how many were read, batch by batch.

    Batches are read ahead of the step that takes them, so counts are asked for up to a batch.

    Args:
      max_fraction: the largest share of bad examples among those read; the share is taken of at
        least 1,000, so that a few early ones do not end a run.

    Raises:
      UserError: for a share that is not from 0 to 1.
    """

    def __init__(self, max_fraction: float) -> None:
        if isinstance(max_fraction, bool) or not isinstance(max_fraction, int | float):
            raise UserError(f"data.max_bad_fraction={max_fraction!r} must be a number from 0 to 1")
        if not 0 <= max_fraction <= 1:
            raise UserError(f"data.max_bad_fraction={max_fraction} must be from 0 to 1")
        self._max_fraction = max_fraction
        self._lock = threading.Lock()
        self._settled: Counter[tuple[str, str]] = Counter()
        self._settled_read = 0
        self._ahead: list[tuple[int, int, Counter[tuple[str, str]]]] = []
        # For the share: with what was counted before a checkpoint.
        self._all: Counter[tuple[str, str]] = Counter()
        self._read = 0
        self._last = ""

    def add(self, batch: int, read: int, source: str, faults: Sequence[Fault]) -> None:
        """Notes that `read` examples of `source` were read for a batch, and which were bad.

        Raises:
          UserError: too many were.
        """
        counts = Counter((source, fault.reason) for fault in faults)
        with self._lock:
            for fault in faults:
                kind = (source, fault.reason)
                self._all[kind] += 1
                if self._all[kind] <= NAMED:
                    _log.warning("bad example left out (%s): %s", fault.reason, fault.where)
                if self._all[kind] == NAMED:
                    _log.warning("further examples with this fault are counted and not named")
            self._last = faults[-1].where if faults else self._last
            self._read += read
            self._ahead.append((batch, read, counts))
            bad = sum(self._all.values())
        if bad > self._max_fraction * max(self._read, _FEWEST):
            raise UserError(self._too_many())

    def _too_many(self) -> str:
        kinds = ", ".join(f"{n:,} {reason} in {s}" for (s, reason), n in self._all.most_common(4))
        last = f"; the last: {self._last}" if self._last else ""
        bad = sum(self._all.values())
        return (
            f"{bad:,} of {self._read:,} examples could not be used, a share above "
            f"data.max_bad_fraction={self._max_fraction} ({kinds}{last}); mend the data or raise it"
        )

    def totals(self, before: int | None = None) -> dict[str, Any]:
        """{"read": examples, "bad": {source: {reason: examples}}} of the batches below `before`.

        What was asked for once is settled: `before` must not become less.
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
        """Takes into the share, not into the totals, what was counted before a checkpoint.

        Args:
          read: examples.
          bad: (source, reason) -> examples.
        """
        with self._lock:
            self._all.update(bad)
            self._read += read

    def check_all(self) -> None:
        """Raises UserError if the share of all that was read, however few, is too large."""
        if sum(self._all.values()) > self._max_fraction * self._read:
            raise UserError(self._too_many())
