"""Search for the process that holds the others back.

In a job of several processes every step ends with exchanges between all devices, so the time of a
step is the same everywhere. Processes differ in what they do before they dispatch: wait for their
part of the batch, or work in Python. Meanwhile the fast processes wait for their devices, which
wait for the devices of the slow process. So the straggler is the process that waits least for its
devices. The share of its time that it waits for data, or works on the host, says why. A slow device
or link shows in none of these, since all processes wait for it alike.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

# Share of the time by which a process must differ from the median of the others to be named.
CLEARLY = 0.15


@dataclasses.dataclass(frozen=True)
class ProcessSpeed:
    """One process over the steps since the last log, in shares of time; the rest is host work."""

    host: str
    step_seconds: float
    data_wait: float
    device_wait: float

    @classmethod
    def of(cls, host: str, speed: Mapping[str, float]) -> ProcessSpeed:
        """Reads the metrics of `StepClock.summary`, which must not be empty."""
        return cls(
            host,
            speed["perf/step_seconds"],
            speed["perf/data_wait_fraction"],
            speed["perf/device_wait_fraction"],
        )

    @property
    def host_work(self) -> float:
        return max(1.0 - self.data_wait - self.device_wait, 0.0)


def spread(speeds: Sequence[ProcessSpeed]) -> dict[str, float]:
    """Measures how far the processes lie apart, as metrics perf/..._min and perf/..._max."""
    return {
        "perf/step_seconds_min": min(s.step_seconds for s in speeds),
        "perf/step_seconds_max": max(s.step_seconds for s in speeds),
        "perf/data_wait_fraction_max": max(s.data_wait for s in speeds),
        "perf/device_wait_fraction_min": min(s.device_wait for s in speeds),
    }


class StragglerWatch:
    """Names the process that was slowest twice in a row, once in `silence` seconds."""

    def __init__(self, silence: float = 600.0):
        self._silence = silence
        self._last: tuple[int, str] | None = None
        self._named: dict[tuple[int, str], float] = {}

    def look(self, speeds: Sequence[ProcessSpeed], now: float) -> str | None:
        """Returns a line for the log, or None if nobody has to be named; `now` is in seconds."""
        found = straggler(speeds)
        before, self._last = self._last, found
        # The first steps of a process include its first batch, which takes as long as it takes.
        if found is None or found != before:
            return None
        if now - self._named.get(found, -self._silence) < self._silence:
            return None
        self._named[found] = now
        process, why = found
        own, others = speeds[process], [s for i, s in enumerate(speeds) if i != process]
        attribute, doing = _KINDS[why]
        usual = statistics.median(getattr(s, attribute) for s in others)
        return (
            f"warning: process {process} on host {own.host} {doing} {getattr(own, attribute):.0%} "
            f"of the time, the others {usual:.0%}: all wait for it"
        )


_KINDS: dict[str, tuple[str, str]] = {
    "data": ("data_wait", "waits for its data"),
    "host": ("host_work", "is busy outside of its devices (Python, other programs)"),
}


def straggler(speeds: Sequence[ProcessSpeed]) -> tuple[int, str] | None:
    """Finds the process that waits clearly least for its devices, by "data" or "host"."""
    if len(speeds) < 2:
        return None
    process = min(range(len(speeds)), key=lambda i: speeds[i].device_wait)
    own, others = speeds[process], [s for i, s in enumerate(speeds) if i != process]

    def more(attribute: str) -> float:
        return getattr(own, attribute) - statistics.median(getattr(s, attribute) for s in others)

    why = max(_KINDS, key=lambda why: more(_KINDS[why][0]))
    clear = -more("device_wait") >= CLEARLY and more(_KINDS[why][0]) >= CLEARLY
    return (process, why) if clear else None
