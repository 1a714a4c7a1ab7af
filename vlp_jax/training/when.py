"""Durations in steps, and when things run, as values."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

from vlp_jax.defaults import DURATION_UNITS
from vlp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Units:
    """What turns examples, epochs and percentages into steps.

    Attributes:
      batch_size: examples of a step, over the whole mesh.
      epoch_examples: examples of the training set; None where there is no such number.
      total_steps: length of the run; None while it is being worked out.
    """

    batch_size: int
    epoch_examples: int | None
    total_steps: int | None = None

    def steps(self, duration: Mapping[str, float | None], where: str) -> int:
        """`duration` in whole steps, rounded up.

        Raises:
          UserError: not exactly one unit is set, it is negative, or it cannot be known here.
        """
        given = {u: duration[u] for u in DURATION_UNITS if duration.get(u) is not None}
        if len(given) != 1:
            listed = ", ".join(f"{k}={v}" for k, v in given.items()) or "none"
            raise UserError(
                f"{where} needs exactly one of {', '.join(DURATION_UNITS)}; it sets {listed}"
                + (f" (clear one with --{where}.{next(iter(given))}=None)" if given else "")
            )
        (unit, value), *_ = given.items()
        if value < 0:
            raise UserError(f"{where}.{unit} is negative: {value}")
        if unit == "steps":
            return int(value)
        if unit == "percent":
            if self.total_steps is None:
                raise UserError(f"{where}.percent has nothing to be a percentage of")
            return math.ceil(self.total_steps * value / 100)
        examples = value
        if unit == "epochs":
            if self.epoch_examples is None:
                raise UserError(f"{where}.epochs: the training data has no known size")
            examples = value * self.epoch_examples
        return math.ceil(examples / self.batch_size)


@dataclasses.dataclass(frozen=True)
class EverySteps:
    """True at every multiple of `period`, and at the end. A period of 0 means the end alone."""

    period: int
    last: int
    at_start: bool = False

    def __call__(self, step: int) -> bool:
        if step == self.last:
            return True
        if step == 0:
            return self.at_start
        return self.period > 0 and step % self.period == 0


class EveryMinutes:
    """True when `minutes` have passed since it last was, or since `reset`.

    The clock is that of process 0, so that all processes agree; they do so where `look` says, since
    it takes a message.

    Args:
      minutes: the period; 0 for never.
      look: the steps at which the clock is looked at, the same on all processes.
      agree: gives the value of process 0 on every process.
      time_fn: the clock, in seconds.
    """

    def __init__(
        self,
        minutes: float,
        look: Callable[[int], bool],
        agree: Callable[[bool], bool],
        time_fn: Callable[[], float] = time.monotonic,
    ):
        self._seconds = 60 * minutes
        self._look, self._agree, self._time = look, agree, time_fn
        self._since = time_fn()

    def __call__(self, step: int) -> bool:
        """Whether it is time, just before batch `step`."""
        if not self._seconds or not self._look(step):
            return False
        return self._agree(self._time() - self._since >= self._seconds)

    def reset(self) -> None:
        """Begins a new period."""
        self._since = self._time()


@dataclasses.dataclass(frozen=True)
class StepsOrMinutes:
    """True at the steps of the one and at the times of the other, whose period then begins anew."""

    steps: EverySteps
    minutes: EveryMinutes

    def __call__(self, step: int) -> bool:
        """Whether it is time, just before batch `step`."""
        due = self.steps(step) or self.minutes(step)
        if due:
            self.minutes.reset()
        return due


@dataclasses.dataclass(frozen=True)
class StepsAhead:
    """How many steps the devices are handed at once: `several`, or 1 where the host has to look.

    Attributes:
      several: of them.
      first: the first step of this process, which is alone: how long it takes is told.
      last: there is no step from this one on.
      begins: true for the steps before which the host has something to do.
    """

    several: int
    first: int
    last: int
    begins: Sequence[Callable[[int], bool]]

    def __call__(self, step: int) -> int:
        """The number of steps, from `step` on."""
        if step == self.first or step + self.several > self.last:
            return 1
        within = range(step + 1, step + self.several)
        return 1 if any(begins(s) for begins in self.begins for s in within) else self.several
