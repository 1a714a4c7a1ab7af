"""What takes part in a measurement, and the turns in which it is measured."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

WARM_UP_STEPS = 3


class Contender(Protocol):
    """A training step with its state and a batch on the device.

    Attributes:
      name: what it is called in tables.
      notes: how it differs from our step, a line each.
      facts: what is known of it beside its times, for JSON: memory in bytes, seconds of the
        compilation, parameters.
    """

    name: str
    notes: tuple[str, ...]
    facts: dict[str, Any]

    def run(self, steps: int) -> list[float]:
        """Trains `steps` steps; the seconds of each. The device is idle before and after."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of the steps of one contender: a list for each round."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def median(self) -> float:
        """Of all steps."""
        return statistics.median(second for turn in self.rounds for second in turn)

    @property
    def round_medians(self) -> tuple[float, ...]:
        """Of the steps of each round."""
        return tuple(statistics.median(turn) for turn in self.rounds)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast ours is as another: one ratio a round, of the medians of its steps."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.rounds)


def ratio(ours: Times, theirs: Times) -> Ratio:
    """The speed of `ours` over that of `theirs`."""
    pairs = zip(ours.round_medians, theirs.round_medians, strict=True)
    return Ratio(tuple(b / a for a, b in pairs))


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    steps: int,
    each_round: Callable[[list[Times]], None] = lambda times: None,
) -> list[Times]:
    """The times of each, taken in turns: a change in the speed of the machine meets all of them.

    Args:
      rounds: turns of each.
      steps: of a turn.
      each_round: is given the times so far after each round.
    """
    times: list[list[tuple[float, ...]]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, own in zip(contenders, times, strict=True):
            own.append(tuple(contender.run(steps)))
        each_round([Times(tuple(own)) for own in times])
    return [Times(tuple(own)) for own in times]


class StepTimer:
    """Times steps that the host starts ahead of the device, as the loop does: the next one is
    started before the end of this one is waited for.

    Args:
      wait: returns when a result is there.
      ahead: steps that are started before one is waited for; 0 where starting a step is doing it.
    """

    def __init__(self, wait: Callable[[Any], None], ahead: int = 1):
        self._wait, self._ahead = wait, ahead
        self._marks = [time.perf_counter()]
        self._pending: list[Any] = []

    def started(self, result: Any) -> None:
        """A step was started; `result` is there when it ends."""
        self._pending.append(result)
        if len(self._pending) > self._ahead:
            self._end_one()

    def seconds(self) -> list[float]:
        """Waits for all; the seconds from the end of a step to the end of the next."""
        while self._pending:
            self._end_one()
        return [end - begin for begin, end in zip(self._marks, self._marks[1:], strict=False)]

    def _end_one(self) -> None:
        self._wait(self._pending.pop(0))
        self._marks.append(time.perf_counter())
